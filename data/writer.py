"""Writes shards of trajectories while the network works on the next ones, and the manifest beside them."""

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data.manifest import FORMAT_VERSION, MANIFEST_NAME, check_same
from data.shards import Trajectories, check_shard, record_path, seed_ranges, write_shard
from solvers.files import atomic_write


class TrajectoryWriter:
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
        self.folder, self.teacher, self.seeds, self.shard_size = Path(folder), teacher, list(seeds), shard_size
        self.solver = solver
        self._timesteps = torch.tensor(teacher["table"]["timesteps"], dtype=torch.float64)
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        check_same(self.folder, self._manifest({}))

    def prepare(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Check what is there, announce what will be written, and return this process's shards to make.

        Raises:
            ValueError: a shard that exists is corrupt, or the disk is too small.
        """
        mine = range(rank, self.num_shards, world_size)
        todo = [shard for shard in mine if not self._is_done(shard)]
        for shard in mine:
            for leftover in self.folder.glob(f".{self.path(shard).name}.*"):
                leftover.unlink()
        self._announce(rank)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST_NAME).exists():
            self._save(self._manifest({}))
        if not todo:
            self._finish()
        return todo

    @property
    def num_shards(self) -> int:
        """Number of shards of all processes together."""
        return -(-len(self.seeds) // self.shard_size)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{shard:05d}.tar"

    def shard_seeds(self, shard: int) -> list[int]:
        """Seeds of a shard's trajectories."""
        return self.seeds[shard * self.shard_size : (shard + 1) * self.shard_size]

    def write(self, shard: int, trajectories: Trajectories) -> None:
        """Queue a shard; waits for the one before, so that at most two are in memory."""
        trajectories = trajectories.to("cpu")
        self._wait()
        self._pool = self._pool or ThreadPoolExecutor(1)
        self._pending = self._pool.submit(write_shard, self.path(shard), trajectories, self._timesteps)

    def close(self) -> None:
        """Wait for the last shard; whoever finds all shards present completes the manifest."""
        self._wait()
        if self._pool:
            self._pool.shutdown()
            self._pool = None
        self._finish()

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _is_done(self, shard: int) -> bool:
        path = self.path(shard)
        if not (path.exists() and record_path(path).exists()):
            return False
        check_shard(path, json.loads(record_path(path).read_text()))
        return True

    def _announce(self, rank: int) -> None:
        """The size of what is missing, before anything is written."""
        missing = sum(len(self.shard_seeds(i)) for i in range(self.num_shards) if not self.path(i).exists())
        size = missing * self._bytes_per_trajectory()
        if rank == 0:
            print(
                f"trajectories: {len(self.seeds)} of {len(self._timesteps)} steps, {missing} to make: "
                f"{size / 1e6:,.1f} MB ({self.teacher['dtype']}) in {self.folder}",
                file=sys.stderr,
            )
        existing = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if size > free:
            raise ValueError(
                f"the trajectories need {size / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB free: "
                "ask for fewer, or store them in float16"
            )

    def _bytes_per_trajectory(self) -> int:
        rows = 2 * len(self._timesteps) + 1
        elements = torch.Size(self.teacher["sample_shape"]).numel()
        return rows * elements * getattr(torch, self.teacher["dtype"]).itemsize

    def _manifest(self, shards: dict[str, Any]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "solver": self.solver,
            "teacher": self.teacher,
            "seeds": seed_ranges(self.seeds),
            "shard_size": self.shard_size,
            "complete": bool(shards),
            "shards": shards,
        }

    def _save(self, manifest: dict[str, Any]) -> None:
        with atomic_write(self.folder / MANIFEST_NAME) as path:
            path.write_text(json.dumps(manifest) + "\n")

    def _finish(self) -> None:
        paths = [self.path(shard) for shard in range(self.num_shards)]
        if all(path.exists() and record_path(path).exists() for path in paths):
            self._save(self._manifest({path.name: json.loads(record_path(path).read_text()) for path in paths}))
