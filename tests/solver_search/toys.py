"""Small float64 networks and exact teachers for the tests of the solver search."""

import torch
from torch import Tensor, nn

from solver_search.losses import TeacherPath
from solvers import NoiseSchedule, SolverTable, sample_trace, start_noise
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


def teacher_path(denoiser, table: SolverTable, count: int, first_seed: int = 2**31) -> TeacherPath:
    """A teacher's trajectories, float64."""
    noise = start_noise(range(first_seed, first_seed + count), SHAPE, torch.float64)
    with torch.no_grad():
        states = torch.stack(sample_trace(denoiser, table, noise).states, 1)
    return TeacherPath(states, table.alpha, table.sigma, noise)
