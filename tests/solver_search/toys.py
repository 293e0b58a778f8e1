"""Small float64 networks and exact teachers for the tests of the solver search."""

import torch
from torch import Tensor, nn

from data.shards import Trajectories
from data.trajectories import run_teacher
from solvers import NoiseSchedule, SolverTable
from tests.analytic import two_point_denoiser

SHAPE = (1, 2, 2)


class TwoPoints(nn.Module):
    """The exact denoiser of the data +value or -value; value is a weight, so that it has a hash and a device."""

    def __init__(self, schedule: NoiseSchedule, value: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.sample_shape = schedule, SHAPE
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.weight_hash = f"two points {value}"

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        shift = 0.0 if condition is None else 0.1 * condition.reshape(-1, 1, 1, 1).to(x)
        return two_point_denoiser(self.schedule, 1.0)(x + shift, timestep) * self.value

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, 3)


class Labelled(TwoPoints):
    """With classes, so that guidance can act."""

    num_classes = 3


def teacher_path(denoiser, table: SolverTable, count: int, first_seed: int = 2**31) -> Trajectories:
    """A teacher's trajectories without a condition, float64."""
    return run_teacher(denoiser, table, range(first_seed, first_seed + count), torch.float64, lambda seeds: None)
