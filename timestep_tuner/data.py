"""What a tuner tries timesteps on: the end points of a trajectory cache, whole trajectories, or shards of images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.image_shards import ARRAYS, describe_samples, read_shards
from data.loader import EpochBatchSampler, ResumableLoader
from data.shards import seed_ranges
from data.teacher_path import TeacherPath
from data.trajectories import FIRST_SEED, TrajectoryCache
from denoisers import check_labels, concatenate_conditions, condition_to, index_condition
from solvers import SolverTable, start_noise
from timestep_tuner.objective import Examples
from training.testing import TableData


class TunerData(TableData):
    """Clean samples with fresh noise, or a teacher's trajectories.

    Give either `trajectories` or `images`. Of a cache of trajectories the noise objective uses the end points, which
    are samples of the teacher, and the trajectory objective all states.

    Args:
        trajectories: folder of a cache (`train.py predict --config configs/trajectories/...`).
        images: folder of webdataset shards of images (NAME.jpg or .png with NAME.cls) or latents (NAME.npy with
            NAME.cls): of a data set, or sampled from the teacher (`configs/images/...`).
        shards: pattern of the shards in `images`.
        limit: use at most this many samples; default all.
        num_val: the last samples, held out: tuned timesteps that are no better on them are not kept.
        batch_size: samples per step and process; the parallel strategy tries every row on each.
        first_seed: of the noises; those held out come before it.
        seed: of the order.
    Raises:
        ValueError: not exactly one source; on set-up: an empty or unreadable one, too few samples, samples of another
            shape or value range than the denoiser's, labels beyond its classes, trajectories of another model.
    """

    def __init__(
        self,
        trajectories: str | None = None,
        images: str | None = None,
        shards: str = "*.tar*",
        limit: int | None = None,
        num_val: int = 64,
        batch_size: int = 16,
        first_seed: int = FIRST_SEED + 2**21,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (trajectories is None) == (images is None):
            raise ValueError("give one source: `trajectories` (a cache's folder) or `images` (a folder of shards)")
        if num_val < 1 or batch_size < 1:
            raise ValueError(f"num_val {num_val} and batch_size {batch_size} must be at least 1")
        self.trajectories, self.images, self.shards = trajectories, images, shards
        self.limit, self.num_val, self.batch_size = limit, num_val, batch_size
        self.first_seed, self.seed = first_seed, seed
        self.samples: Samples | None = None
        self._loader: ResumableLoader | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read everything into memory, and check it against the denoiser."""
        if self.samples is not None:
            return
        tuner: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        if self.trajectories is not None:
            self.samples = read_cache(self.trajectories, tuner.denoiser, tuner.needs_path, self.limit)
        else:
            if tuner.needs_path:
                raise ValueError("the trajectory objective needs the teacher's states: give data.trajectories")
            self.samples = read_images(str(self.images), self.shards, tuner.denoiser, self.limit)
        if len(self.samples) <= self.num_val:
            raise ValueError(
                f"{len(self.samples)} samples, {self.num_val} of them held out, leave none to tune on: "
                "lower num_val, or give more"
            )

    def seed_ranges(self) -> list[list[int]]:
        """Half-open ranges of all seeds that have been used: of noises, and of the teacher's samples."""
        assert self.samples is not None
        if self.samples.path is not None:
            return self.samples.origin["seeds"]
        epochs = 1 + (self._loader.epoch if self._loader else 0)
        noises = [self.first_seed - self.num_val, self.first_seed + epochs * self._num_train]
        return [*self.samples.origin.get("seeds", []), noises]

    def train_dataloader(self) -> ResumableLoader:
        """This process's batches; every epoch has fresh noises."""
        rank, world_size = self._processes()
        sampler = EpochBatchSampler(self._num_train, self.batch_size, self.seed, rank, world_size)
        self._loader = ResumableLoader(_Noised(self.samples, 0, self.first_seed, self._num_train, sampler), sampler)
        return self._loader

    def held_out(self) -> ResumableLoader:
        """This process's share of the held-out samples, always with the same noises."""
        rank, world_size = self._processes()
        sampler = EpochBatchSampler(self.num_val, self.batch_size, self.seed, rank, world_size, shuffle=False)
        noised = _Noised(self.samples, self._num_train, self.first_seed - self.num_val, 0, sampler)
        return ResumableLoader(noised, sampler)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the loader keeps its own place."""
        return {}

    @property
    def _num_train(self) -> int:
        assert self.samples is not None
        return len(self.samples) - self.num_val

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class Samples:
    """Clean samples in memory.

    Args:
        data: (n, *shape).
        condition: of the denoiser.
        origin: where they come from, for the artifact: `data`, and the teacher's `seeds` where it made them.
        path: all states of the teacher, (n, M+1, *shape).
        teacher: its table.
    """

    def __init__(
        self,
        data: Tensor,
        condition: Any,
        origin: dict[str, Any],
        path: Tensor | None = None,
        teacher: SolverTable | None = None,
    ) -> None:
        self.data, self.condition, self.origin, self.path, self.teacher = data, condition, origin, path, teacher

    def __len__(self) -> int:
        return len(self.data)

    def examples(self, indices: Sequence[int], seeds: Sequence[int]) -> "TunerBatch":
        """Samples with the noise of `seeds`, or with their own where they are trajectories."""
        index = torch.as_tensor(list(indices))
        data, condition = self.data[index], index_condition(self.condition, index)
        if self.path is None or self.teacher is None:
            noise = start_noise(seeds, data.shape[1:], data.dtype)
            return TunerBatch(data, noise, tuple(seeds), condition)
        states = self.path[index]
        noise = states[:, 0] / self.teacher.start_scale
        path = TeacherPath(states, self.teacher.alpha, self.teacher.sigma, noise, condition)
        return TunerBatch(data, noise, tuple(seeds), condition, path)


class TunerBatch(Examples):
    """Examples that Lightning can move to a device."""

    def to(self, device: Any, **options: Any) -> "TunerBatch":
        """The same on a device."""
        path = self.path
        if path is not None:
            path = replace(path, states=path.states.to(device), noise=path.noise.to(device))
        return TunerBatch(
            self.data.to(device), self.noise.to(device), self.seeds, condition_to(self.condition, device), path
        )


class _Noised(Dataset):
    """Index k of epoch e is sample first + k, with the noise of seed first_seed + e * stride + k."""

    def __init__(self, samples: Any, first: int, first_seed: int, stride: int, sampler: EpochBatchSampler) -> None:
        self.samples, self.first, self.first_seed = samples, first, first_seed
        self.stride, self.sampler = stride, sampler

    def __len__(self) -> int:
        return len(self.samples) - self.first

    def __getitems__(self, indices: list[int]) -> TunerBatch:
        seeds = [self.first_seed + self.sampler.epoch * self.stride + index for index in indices]
        return self.samples.examples([self.first + index for index in indices], seeds)


def read_cache(folder: str, denoiser: Any, needs_path: bool, limit: int | None = None) -> Samples:
    """End points of the teacher's trajectories; all states where they are needed, and then of this very model."""
    cache = TrajectoryCache(folder)
    _check_shape(folder, cache.sample_shape, denoiser)
    if needs_path:
        cache.check(denoiser)
    parts = list(cache.batches(cache.manifest["shard_size"], limit))
    states = torch.cat([part.states if needs_path else part.states[:, -1:].clone() for part in parts])
    seeds = [seed for part in parts for seed in part.seeds]
    condition = concatenate_conditions([part.condition for part in parts])
    solver = cache.manifest.get("solver") or f"a solver of {cache.table.nfe} steps"
    what = "trajectories" if needs_path else "end points of the trajectories"
    origin = {
        "data": f"{what} {Path(folder).name}, sampled from the model with {solver}",
        "seeds": seed_ranges(sorted(seeds)),
    }
    return Samples(states[:, -1], condition, origin, *((states, cache.table) if needs_path else ()))


