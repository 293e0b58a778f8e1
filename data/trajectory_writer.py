"""Writes shards of trajectories while the network works on the next ones, and the manifest beside them."""

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data.manifest import FORMAT_VERSION, check_same
from data.shard_writer import SeedShards, ShardWriter
from data.shards import Trajectories, seed_ranges, write_shard
from denoisers.generate import check_finite

FAR = 2.0  # times the median of the largest values: no sample of a sound teacher
SHOWN = 8  # seeds in a warning


class TrajectoryWriter(SeedShards, ShardWriter):
    """Writes shards in the background while the network works on the next one; use it as a context.

    Args:
        folder: created if missing.
        teacher: see `describe_teacher`.
        seeds: of all trajectories.
        shard_size: trajectories per shard.
        solver: what the teacher's solver is called, for readers of the manifest.
    Raises:
        ValueError: no seeds, repeated seeds, or a folder that holds other trajectories.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: dict[str, Any],
        seeds: Sequence[int],
        shard_size: int,
        solver: str | None = None,
    ) -> None:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds, {len(set(seeds))} of them different: give one or more, none twice")
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}: it must be at least 1")
        super().__init__(folder)
        self.teacher, self.seeds, self.shard_size = teacher, list(seeds), shard_size
        self.solver = solver
        self._timesteps = torch.tensor(teacher["table"]["timesteps"], dtype=torch.float64)
        self._largest: dict[int, float] = {}
        check_same(self.folder, self.manifest({}))

    def write(self, shard: int, value: Trajectories) -> None:
        """Queue a shard, on the CPU; waits for the one before, so that at most two are in memory.

        Raises:
            ValueError: a trajectory that is not finite.
        """
        value = value.to("cpu")
        check_finite(value.states, value.seeds)
        self._largest |= zip(value.seeds, value.end.abs().flatten(1).amax(1).tolist())
        super().write(shard, value)

    def check_complete(self) -> None:
        """Also names the samples of this run on which the teacher itself fails."""
        super().check_complete()
        name_broken(self._largest, self.solver or "of these trajectories")

    def store(self, shard: int, value: Trajectories) -> None:
        """Write a shard and its record."""
        write_shard(self.path(shard), value, self._timesteps)

    def announce(self, rank: int, todo: Sequence[int]) -> None:
        """The size of what is missing, before anything is written."""
        missing = sum(len(self.shard_seeds(i)) for i in range(self.num_shards) if not self.path(i).exists())
        size = missing * self._bytes_per_trajectory()
        if rank == 0:
            print(
                f"trajectories: {len(self.seeds)} of {len(self._timesteps)} steps, {missing} to make: "
                f"{size / 1e6:,.1f} MB ({self.teacher['dtype']}) in {self.folder}",
                file=sys.stderr,
            )
        free = self.free_bytes()
        if size > free:
            raise ValueError(
                f"the trajectories need {size / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB free: "
                "ask for fewer, or store them in float16"
            )

    def manifest(self, shards: dict[str, Any]) -> dict[str, Any]:
        """Teacher, seeds and shards."""
        return {
            "format_version": FORMAT_VERSION,
            "solver": self.solver,
            "teacher": self.teacher,
            "seeds": seed_ranges(self.seeds),
            "shard_size": self.shard_size,
            "complete": bool(shards),
            "shards": shards,
        }

    def _bytes_per_trajectory(self) -> int:
        rows = 2 * len(self._timesteps) + 1
        elements = torch.Size(self.teacher["sample_shape"]).numel()
        return rows * elements * getattr(torch, self.teacher["dtype"]).itemsize


def name_broken(largest: Mapping[int, float], solver: str) -> None:
    """Warn of samples with values far outside those of the others: the teacher itself fails there.

    Args:
        largest: absolute value in the sample of each seed.
        solver: the teacher's.
    """
    usual = median(largest.values()) if largest else math.inf
    broken = [seed for seed, value in largest.items() if value > FAR * usual]
    if broken:
        listed = ", ".join(map(str, broken[:SHOWN])) + ", ..." * (len(broken) > SHOWN)
        warnings.warn(
            f"the teacher {solver} breaks at {len(broken)} of {len(largest)} seeds ({listed}): values up to "
            f"{max(largest.values()):.3g} where half of the samples stay below {usual:.3g}; figures against these "
            "samples say little: look at them, and train the model longer or take another teacher",
            stacklevel=2,
        )
