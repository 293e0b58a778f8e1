"""A bar for people, lines for logs."""

import io
import sys
import time

import pytest

from solvers import progress
from solvers.progress import progress_bar


class Terminal(io.StringIO):
    """An error stream that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines_with_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(progress_bar(range(3), "counting", "number")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"counting: {n} of 3 numbers" for n in (1, 2, 3)]
    assert all(line.endswith(" left") for line in lines)


def test_where_nobody_knows_how_many_there_are_no_time_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    list(progress_bar(iter(range(2)), "counting", "number"))
    assert capsys.readouterr().err.splitlines()[-1] == "counting: 2 numbers, 00:00 passed"


def test_what_is_soon_done_leaves_no_line_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(progress.Lines, "spoken", time.monotonic())
    with progress_bar(desc="counting", unit="number", total=3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_many_short_works_in_a_row_share_the_minute(monkeypatch, capsys):
    monkeypatch.setattr(progress.Lines, "spoken", time.monotonic() - 61)
    for name in ("first", "second"):
        list(progress_bar(range(3), name, "number"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["first: 1 of 3 numbers"]


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_what_is_not_shown_says_nothing(monkeypatch, stream):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress_bar(range(3), "counting", "number", show=False)) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress_bar(range(3), "counting", "number"))
    assert "counting: 100%|" in sys.stderr.getvalue()
    assert "3/3" in sys.stderr.getvalue()