def read_images(folder: str, pattern: str, denoiser: Any, limit: int | None = None) -> Samples:
    """Images or latents of shards, in [-1, 1] where the model's samples are images."""
    values, labels = read_shards(folder, pattern, ARRAYS)
    data, labels = torch.from_numpy(values[:limit]), torch.from_numpy(labels[:limit])
    if data.dtype == torch.uint8:
        data = data.float() * (2 / 255) - 1
    data = data.float()
    if denoiser.sample_shape[0] == 1 and data.shape[1] == 3 and bool((data == data[:, :1]).all()):
        data = data[:, :1]  # a grey picture is decoded to three equal channels
    _check_shape(folder, tuple(data.shape[1:]), denoiser)
    _check_range(folder, data)
    condition = check_labels(denoiser, labels) if getattr(denoiser, "num_classes", None) else None
    return Samples(data, condition, describe_samples(folder))


def _check_shape(folder: str, shape: Sequence[int], denoiser: Any) -> None:
    if tuple(shape) != tuple(denoiser.sample_shape):
        raise ValueError(
            f"{folder} holds samples of shape {tuple(shape)}, the denoiser takes {tuple(denoiser.sample_shape)}: "
            "give samples of its size"
        )


def _check_range(folder: str, data: Tensor) -> None:
    """Images must fill [-1, 1]; latents only need to be finite, and of the order of 1."""
    low, high = float(data.min()), float(data.max())
    is_image = data.shape[1] in (1, 3)
    fits = -1.001 <= low < 0 < high <= 1.001 if is_image else max(-low, high) < 100
    if not fits:  # also when they are not finite
        allowed = "images lie in [-1, 1], black at -1" if is_image else "latents are finite and of the order of 1"
        raise ValueError(f"{folder} holds values from {low:g} to {high:g}: {allowed}; scale them when writing shards")
