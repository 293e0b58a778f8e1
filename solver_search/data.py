"""What a search learns from: cached teacher trajectories, or seeds from which the module runs the teacher afresh."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.loader import EpochBatchSampler, ResumableLoader
from data.trajectories import FIRST_SEED, TrajectoryCache
from denoisers import concatenate_conditions, condition_to, index_condition
from training.testing import TableData


@dataclass(frozen=True)
class Samples:
    """Teacher states of some seeds, (batch, M+1, *shape) with all states or with the first and the last alone.

    Args:
        states: None when the teacher is still to be run.
        seeds: (batch,) int64.
        condition: of the denoiser.
        guidance_scale: (batch,) float64.
    """

    states: Tensor | None
    seeds: Tensor
    condition: Any
    guidance_scale: Tensor | None

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: Any) -> "Samples":
        index = index if isinstance(index, slice) else torch.as_tensor(index)
        return Samples(
            None if self.states is None else self.states[index],
            self.seeds[index],
            index_condition(self.condition, index),
            None if self.guidance_scale is None else self.guidance_scale[index],
        )

    def to(self, device: Any, **options: Any) -> "Samples":
        """States and condition on a device."""
        states = None if self.states is None else self.states.to(device, **options)
        return replace(self, states=states, condition=condition_to(self.condition, device))

    @classmethod
    def join(cls, parts: "Sequence[Samples]") -> "Samples":
        """Several as one."""
        return cls(
            torch.cat([part.states for part in parts]),
            torch.cat([part.seeds for part in parts]),
            concatenate_conditions([part.condition for part in parts]),
            torch.cat([part.guidance_scale for part in parts]),
        )


class _InMemory(Dataset):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Samples:
        return self.samples[indices]


class _FreshSeeds(Dataset):
    """Index k of epoch e stands for seed first + e * size + k, so no seed comes twice."""

    def __init__(self, first: int, size: int, sampler: EpochBatchSampler) -> None:
        self.first, self.size, self.sampler = first, size, sampler

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: list[int]) -> Samples:
        seeds = self.first + self.sampler.epoch * self.size + torch.tensor(indices, dtype=torch.int64)
        return Samples(None, seeds, None, None)


class SearchData(TableData):
    """Batches of teacher trajectories for a search.

    Args:
        trajectories: folder of a cache (`train.py predict`), or several made at different guidance scales; None: no
            cache, every batch has fresh seeds and the teacher runs on them.
        num_trajectories: how many of each cache are fitted on; default all but those held out. Fresh: per epoch.
        num_val: held out for validation, the last of each cache (fresh: the seeds before the first one).
        batch_size: trajectories a step sees, per process; default all: what Levenberg-Marquardt wants.
        first_seed: of fresh trajectories.
        seed: of the order.
    Raises:
        ValueError: fewer trajectories than asked for.
    """

    def __init__(
        self,
        trajectories: str | list[str] | None = None,
        num_trajectories: int | None = None,
        num_val: int = 32,
        batch_size: int | None = None,
        first_seed: int = FIRST_SEED + 2**20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folders = [trajectories] if isinstance(trajectories, str) else list(trajectories or [])
        if not self.folders and num_trajectories is None:
            raise ValueError("without cached trajectories, say how many an epoch has: num_trajectories")
        self.num_trajectories, self.num_val, self.batch_size = num_trajectories, num_val, batch_size
        self.first_seed, self.seed = first_seed, seed
        self.train: Dataset | None = None

    @property
    def caches(self) -> list[TrajectoryCache]:
        """The caches, opened; none for fresh trajectories."""
        return [TrajectoryCache(folder) for folder in self.folders]

    def setup(self, stage: str | None = None) -> None:
        """Read the caches into memory, once."""
        if self.train is not None:
            return
        if not self.folders:
            self.train = self.val = None
            return
        whole_path = bool(getattr(self.trainer.lightning_module, "needs_path", True)) if self.trainer else True
        parts = [self._read(cache, whole_path) for cache in self.caches]
        self.train = _InMemory(Samples.join([part[0] for part in parts]))
        self.val = _InMemory(Samples.join([part[1] for part in parts]))

    def seed_ranges(self) -> list[list[int]]:
        """Half-open ranges of the seeds fitted on so far or held out for validation, as artifacts record them."""
        if self.folders:
            return [[int(part[0]), int(part[-1]) + 1] for part in _runs([s for c in self.caches for s in c.seeds])]
        epochs = getattr(getattr(self, "_loader", None), "epoch", 0) + 1
        return [[self.first_seed - self.num_val, self.first_seed + epochs * int(self.num_trajectories or 0)]]

    def train_dataloader(self) -> ResumableLoader:
        """This process's batches."""
        rank, world_size = self._processes()
        size = len(self.train) if self.train is not None else int(self.num_trajectories or 0)
        batch_size = self.batch_size or size // world_size
        sampler = EpochBatchSampler(size, batch_size, self.seed, rank, world_size)
        dataset = self.train if self.train is not None else _FreshSeeds(self.first_seed, size, sampler)
        self._loader = ResumableLoader(dataset, sampler)
        return self._loader

    def val_dataloader(self) -> ResumableLoader | list:
        """This process's share of the held-out trajectories."""
        if not self.num_val:
            return []
        rank, world_size = self._processes()
        batch_size = min(self.num_val, self.batch_size or 64)
        size = len(self.val) if self.val is not None else self.num_val
        sampler = EpochBatchSampler(size, batch_size, self.seed, rank, world_size, shuffle=False)
        fresh = _FreshSeeds(self.first_seed - self.num_val, 0, sampler)
        return ResumableLoader(self.val if self.val is not None else fresh, sampler)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the loader keeps its own place."""
        return {}

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _read(self, cache: TrajectoryCache, whole_path: bool) -> tuple[Samples, Samples]:
        held = self.num_val
        wanted = len(cache) - held if self.num_trajectories is None else self.num_trajectories
        if wanted < 1 or wanted + held > len(cache):
            raise ValueError(
                f"{cache.folder} has {len(cache)} trajectories: {wanted} to fit and {held} to validate are too many; "
                "generate more, or lower num_trajectories or num_val"
            )
        scale = float(cache.manifest["teacher"]["guidance_scale"])
        parts = []
        for batch in cache.batches(cache.manifest["shard_size"]):
            states = batch.states if whole_path else batch.states[:, [0, -1]]
            scales = torch.full((len(batch),), scale, dtype=torch.float64)
            parts.append(Samples(states.clone(), torch.tensor(batch.seeds), batch.condition, scales))
        everything = Samples.join(parts)
        return everything[:wanted], everything[len(cache) - held :]


def _runs(seeds: list[int]) -> list[list[int]]:
    """Sorted integers cut where they do not follow one another."""
    runs: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return runs
