"""Files appear whole or not at all, whatever goes wrong, and a folder has one writer."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from solvers.files import atomic_write, claimed


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), ".hidden.tmp")


def write(path, text: str = "new") -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("place", ["os.replace", "os.chmod", "tempfile.mkstemp"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, place):
    write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(place, full if place.startswith("os") else refused)
    with pytest.raises(OSError, match=r"No space left|Read-only") as error:
        write(tmp_path / "a.txt")
    assert error.value.filename == str(tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_full_disk_is_seen_behind_other_errors(tmp_path, monkeypatch):
    def fill():
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
            raise RuntimeError("the library says something else")

    with pytest.raises(RuntimeError, match="something else"):
        fill()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="No space left") as error:
        fill()
    assert error.value.filename == str(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_files_error_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_write(tmp_path / "a.txt"):
        (tmp_path / "missing").read_text()
    assert error.value.filename == str(tmp_path / "missing")


HOLD = "import sys; from solvers.files import claimed\nwith claimed(sys.argv[1]): print('held', flush=True); input()"


@pytest.mark.parametrize("name", ["run", "run.json"])
def test_a_folder_or_file_has_one_writer(tmp_path, name):
    command = [sys.executable, "-c", HOLD, str(tmp_path / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"another process writes to .*{name}: wait for its end"),
            claimed(tmp_path / name),
        ):
            pass
        other.communicate("\n")
    with claimed(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


def test_a_new_folder_in_which_nothing_is_left_goes_again(tmp_path):
    with claimed(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with claimed(tmp_path / "new"):
        write(tmp_path / "new" / "a.txt")
    with claimed(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / "a.txt").read_text() == "new"
