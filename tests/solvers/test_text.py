"""Texts of any editor."""

from pathlib import Path

import pytest

from denoisers.prompts import read_prompts
from solvers.text import decode_text, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_with_a_mark_and_without(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("ein Gürteltier\r\n\r\n猫\r\n".encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == ["ein Gürteltier", "猫"]


def test_a_line_ends_where_editors_end_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("one\u2028two\x0c\x85three\rfour\r\nfive".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["one\u2028two\x0c\x85three", "four", "five"]


@pytest.mark.parametrize("mark", ["utf-16-be", "utf-32-be"])
def test_the_other_byte_order(mark: str) -> None:
    assert decode_text("\ufeffein Gürteltier".encode(mark)) == "ein Gürteltier"


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Gürteltier".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: the text is not UTF-8 at byte 1: save it as UTF-8"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a zero at letter 1"):
        decode_text("cat".encode("utf-16-le"))
