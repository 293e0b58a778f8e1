"""What writers of shards share: whole files or none, in the background, and a manifest once all are there."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data.manifest import MANIFEST_NAME, read_record
from data.shards import check_shard, record_path
from solvers.files import atomic_write, claimed


class SeedShards:
    """How seeds are shared out: `shard_size` to each shard, the last may have fewer."""

    seeds: list[int]
    shard_size: int

    @property
    def num_shards(self) -> int:
        """Number of shards of all processes together."""
        return -(-len(self.seeds) // self.shard_size)

    def shard_seeds(self, shard: int) -> list[int]:
        """Seeds of a shard's samples."""
        return self.seeds[shard * self.shard_size : (shard + 1) * self.shard_size]


class FolderWriter(ABC):
    """What writes shards to a folder, alone.

    Args:
        folder: created if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._claim = ExitStack()

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """Number of shards of all processes together."""

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{shard:05d}.tar"

    def claim(self) -> None:
        """Keep other runs from the folder, until `self._claim` is closed.

        Raises:
            ValueError: another run writes to it.
        """
        self._claim.close()
        self._claim.enter_context(claimed(self.folder))

    def check_complete(self) -> None:
        """Raise ValueError where shards are missing, after all processes have written theirs."""
        missing = sum(not self.path(shard).exists() for shard in range(self.num_shards))
        if missing:
            raise ValueError(
                f"{missing} of {self.num_shards} shards are missing in {self.folder}, because another process of this "
                "run has ended: run the same command again, it makes only those"
            )


class ShardWriter(FolderWriter):
    """Writes shards in the background while the network works on the next one; use it as a context.

    Each shard is a .tar with a JSON record beside it, which comes first, so a shard that exists is complete. A subclass
    says how many there are, how one is stored, and what the manifest holds.

    Args:
        folder: created if missing.
    """

    again = "generate the trajectories again"  # what to do about a damaged shard

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

    @abstractmethod
    def manifest(self, shards: dict[str, Any]) -> dict[str, Any]:
        """The manifest, with the record of every shard by its name; none while shards are missing."""

    def announce(self, rank: int, todo: Sequence[int]) -> None:
        """Say what this process has to make, before anything is written."""

    @abstractmethod
    def store(self, shard: int, value: Any) -> None:
        """Write a shard and its record; runs in the background."""

    def prepare(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Check what is there, announce what will be written, and return this process's shards to make.

        Raises:
            ValueError: a shard that exists is corrupt, the disk is too small, or another run writes to the folder.
        """
        if rank == 0:
            self.claim()
        mine = range(rank, self.num_shards, world_size)
        todo = [shard for shard in mine if not self._is_done(shard)]
        self.announce(rank, todo)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST_NAME).exists():
            self._save(self.manifest({}))
        if not todo:
            self._finish()
        return todo

    def write(self, shard: int, value: Any) -> None:
        """Queue a shard; waits for the one before, so that at most two are in memory."""
        self._wait()
        self._pool = self._pool or ThreadPoolExecutor(1)
        self._pending = self._pool.submit(self.store, shard, value)

    def close(self) -> None:
        """Wait for the last shard; whoever finds all shards present completes the manifest."""
        self._wait()
        if self._pool:
            self._pool.shutdown()
            self._pool = None
        self._finish()
        self._claim.close()

    def abandon(self) -> None:
        """Wait for the last shard, and leave the rest to another run."""
        if self._pool:
            self._pool.shutdown()
        self._claim.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        (self.abandon if kind else self.close)()

    def free_bytes(self) -> int:
        """What the disk has left."""
        existing = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        return shutil.disk_usage(existing).free

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _is_done(self, shard: int) -> bool:
        path = self.path(shard)
        if not (path.exists() and record_path(path).exists()):
            return False
        check_shard(path, self._record(path), self.again)
        return True

    def _save(self, manifest: dict[str, Any]) -> None:
        with atomic_write(self.folder / MANIFEST_NAME) as path:
            path.write_text(json.dumps(manifest) + "\n")

    def _finish(self) -> None:
        paths = [self.path(shard) for shard in range(self.num_shards)]
        if all(path.exists() and record_path(path).exists() for path in paths):
            self._save(self.manifest({path.name: self._record(path) for path in paths}))
            for partial in self.folder.glob(".*.tar.*"):  # of killed processes: nobody writes a shard that exists
                partial.unlink(missing_ok=True)

    def _record(self, path: Path) -> dict[str, Any]:
        return read_record(record_path(path), f"delete it and {path.name}, then {self.again}: only it is recomputed")
