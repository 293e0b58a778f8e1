"""What is learned for: a model as the denoiser that solvers are learned on, and the teacher it is learned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.manifest import describe_teacher
from data.shards import Trajectories
from data.trajectories import run_teacher
from data.trajectory_writer import TrajectoryWriter
from denoisers import class_labels, network_calls
from denoisers.evaluations import calls_per_row
from denoisers.generate import as_images, device_of
from learn.network import CountedNetwork
from learn.options import SHARD
from solvers import NoiseSchedule, SolverTable, start_noise
from solvers.conditions import condition_to


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

    @cached_property
    def is_differentiable(self) -> bool:
        """Whether the search's derivatives, forward ones of several directions at once, go through the network."""
        state = start_noise([0], self.denoiser.sample_shape).to(self.device)
        condition = condition_to(class_labels(self.denoiser, [0]), self.device)
        timestep, calls = self.teacher.timesteps[0].to(state), self.network.calls

        def push(*direction: torch.Tensor) -> torch.Tensor:
            return jvp(lambda x, t: self.denoiser(x, t, condition), (state, timestep), direction)[1]

        try:
            with sdpa_kernel(SDPBackend.MATH):
                vmap(push)(state[None], timestep[None])
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            print(f"no search by derivatives, they do not go through {self.name}: {reason}", flush=True)
            return False
        finally:
            self.network.calls = calls
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
    """UniPC with 30 steps; EDM has DPM-Solver++ in its place, a continuous VP schedule iPNDM alone."""
    return {"continuous_vp": "ipndm:60", "edm": "dpmpp:30"}.get(schedule.kind, "unipc:30")
