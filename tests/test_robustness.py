"""Short campaigns of mutated artifacts and interrupted commands, and that a campaign finds what it looks for."""

import time
from functools import partial

import pytest

from benchmarks import interruptions, journal
from benchmarks.journal import Journal
from benchmarks.robustness import COUNTS, campaign, interrupted
from solvers import artifact
from solvers.files import atomic_write
from training.arguments import guarded
from training.signals import stop


@pytest.mark.filterwarnings("ignore:solver artifacts of format 1")
def test_mutated_artifacts_are_refused_in_one_line():
    assert campaign(1500) == dict.fromkeys(COUNTS, 0)


@pytest.mark.parametrize(
    ("name", "replacement", "found"),
    [
        ("_check_sum", lambda values: None, {"other_solver", "other_metadata"}),
        ("check_metadata", lambda values, num_rows: None, {"crashes_later"}),
        ("SolverError", OSError, {"other_error"}),
    ],
)
@pytest.mark.filterwarnings("ignore:solver artifacts of format 1")
def test_a_campaign_finds_what_is_not_checked(monkeypatch, name, replacement, found):
    monkeypatch.setattr(artifact, name, replacement)
    counts = campaign(1500)
    assert {rule for rule, count in counts.items() if count} >= found


def test_a_campaign_goes_on_from_its_journal(tmp_path, monkeypatch, capsys):
    """What is broken still counts; what another commit has done does not."""
    path, done = tmp_path / "journal.jsonl", []

    def trial(name):
        if name == "c" and not done.count("b") > 1:
            raise KeyboardInterrupt
        done.append(name)
        return ["lost"] * (name == "a")

    trials = {name: partial(trial, name) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        Journal(path).counts("part", trials)
    path.write_text(path.read_text()[:-10])  # killed while it wrote the line of b
    assert Journal(path).counts("part", trials) == {"lost": 1}
    assert done == ["a", "b", "b", "c"]
    assert capsys.readouterr().err == "part: 3 of 3, 0 s left; lost 1\n"
    assert Journal(path).counts("part", trials) == {"lost": 1}
    assert Journal(path).counts("another part", {"a": list}) == {}
    assert done == ["a", "b", "b", "c"]
    monkeypatch.setattr(journal, "provenance", lambda: {"git_commit": "another"})
    assert Journal(path).counts("part", {"a": list}) == {}


@pytest.mark.slow
def test_commands_that_are_interrupted_go_on():
    found = interrupted(kills=1, signals=1, ranks=0)
    assert found | {"signal_slow": 0} == dict.fromkeys(interruptions.COUNTS, 0)


@pytest.mark.slow
def test_a_run_that_loses_a_process_ends():
    found = interrupted(kills=0, signals=0, ranks=2, kinds=["predict"])
    assert found | {"rank_slow": 0} == dict.fromkeys(interruptions.COUNTS, 0)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Interruptions of a function in place of a command; returns the function that sets it."""

    def use(work):
        monkeypatch.setattr(interruptions.Job, "run", lambda self, *further: work(self.folder, further))
        monkeypatch.setattr(interruptions.Job, "result", lambda self: (self.folder / "result").read_text())

    return use


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def careful(folder, further):
    """Obeys signals, and goes on with what it has done."""

    def work():
        stop.kept = lambda: f"go on with --ckpt_path {folder / 'last.ckpt'}"
        for step in range(10):
            if not (folder / f"{step}").exists():
                spin(0.02)
                with atomic_write(folder / f"{step}") as temporary:
                    temporary.write_text("done")
        (folder / "result").write_text("".join(path.name for path in sorted(folder.glob("[0-9]"))))

    guarded(work)


def hasty(folder, further):
    """Starts with nothing, dies of signals, and takes what is there for the whole."""
    folder.mkdir(exist_ok=True)
    if not (folder / "result").exists():
        (folder / "result").write_text("half")
        spin(0.2)
        (folder / "result").write_text("whole")


def failing(folder, further):
    """Cannot go on."""
    folder.mkdir()
    spin(0.2)
    (folder / "result").write_text("whole")


@pytest.mark.parametrize(
    ("work", "killed", "signalled"),
    [
        (careful, set(), set()),
        (hasty, {"killed_other"}, {"signal_code", "signal_lines", "signal_other"}),
        (failing, {"killed_lost"}, {"signal_code", "signal_lines", "signal_lost"}),
    ],
)
def test_an_interruption_finds_what_is_not_obeyed_or_lost(quick, tmp_path, work, killed, signalled):
    quick(work)
    for trial, expected in ((interruptions.kills, killed), (interruptions.signals, signalled)):
        folder = tmp_path / trial.__name__
        folder.mkdir()
        counts = trial("base", 4, folder, tmp_path)
        assert {rule for rule, count in counts.items() if count} - {"signal_slow"} == expected
