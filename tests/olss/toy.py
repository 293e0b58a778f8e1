"""A denoiser that needs no training, and its trajectories."""

import torch

from data.shards import Trajectories
from data.trajectories import FIRST_SEED, run_teacher
from solvers import NoiseSchedule
from solvers.named import named_solver
from tests.analytic import two_point_denoiser

SCHEDULE = NoiseSchedule.linear()
SEEDS = range(FIRST_SEED, FIRST_SEED + 24)


class Toy(torch.nn.Module):
    """Two-point data moved by the class: nonlinear in x, and different at every timestep."""

    def __init__(self, schedule: NoiseSchedule = SCHEDULE) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.exact = two_point_denoiser(schedule, 0.8)
        self.schedule, self.sample_shape, self.num_classes, self.name = schedule, (1, 4, 4), 3, "toy"

    def forward(self, x, timestep, condition=None):
        shift = 0.1 * condition.to(x).reshape(-1, 1, 1, 1)
        return (self.scale * self.exact(x.double() + shift, timestep)).to(x.dtype)


def teacher(steps: int = 20, schedule: NoiseSchedule = SCHEDULE):
    return named_solver(f"ddim:{steps}" if schedule.kind == "discrete_vp" else f"euler:{steps}", schedule)


def trajectories(steps: int = 20, seeds=SEEDS, schedule: NoiseSchedule = SCHEDULE) -> Trajectories:
    return run_teacher(Toy(schedule), teacher(steps, schedule), seeds, torch.float64)
