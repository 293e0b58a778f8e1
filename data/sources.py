"""Where samples come from: trajectories in caches, shards of clean images, or a teacher that is run for every batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.clean_samples import check_shape, noised, read_images
from data.image_shards import describe_samples
from data.shards import Trajectories, seed_ranges
from data.trajectories import TrajectoryCache, gather
from denoisers import index_condition, with_scale
from solvers import SolverTable

BLOCK = 32  # trajectories whose states are in memory at once, where only their ends are kept


@dataclass(frozen=True)
class StoredTrajectories:
    """Trajectories of caches, read when a part is asked for: `stored[8:16]` is in memory.

    Args:
        caches: where they are.
        places: of each, (cache, number in it).
        denoiser: whose condition holds the guidance scale where it varies.
        device: where parts go.
    """

    caches: Sequence[TrajectoryCache]
    places: Sequence[tuple[int, int]]
    denoiser: Any
    device: Any = "cpu"

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, part: slice) -> Trajectories:
        return gather(self.places[part], lambda place: place[0], self._read).to(self.device)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One per sample."""
        return tuple(self.caches[cache].seeds[number] for cache, number in self.places)

    def choose(self, indices: Sequence[int]) -> "StoredTrajectories":
        """Some of them, in any order."""
        return replace(self, places=[self.places[index] for index in indices])

    def to(self, device: Any, **_: Any) -> "StoredTrajectories":
        """The same, for a device."""
        return replace(self, device=device)

    def ends(self) -> Trajectories:
        """The first and the last states of all, in memory."""
        return Trajectories.join([self[at : at + BLOCK].ends() for at in range(0, len(self), BLOCK)])

    def _read(self, index: int, places: list[tuple[int, int]]) -> Trajectories:
        found = self.caches[index].take([number for _, number in places])
        scales = torch.full((len(found),), self.caches[index].identity.guidance_scale, dtype=torch.float64)
        return replace(found, condition=with_scale(self.denoiser, found.condition, scales))


Batch = Trajectories | StoredTrajectories


@dataclass(frozen=True)
class Source:
    """Samples by index: the first are learned from, of the rest some choose and the last report.

    Args:
        batch: (indices, seeds) -> the samples, or the seeds themselves where the teacher is still to be run on them.
        num_fitted, num_choosing, num_reporting: how many of each.
        record: what artifacts say about them: `data` in words, and what is known of the teacher.
        table: the teacher's solver; None where it is not known.
        seeds: of stored trajectories, by index.
        known_seeds: half-open ranges of the seeds of everything in the folders.
        draws: whether the seeds that `batch` is given are used: for noises or fresh trajectories.
    """

    batch: Callable[[Sequence[int], Sequence[int]], Batch | tuple[int, ...]]
    num_fitted: int
    num_choosing: int
    num_reporting: int
    record: dict[str, Any]
    table: SolverTable | None = None
    seeds: Sequence[int] = ()
    known_seeds: Sequence[Sequence[int]] = ()
    draws: bool = True

    @property
    def num_held(self) -> int:
        """How many are not learned from."""
        return self.num_choosing + self.num_reporting

    @property
    def choosing(self) -> range:
        """Indices of those that choose what is kept of what was learned."""
        return range(self.num_fitted, self.num_fitted + self.num_choosing)

    @property
    def reporting(self) -> range:
        """Indices of those that choose nothing: figures come from them."""
        return range(self.choosing.stop, self.choosing.stop + self.num_reporting)

    def check_halves(self, may_be_empty: bool = False) -> None:
        """ValueError where too few are held out for one half of them to choose and the other to report."""
        if not self.num_choosing and (self.num_reporting or not may_be_empty):
            raise ValueError(
                f"of the samples held out one half chooses what is kept and the other reports, {self.num_held} are too "
                f"few for that: set holdout to at least 2{', or to 0' if may_be_empty else ''}"
            )


def split(total: int, limit: int | None, holdout: int, folder: str | Path) -> tuple[range, range, range]:
    """Indices of samples: three sets that have nothing in common.

    Returns:
        (the first `limit`, default all others, to learn from; the first half of the last `holdout`, to choose by; the
        second half, to report on).
    Raises:
        ValueError: there are too few.
    """
    available = total - holdout
    fitted = available if limit is None else limit
    if not 1 <= fitted <= available:
        raise ValueError(
            f"{folder} has {total} samples: {fitted} to learn from and {holdout} to hold out do not fit; make more, or "
            "lower limit or holdout"
        )
    middle = available + holdout // 2
    return range(fitted), range(available, middle), range(middle, total)


def stored(folders: Sequence[str], denoiser: Any, states: str, limit: int | None, holdout: int) -> Source:
    """Trajectories of one solver in one or several folders.

    Args:
        folders: of caches.
        denoiser: they must be of this denoiser, unless only their images are used.
        states: see `data.teacher_data.Wanted`; `path` is read when it is used, the rest kept in memory.
        limit, holdout: see `split`, of each folder.
    Raises:
        ValueError: no complete cache, trajectories of another denoiser or of several solvers, or too few of them.
    """
    caches = [TrajectoryCache(folder) for folder in folders]
    for cache in caches:
        check_shape(str(cache.folder), cache.sample_shape, denoiser)
        if states != "samples":
            cache.check(denoiser)
        if cache.manifest["teacher"]["table"] != caches[0].manifest["teacher"]["table"]:
            raise ValueError(f"{cache.folder} and {caches[0].folder} hold trajectories of different solvers: give one")
    parts = [split(len(cache), limit, holdout, cache.folder) for cache in caches]
    sets = [[(k, number) for k, part in enumerate(parts) for number in part[which]] for which in range(3)]
    everything = StoredTrajectories(caches, [place for places in sets for place in places], denoiser)
    kept = everything if states == "path" else everything.ends()
    is_clean = states == "samples" and isinstance(kept, Trajectories)
    what = "end points of the trajectories" if is_clean else "trajectories"
    names = ", ".join(cache.folder.name for cache in caches)
    solver = caches[0].manifest.get("solver") or f"a solver of {caches[0].table.num_rows} steps"
    return Source(
        partial(noised, kept.end, kept.condition) if is_clean else lambda indices, seeds: kept.choose(indices),
        *map(len, sets),
        {
            "data": f"{what} {names}, sampled from the model with {solver}",
            "teacher": caches[0].manifest.get("solver"),
            "teacher_steps": caches[0].table.num_rows,
            "precision": caches[0].manifest["teacher"]["precision"],
        },
        caches[0].table,
        [caches[k].seeds[number] for k, number in everything.places],
        seed_ranges(sorted({seed for cache in caches for seed in cache.seeds})),
        draws=is_clean,
    )


def clean(folder: str, pattern: str, denoiser: Any, limit: int | None, holdout: int) -> Source:
    """Images or latents in webdataset shards; see `read_images`."""
    data, condition = read_images(folder, pattern, denoiser)
    sets, origin = split(len(data), limit, holdout, folder), describe_samples(folder)
    index = [number for numbers in sets for number in numbers]
    batch = partial(noised, data[index], index_condition(condition, index))
    return Source(batch, *map(len, sets), {"data": origin["data"]}, known_seeds=origin.get("seeds", []))


def fresh(table: SolverTable, limit: int, holdout: int) -> Source:
    """Seeds on which the teacher is to be run, `limit` in an epoch."""
    record = {"data": f"fresh trajectories of a solver of {table.num_rows} steps", "teacher_steps": table.num_rows}
    halves = holdout // 2, holdout - holdout // 2
    return Source(lambda indices, seeds: tuple(seeds), limit, *halves, record, table)
