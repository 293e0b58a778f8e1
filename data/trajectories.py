"""Teacher trajectories on disk: generate them once, resume after a kill, read them back checked.

A folder holds `manifest.json` (which teacher, which seeds, the checksum of every shard) and shards of `shard_size`
trajectories each. Every process writes its own share of the shards; none waits for another.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from data.manifest import describe_teacher, read_manifest, short
from data.shards import Trajectories, check_shard, read_shard
from data.trajectory_writer import TrajectoryWriter
from denoisers.labels import class_labels
from solvers.artifact import table_from_dict
from solvers.conditions import condition_to
from solvers.identity import DenoiserIdentity, identify
from solvers.nodes import Nodes
from solvers.noise import start_noise
from solvers.progress import progress_bar
from solvers.sampler import sample_trace
from solvers.schedule import NoiseSchedule
from solvers.table import SolverTable

__all__ = ["FIRST_SEED", "Trajectories", "TrajectoryCache", "TrajectoryWriter", "generate_trajectories", "run_teacher"]

FIRST_SEED = 2**31  # fitting and training seeds start here, evaluation seeds at 0


def generate_trajectories(
    denoiser: Callable,
    table: SolverTable,
    seeds: Sequence[int],
    folder: str | Path,
    *,
    shard_size: int = 32,
    dtype: torch.dtype = torch.float32,
    condition: Callable[[Sequence[int]], Any] | None = None,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> None:
    """Run the teacher from every seed and store all its states and outputs.

    Shards that exist are checked and kept, so an interrupted run goes on where it was. The network runs on one shard
    at a time while the one before is being written. Run it under `torch.autocast` for bf16.

    Args:
        denoiser: the network, with `.schedule` and `.sample_shape`; it is called as it is, guidance included.
        table: the teacher's solver, M rows.
        seeds: one per trajectory; they address the start noise and the class.
        folder: created if missing.
        shard_size: trajectories in a shard, which is also the batch the network sees.
        dtype: of the stored states and outputs; a float64 run is computed in float64.
        condition: from seeds to the denoiser's condition; default: `class_labels`.
        device: where the denoiser is.
        rank: this process, 0 <= rank < world_size; it makes shards rank, rank + world_size, ...
        world_size: number of processes.
        progress: show a progress bar.
    Raises:
        ValueError: the folder holds another teacher, other seeds or a corrupt shard, or the disk is too small.
    """
    writer = TrajectoryWriter(folder, describe_teacher(denoiser, table, dtype), seeds, shard_size)
    todo = writer.prepare(rank, world_size)
    shards = progress_bar(todo, "trajectories", "shard", show=progress)
    with writer:
        for shard in shards:
            writer.write(shard, run_teacher(denoiser, table, writer.shard_seeds(shard), dtype, condition, device))


@torch.no_grad()
def run_teacher(
    denoiser: Callable,
    table: SolverTable,
    seeds: Sequence[int],
    dtype: torch.dtype = torch.float32,
    condition: Callable[[Sequence[int]], Any] | None = None,
    device: torch.device | str = "cpu",
) -> Trajectories:
    """Trajectories of some seeds, on `device`; see `generate_trajectories`."""
    noise = start_noise(seeds, denoiser.sample_shape, torch.promote_types(dtype, torch.float32)).to(device)
    chosen = condition_to(condition(seeds) if condition else class_labels(denoiser, seeds), device)
    trace = sample_trace(denoiser, table, noise, chosen, seeds=seeds)
    states, outputs = torch.stack(trace.states, 1).to(dtype), torch.stack(trace.outputs, 1).to(dtype)
    return Trajectories(states, outputs, chosen, tuple(seeds), Nodes.of(table))


class TrajectoryCache:
    """Trajectories of a folder, every shard checked by its checksum before its first use.

    Args:
        folder: written by `generate_trajectories` or `train.py predict`.
    Raises:
        ValueError: no complete set of trajectories is there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(f"{self.folder} is incomplete: run the generation again, it makes only what is missing")
        self._shards = list(self.manifest["shards"].items())
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return len(self.seeds)

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds of all trajectories, in order."""
        return [seed for start, stop in self.manifest["seeds"] for seed in range(start, stop)]

    @cached_property
    def table(self) -> SolverTable:
        """The teacher's solver."""
        return table_from_dict(self.manifest["teacher"]["table"])

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the teacher's network."""
        return NoiseSchedule.from_dict(self.manifest["teacher"]["schedule"])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a state."""
        return tuple(self.manifest["teacher"]["sample_shape"])

    @cached_property
    def identity(self) -> DenoiserIdentity:
        """The denoiser that made them, as far as the manifest says: about thresholding only what pipelines do."""
        teacher = self.manifest["teacher"]
        outputs = teacher["guidance_scale"], teacher.get("thresholding")
        return DenoiserIdentity(self.schedule, *outputs, teacher["denoiser"], teacher["weight_hash"])

    def check(self, denoiser: Callable) -> None:
        """Make sure that these are trajectories of `denoiser`, see `identify`.

        Raises:
            ValueError: another network, schedule or guidance.
        """
        known = self.identity.thresholding
        if reasons := self.identity.differences(identify(denoiser, thresholding=known)):
            raise ValueError(
                f"the trajectories in {self.folder} are not of this denoiser: {'; '.join(reasons)}. Generate "
                "trajectories of this denoiser in a folder of their own"
            )

    def take(self, numbers: Sequence[int]) -> Trajectories:
        """Trajectories by their number, at least one, in memory, in float32 or better; each shard is opened once.

        Raises:
            ValueError: a shard is missing, truncated, corrupt or of other seeds than the manifest says; it is named.
        """
        size = self.manifest["shard_size"]
        return gather(
            numbers,
            lambda number: number // size,
            lambda shard, some: self._read(shard, [number % size for number in some]),
        )

    def batches(self, batch_size: int = 32, limit: int | None = None) -> Iterator[Trajectories]:
        """All trajectories in order (or the first `limit`), in batches."""
        numbers = range(len(self))[:limit]
        return (self.take(numbers[first : first + batch_size]) for first in range(0, len(numbers), batch_size))

    def load(self, limit: int | None = None) -> Trajectories:
        """All trajectories (or the first `limit`) as one, in memory."""
        return self.take(range(len(self))[:limit])

    def _read(self, shard: int, positions: Sequence[int]) -> Trajectories:
        name, record = self._shards[shard]
        if name not in self._checked:
            check_shard(self.folder / name, record)
            self._checked.add(name)
        found = read_shard(self.folder / name, Nodes.of(self.table), positions)
        first = shard * self.manifest["shard_size"]
        wanted = [self.seeds[first + position] for position in positions]
        if list(found.seeds) != wanted:
            raise ValueError(
                f"shard {self.folder / name} holds seeds {short(list(found.seeds))} where the manifest says "
                f"{short(wanted)}: the manifest was changed; generate the trajectories again"
            )
        return found.to(torch.promote_types(found.states.dtype, torch.float32))  # fits and students compute in no less


def gather(
    items: Sequence[Any], group: Callable[[Any], int], read: Callable[[int, list[Any]], Trajectories]
) -> Trajectories:
    """Trajectories of some items, at least one: each group is read at once, the result is in the order of the items."""
    order = sorted(range(len(items)), key=lambda place: group(items[place]))
    groups = groupby(order, lambda place: group(items[place]))
    together = Trajectories.join([read(key, [items[place] for place in places]) for key, places in groups])
    return together if order == sorted(order) else together.choose(sorted(order, key=order.__getitem__))
