"""What is learned for: a model as the denoiser that solvers are learned on, and the teacher it is learned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.manifest import describe_teacher
from data.shards import Trajectories
from data.trajectories import run_teacher
from data.trajectory_writer import TrajectoryWriter
from denoisers import network_calls
from denoisers.evaluations import calls_per_row
from denoisers.generate import as_images, device_of
from learn.network import CountedNetwork
from learn.options import SHARD
from solvers import NoiseSchedule, SolverTable


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its teacher.

    Args:
        name: for people.
        load: a line of Python that makes `denoiser` of what the user named.
        denoiser: with guidance.
        network: the counted network inside it.
        teacher: the slow solver, with the calls of guidance where the denoiser's can be told apart.
        teacher_name: for people.
        pipe: the pipeline whose network it is; None where it is none's.
    """

    name: str
    load: str
    denoiser: Any
    network: CountedNetwork
    teacher: SolverTable
    teacher_name: str
    pipe: Any = None

    @property
    def is_differentiable(self) -> bool:
        """Whether derivatives go through the network."""
        return True

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.denoiser)

    @property
    def guidance_scale(self) -> float:
        """Of the images that the solvers make."""
        return float(getattr(self.denoiser, "guidance_scale", 1.0))

    @property
    def row_calls(self) -> int:
        """Network calls of a row that is guided as the model is."""
        return 2 if self.teacher.has_branches else calls_per_row(self.denoiser)

    @property
    def teacher_calls(self) -> int:
        """Network calls of an image of the teacher."""
        return network_calls(self.teacher, self.denoiser)

    def writer(self, folder: Path, seeds: Sequence[int]) -> TrajectoryWriter:
        """Of the trajectories of this teacher; ValueError where the folder holds others."""
        described = describe_teacher(self.denoiser, self.teacher, torch.float32)
        return TrajectoryWriter(folder, described, seeds, SHARD, self.teacher_name)

    def run(self, seeds: Sequence[int]) -> Any:
        """Trajectories of some seeds."""
        return run_teacher(self.denoiser, self.teacher, seeds, device=self.device)

    def pictures(self, shown: Trajectories, states: torch.Tensor) -> torch.Tensor:
        """States of some trajectories' noises as people see them, on the CPU; all of them, or the first."""
        return as_images(self.denoiser, states.to(self.device)).cpu()


def default_teacher(schedule: NoiseSchedule) -> str:
    """UniPC with 30 steps; a continuous VP schedule has iPNDM alone."""
    return "ipndm:60" if schedule.kind == "continuous_vp" else "unipc:30"
