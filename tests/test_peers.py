"""GITS: the cost of an Euler step, the cheapest path, and the artifacts."""

from itertools import combinations, pairwise

import pytest
import torch

from benchmarks.peers import cheapest, costs, write
from data.trajectories import run_teacher
from denoisers import load_denoiser
from denoisers.checkpoint import save_denoiser
from denoisers.dit import DiT
from solvers import NoiseSchedule, load_solver, named_solver
from tests.analytic import two_point_denoiser

SEEDS = range(2**31, 2**31 + 4)


class Toy(torch.nn.Module):
    """Two-point data."""

    def __init__(self, schedule):
        super().__init__()
        self.exact, self.schedule, self.sample_shape = two_point_denoiser(schedule, 0.8), schedule, (1, 4, 4)

    def forward(self, x, timestep, condition=None):
        return self.exact(x.double(), timestep).to(x.dtype)


def table_and_costs(schedule, steps=12):
    table = named_solver(f"ipndm:{steps}", schedule)
    batch = run_teacher(Toy(schedule), table, SEEDS, torch.float64, lambda seeds: None)
    return table, batch, costs(table, batch)


@pytest.mark.parametrize("seed", range(8))
def test_the_cheapest_path_is_the_best_of_all(seed):
    cost = torch.rand(13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cost = cost.masked_fill(torch.ones(13, 13).tril().bool(), torch.inf)

    def total(path):
        return sum(1.15**step * float(cost[i, j]) for step, (i, j) in enumerate(pairwise(path)))

    for steps in (1, 2, 4, 6):
        every = [[0, *inner, 12] for inner in combinations(range(1, 12), steps - 1)]
        assert cheapest(cost, steps) == min(every, key=total)


def test_costs_are_those_of_states_that_leave_the_line():
    """By hand: an Euler step of the flow, and its distance from the line between noise and image."""
    table, batch, cost = table_and_costs(NoiseSchedule.flow())
    x, v = batch.states, batch.outputs
    moved = x[:, 3] + (table.sigma[9] - table.sigma[3]) * v[:, 3]

    def distance(point):
        line, off = (x[:, 0] - x[:, -1]).flatten(1), (point - x[:, -1]).flatten(1)
        along = (off * line).sum(1) / line.norm(dim=1)
        return (off.square().sum(1) - along.square()).clamp_min(0).sqrt()

    assert float(cost[3, 9]) == pytest.approx(float((distance(moved) - distance(x[:, 9])).mean()), abs=1e-7)
    assert bool(cost.tril().eq(torch.inf).tril().sum() == 13 * 14 / 2)
    assert float(cost[3, 4]) == pytest.approx(float((distance(x[:, 4]) - distance(x[:, 4])).mean()), abs=0.05)


def test_a_vp_model_has_the_costs_of_its_flow_form():
    """Data and noise are the same whatever the schedule calls them: an Euler step is a DDIM step."""
    schedule = NoiseSchedule.linear()
    table, batch, cost = table_and_costs(schedule)
    norm = table.alpha + table.sigma
    ddim = named_solver(f"ddim@[{','.join(str(float(table.timesteps[i])) for i in (2, 7))}]", schedule)
    stepped = ddim.state_coef[0, 0] * batch.states[:, 2] + ddim.output_coef[0, 0] * batch.outputs[:, 2]
    start, end, point = batch.states[:, 0] / norm[0], batch.states[:, -1] / norm[-1], stepped / norm[7]

    def distance(point):
        line, off = (start - end).flatten(1), (point - end).flatten(1)
        return (off - (off * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True) * line).norm(dim=1)

    expected = (distance(point) - distance(batch.states[:, 7] / norm[7])).mean()
    assert float(cost[2, 7]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_artifacts_fit_their_model(tmp_path):
    torch.manual_seed(0)
    network = DiT(NoiseSchedule.flow(), 8, 4, 1, 32, 1, 2)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    save_denoiser(network, tmp_path / "model")
    written = write(str(tmp_path / "model"), 1.5, ["ipndm", "unipc"], [2, 4], 4, tmp_path / "peers")
    assert [path.name for path in written] == [f"gits-{s}-{n}.json" for n in (2, 4) for s in ("ipndm", "unipc")]
    for path, count in zip(written, (2, 2, 4, 4)):
        table = load_solver(path, load_denoiser(tmp_path / "model", 1.5))
        assert table.nfe == count
        assert table.info["fitted_on"]["seeds"] == [[2**31, 2**31 + 4]]
