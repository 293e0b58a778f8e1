"""What is handed out, and the reasons; what is held out; memory."""

from dataclasses import replace

import pytest
import torch

from data.trajectories import TrajectoryCache
from learn.candidates import Candidate
from learn.cost import Cost, Progress
from learn.fits import learned
from learn.judge import Judge, Judged, _chosen
from learn.models import open_subject
from learn.network import CountedNetwork, in_pieces
from learn.options import LearnOptions
from learn.record import record
from solvers import NoiseSchedule, named_solver
from tests.olss.toy import Toy

TABLE = named_solver("unipc:4", NoiseSchedule.flow())


def judged(name, chosen, reported, fitted=None, rows=4):
    info = {} if fitted is None else {"method": name, "validation": {"row_errors": [fitted]}}
    table = named_solver(f"unipc:{rows}", NoiseSchedule.flow())
    values = [torch.tensor(part, dtype=torch.float64) for part in (chosen, reported)]
    return Judged(Candidate(name, replace(table, info=info), rows), *values, torch.zeros(1), 0.0)


USUAL = [judged("unipc", [0.2], [0.2]), judged("dpmpp", [0.3], [0.1])]


def test_the_better_learned_solver_is_handed_out():
    better, worse = judged("olss", [0.1], [0.09], 0.1), judged("solver_search", [0.15], [0.01], 0.1)
    assert _chosen([*USUAL, worse, better], 1) == (better, "")


@pytest.mark.parametrize("errors", [([0.25], [0.05]), ([0.1], [0.15])])
def test_one_that_is_anywhere_worse_than_a_usual_one_is_not(errors):
    taken, reason = _chosen([*USUAL, judged("olss", *errors, 0.2)], 1)
    assert taken in USUAL
    assert "the learned solver has error" in reason


def test_reasons():
    def reason(*learned, **options):
        return _chosen([*USUAL, judged("olss", *learned, **options)], 8)[1]

    assert "use more --trajectories" in reason([0.4], [0.4], 0.1)
    assert "too few to follow" in reason([0.4], [0.4], 0.4, rows=2)
    assert "little is left to gain" in reason([0.4], [0.4], 0.4)


class Small(torch.nn.Module):
    """Has memory for two samples."""

    schedule, sample_shape = NoiseSchedule.linear(), (1, 4, 4)

    def __init__(self, room=2):
        super().__init__()
        self.toy, self.room = Toy(), room

    def forward(self, x, timestep, condition=None):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return self.toy(x, timestep, condition)


def test_the_batch_is_halved_when_memory_runs_out(capsys):
    network = CountedNetwork(Small(), 8)
    x, timestep, labels = torch.randn(8, 1, 4, 4), torch.arange(8.0) + 1, torch.arange(8) % 3
    assert torch.equal(network(x, timestep, labels), Toy()(x, timestep, labels))
    assert (network.batch_size, network.calls) == (2, 8)
    assert "going on with 4" in capsys.readouterr().out
    assert torch.equal(network(x, timestep[0], labels), Toy()(x, timestep[0], labels))
    assert "going on" not in capsys.readouterr().out


def test_too_little_memory_for_one_sample_is_one_line():
    with pytest.raises(ValueError, match="too little memory for a single sample"):
        CountedNetwork(Small(0), 4)(torch.randn(3, 1, 4, 4), torch.tensor(1.0), torch.zeros(3))


def test_other_errors_are_not_taken_for_missing_memory():
    def broken(part):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        in_pieces(broken, 2, CountedNetwork(Small(), 2))


def test_memory_does_not_grow_with_the_number_of_trajectories(tmp_path, monkeypatch):
    """Neither the fit nor the judge has more in memory than a batch, or what a search works on."""
    options = LearnOptions(calls=[2], trajectories=24, batch_size=4, teacher="ddim:5", method="olss", device="cpu")
    subject = open_subject(Toy(), options)
    cache = record(subject, options, tmp_path / "trajectories", Progress(subject, Cost.of(subject, options)))
    held, take = [], TrajectoryCache.take

    def watched(self, numbers):
        held.append(len(numbers))
        return take(self, numbers)

    monkeypatch.setattr(TrajectoryCache, "take", watched)
    monkeypatch.setattr("learn.fits.SEARCHED", 6)
    monkeypatch.setattr("learn.fits.ROUNDS", 0)
    table = learned(subject, cache, options, 2, tmp_path / "candidates")
    choice = Judge(subject, cache, options.batch_size).choose(2, [Candidate("olss", table, 2)])
    assert max(held) == 12  # a quarter of the 48 chooses, in parts of 32 at most
    held.clear()
    Judge(subject, cache, options.batch_size).judge(choice.taken.candidate)
    assert max(held) == 4
    assert len(choice.taken.reported) == 12
