"""Coordinates of a search: a unit of a weight moves its row's state by so much."""

from dataclasses import replace

import pytest
import torch

from data.shards import Trajectories
from data.trajectories import run_teacher
from solver_search.losses import SearchLoss
from solver_search.objective import Objective
from solver_search.parameters import FreeParameters
from solver_search.whitened import TOLD, UNIT, whitened
from solvers import Bands, NoiseSchedule, SolverTable, sample_trace
from solvers.named import named_solver

VP = NoiseSchedule.linear()
BANDS = Bands((0.2,), 2)


class Wave(torch.nn.Module):
    """A nonlinear network that mixes two channels."""

    schedule, sample_shape = VP, (2, 6, 6)

    def forward(self, x, timestep, condition=None):
        return (x + 0.5 * x.flip(1) * torch.cos(timestep / 300) + 0.2 * x.roll(1, -1)).tanh()


def in_bands(table: SolverTable) -> SolverTable:
    """The table with a matrix for every number, none of whose entries is 0."""
    generator = torch.Generator().manual_seed(0)

    def spread(weights):
        matrices = BANDS.embed(weights)
        noise = 0.1 * torch.randn(matrices.shape, generator=generator, dtype=torch.float64)
        return matrices + noise * weights[..., None, None, None]

    names = ("state_coef", "output_coef", "noise_coef")
    weights = {name: spread(getattr(table, name)) for name in names}
    return replace(table, space=BANDS, **weights, state_support=None, output_support=None)


def problem(table: SolverTable, count: int = 8, **options) -> tuple[FreeParameters, Objective, Trajectories]:
    network = Wave().double()
    teacher = run_teacher(
        network, named_solver("ddim:40", VP), range(2**31, 2**31 + count), torch.float64, lambda seeds: None
    )
    return (
        FreeParameters(table, (VP.t_min, VP.t_max), canonical=True, **options),
        Objective(network, SearchLoss()),
        teacher,
    )


@pytest.mark.parametrize("table", [named_solver("unipc:3", VP), in_bands(named_solver("unipc:3", VP))])
def test_a_unit_of_a_weight_moves_a_channel_of_its_state(table):
    plain, objective, teacher = problem(table)
    moved = whitened(plain, objective, teacher)
    start = moved.table(moved.initial())
    assert torch.equal(start.output_coef, plain.start.output_coef)
    before = sample_trace(objective.denoiser, start, teacher.noise).states
    for row in range(table.num_rows):
        for place in moved.places(row).flatten()[[0, -1]].tolist():
            unit = torch.zeros(moved.size, dtype=torch.float64)
            unit[place] = 1.0
            after = sample_trace(objective.denoiser, moved.table(unit), teacher.noise).states
            assert all(torch.equal(a, b) for a, b in zip(after[: row + 1], before))
            squares = (after[row + 1] - before[row + 1]).square().sum() / after[0].numel() * moved.channels
            assert float(squares.sqrt()) == pytest.approx(UNIT, rel=1e-4)


def test_a_last_row_that_is_kept_has_no_coordinates():
    plain, objective, teacher = problem(named_solver("unipc:3", VP), keep_last_row=True)
    moved = whitened(plain, objective, teacher)
    found = moved.table(torch.ones(moved.size, dtype=torch.float64))
    for name in ("state_coef", "output_coef"):
        assert torch.equal(getattr(found, name)[-1], getattr(plain.start, name)[-1])
        assert not torch.equal(getattr(found, name)[-2], getattr(plain.start, name)[-2])


def test_timesteps_stay_apart_and_in_range():
    plain, objective, teacher = problem(named_solver("unipc:3", VP))
    moved = whitened(plain, objective, teacher)
    theta = torch.zeros(moved.size, dtype=torch.float64)
    theta[1] = 1.0
    spacing = (VP.t_max - VP.t_min) / 3
    expected = plain.start.timesteps + TOLD * spacing * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(moved.table(theta).timesteps, expected, atol=1e-9)
    theta[:3] = torch.tensor([1e3, -1e3, 0.0])
    found = moved.table(moved.project(theta)).timesteps
    assert found[:2].tolist() == pytest.approx([VP.t_max, VP.t_min])
