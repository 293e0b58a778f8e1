"""Checkpoints are checked as a whole before they are used: no damage, no other training's, nothing half-written."""

import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from solvers.files import atomic_write
from tests.training.test_cli import fit
from train import main
from training.checkpoints import CheckedCheckpoints, check_named, use_checked
from training.sharded import Sharded

CONTENT = {"weights": torch.arange(40.0), "step": 3, "names": ["a", ("b", None)]}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.ckpt"
    CheckedCheckpoints().save_checkpoint(CONTENT, path)
    return path


def test_a_checkpoint_comes_back_and_torch_reads_it_too(path):
    for found in (CheckedCheckpoints().load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(found["weights"], CONTENT["weights"])
        assert (found["step"], found["names"]) == (3, CONTENT["names"])
    assert [one.name for one in path.parent.iterdir()] == ["last.ckpt"]


def test_every_flipped_bit_and_every_lost_byte_is_noticed(path):
    whole, source = path.read_bytes(), random.Random(0)
    last = [len(whole) - 1 - place for place in range(80)]
    for place in [*source.sample(range(len(whole)), 300), *last]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.ckpt .*(is damaged|is truncated, damaged or no checkpoint)"):
            CheckedCheckpoints().load_checkpoint(path)
    for size in (0, 1, 10, 72, 73, 74, len(whole) // 2, len(whole) - 73, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"last\.ckpt \({size} bytes\) is truncated"):
            CheckedCheckpoints().load_checkpoint(path)
    path.write_bytes(whole)
    CheckedCheckpoints().load_checkpoint(path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(path):
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        CheckedCheckpoints().save_checkpoint({"lambda": lambda: None}, path)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["last.ckpt"]


def test_names_that_are_no_files_are_refused(tmp_path):
    check_named(None)
    check_named("last")
    for name, message in (("", "--ckpt_path is empty"), (str(tmp_path / "a"), "there is no checkpoint .*/a: ")):
        with pytest.raises(ValueError, match=message):
            check_named(name)
    with pytest.raises(ValueError, match="is no checkpoint but a folder"):
        CheckedCheckpoints().load_checkpoint(tmp_path)


def test_other_ways_to_write_checkpoints_are_left_alone():
    class Own(TorchCheckpointIO):
        pass

    plain, own = SimpleNamespace(checkpoint_io=TorchCheckpointIO()), SimpleNamespace(checkpoint_io=Own())
    use_checked(plain)
    use_checked(own)
    assert isinstance(plain.checkpoint_io, CheckedCheckpoints)
    assert type(own.checkpoint_io) is Own
    with pytest.raises(ValueError, match=r"no checksum: give .*class_path training\.sharded\.Sharded"):
        use_checked(ModelParallelStrategy())
    sharded = Sharded()
    use_checked(sharded)
    assert isinstance(sharded.checkpoint_io, CheckedCheckpoints)


def refused(capsys, *arguments):
    """The one line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]


def test_the_command_line_refuses_what_is_no_checkpoint_of_its_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    logger = ("--trainer.logger", "false")
    main(fit(tmp_path, *logger))
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    last, whole = tmp_path / "last.ckpt", (tmp_path / "last.ckpt").read_bytes()

    def resumed(path, *options):
        return refused(capsys, *fit(tmp_path, *logger, "--ckpt_path", str(path), "--trainer.max_steps", "4", *options))

    assert "--ckpt_path is empty" in resumed("")
    assert "there is no checkpoint" in resumed(tmp_path / "none.ckpt")
    for content, message in ((b"", "(0 bytes) is truncated"), (whole[:1000], "truncated"), (b"\1" + whole[1:], "SHA")):
        (tmp_path / "bad.ckpt").write_bytes(content)
        assert message in resumed(tmp_path / "bad.ckpt")
    found = resumed(last, "--model.network.hidden_size", "32")
    assert "the checkpoint is of another network: network." in found
    found = resumed(last, "--data.batch_size", "32")
    assert "the checkpoint's data have samples in a step 64, this training's 32" in found
    slam = ["fit", "--config", "configs/slam/digits.yaml", "--model.teacher", str(tmp_path / "out"), "--model.output"]
    slam += [str(tmp_path / "slam"), "--trainer.callbacks", "null", "--ckpt_path", str(last)]
    assert "the checkpoint is of module BaseModel, this training of SLAM: give one of this training" in refused(
        capsys, *slam
    )
    assert not (tmp_path / "slam").exists()
    assert {path: path.read_bytes() for path in written} == written


def test_partial_files_of_killed_processes_are_removed(tmp_path):
    path = tmp_path / "last.ckpt"
    code = f"""
import os
from solvers.files import atomic_write
with atomic_write({str(path)!r}) as temporary:
    temporary.write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".last.ckpt.")
    with atomic_write(tmp_path / "other"):
        pass
    assert partial.exists()
    with atomic_write(path) as one, atomic_write(path) as two:  # of a process that runs: not removed
        assert one.exists()
        assert two.exists()
        assert str(os.getpid()) in one.name
    assert sorted(one.name for one in tmp_path.iterdir()) == ["last.ckpt", "other"]
