"""The data of all methods that make solver tables: a teacher's trajectories, or clean samples and noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from data.loader import EpochBatchSampler, ResumableLoader, SharedData
from data.shards import Trajectories, seed_ranges
from data.sources import Batch, Source, clean, fresh, stored
from data.trajectories import FIRST_SEED, run_teacher
from denoisers import class_labels, with_scale
from solvers import resolve_solver
from solvers.identity import guidance_range, own_guidance
from solvers.named import default_solver


@dataclass(frozen=True)
class Wanted:
    """What a method asks of its data.

    Args:
        states: `path`, all states and outputs of the teacher; `ends`, its start noise and its image; `samples`, images
            with noises that have nothing to do with them.
        batch_size: what a step sees by default; None: everything.
        in_order: every epoch has the same batches, in equal number on all processes (some may be empty). What is
            learned then comes from whole epochs, and `batch_size` is that of one process.
    """

    states: str
    batch_size: int | None = None
    in_order: bool = False


class TeacherData(SharedData):
    """Batches for a method, and samples held out from it.

    Give `trajectories`, or `images`; with neither, every batch has seeds of its own and the teacher runs on them. Whole
    trajectories are read again for every batch; the ends alone, where a method needs no more, are kept in memory.

    Args:
        trajectories: folder of a cache (`train.py predict --config configs/trajectories/...`), or several of one
            solver at different guidance scales.
        images: folder of webdataset shards of images (NAME.jpg or .png with NAME.cls) or latents (NAME.npy with
            NAME.cls), for what learns from clean samples: of a data set, or sampled from the teacher
            (`configs/images/...`).
        shards: pattern of the shards in `images`.
        limit: learn from the first so many (of each cache), default all but those held out; of fresh ones, how many an
            epoch has.
        holdout: the last so many (of each cache) are never learned from: the first half of them chooses what is kept,
            the second half only reports.
        batch_size: samples a step sees, of all processes together, so that their number changes no result; of each
            process for a method that learns from whole epochs (OLSS). Default: what the method prefers.
        teacher: solver of fresh trajectories; default: ddim:100, or euler:100 for a flow schedule.
        first_seed: of fresh trajectories and noises; those held out come before it.
        seed: of the order.
    Raises:
        ValueError: two sources, or an option out of its range; on set-up: a source that is empty, unreadable or of
            another model, or that the method cannot learn from.
    """

    def __init__(
        self,
        trajectories: str | list[str] | None = None,
        images: str | None = None,
        shards: str = "*.tar*",
        limit: int | None = None,
        holdout: int = 32,
        batch_size: int | None = None,
        teacher: str | None = None,
        first_seed: int = FIRST_SEED + 2**21,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folders = [trajectories] if isinstance(trajectories, str) else list(trajectories or [])
        if self.folders and images:
            raise ValueError("give one source: `trajectories` (folders of caches) or `images` (a folder of shards)")
        if not (self.folders or images or limit):
            raise ValueError("without trajectories or images, say how many fresh trajectories an epoch has: limit")
        if holdout < 0 or any(value is not None and value < 1 for value in (limit, batch_size)):
            raise ValueError(
                f"holdout {holdout} must be at least 0, limit {limit} and batch_size {batch_size} at least 1"
            )
        self.images, self.shards, self.sizes = images, shards, (limit, holdout)
        self.batch_size, self.teacher, self.first_seed, self.seed = batch_size, teacher, first_seed, seed
        self.source: Source | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the source for the method that is trained or tested."""
        if self.source is None:
            module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
            self.open(module.denoiser, module.method.wanted)

    def open(self, denoiser: Any, wanted: Wanted) -> "TeacherData":
        """Read the source, or what is kept of it in memory, and check it against the denoiser."""
        self.denoiser, self.wanted = denoiser, wanted
        if self.images and wanted.states != "samples":
            raise ValueError(
                "what is learned needs the teacher's states, images alone do not have them: give trajectories"
            )
        if self.images:
            self.source = clean(self.images, self.shards, denoiser, *self.sizes)
        elif self.folders:
            self.source = stored(self.folders, denoiser, wanted.states, *self.sizes)
        elif wanted.in_order or wanted.states == "samples":
            raise ValueError("this method cannot learn from trajectories that are made afresh: give trajectories")
        else:
            name = self.teacher or default_solver(denoiser.schedule)
            self.source = fresh(resolve_solver(name, denoiser.schedule), *self.sizes)
        return self

    def fitted(self, limit: int) -> Trajectories:
        """The first samples that are learned from, in memory."""
        return self.source.batch(range(self.source.num_fitted)[:limit], ())[:]

    def choosing(self) -> Batch:
        """The samples that choose; whole trajectories are in memory when a part of them is asked for."""
        return self.source.batch(self.source.choosing, ())

    def reporting(self) -> Batch:
        """The samples that report, in the same way."""
        return self.source.batch(self.source.reporting, ())

    def seed_ranges(self) -> list[Sequence[int]]:
        """Half-open ranges of all seeds used so far: those of the folders, then those drawn."""
        source, epochs = self.source, 1 + (self._loader.epoch if self._loader else 0)
        drawn = [self.first_seed - source.num_held, self.first_seed + epochs * source.num_fitted]
        return [*source.known_seeds, *([drawn] if source.draws else [])]

    def held_out_seeds(self) -> dict[str, list[Sequence[int]]]:
        """Half-open ranges, as artifacts name them: `seeds` of those that report, `chosen_on` of those that choose."""
        source = self.source
        parts = {"seeds": source.reporting, "chosen_on": source.choosing}
        if source.draws:
            return {name: [[self._drawn(part), self._drawn(part) + len(part)]] for name, part in parts.items()}
        return {name: seed_ranges(sorted({source.seeds[index] for index in part})) for name, part in parts.items()}

    def run_teacher(self, seeds: Sequence[int], device: Any) -> Trajectories:
        """Fresh trajectories; each seed has its own guidance scale where there is a range."""
        low, high = guidance_range(own_guidance(self.denoiser))
        share = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds]).double()

        def condition(chosen: Sequence[int]) -> Any:
            return with_scale(self.denoiser, class_labels(self.denoiser, chosen), low + (high - low) * share)

        found = run_teacher(self.denoiser, self.source.table, seeds, condition=condition, device=device)
        return found if self.wanted.states == "path" else found.ends()

    def train_dataloader(self) -> ResumableLoader:
        """This process's batches; fresh seeds and noises are others in every epoch."""
        size = self.source.num_fitted
        rank, world_size = self.processes()
        in_order, batch_size = self.wanted.in_order, self.batch_size or self.wanted.batch_size or size
        each = world_size if in_order else 1
        sampler = EpochBatchSampler(size, batch_size * each, self.seed, rank, world_size, not in_order, even=in_order)
        return self.training_loader(_Samples(self.source, 0, self.first_seed, size, sampler), sampler)

    def choosing_batches(self) -> ResumableLoader:
        """This process's share of the samples that choose, always with the same noises."""
        return self._held_out(self.source.choosing)

    def reporting_batches(self) -> ResumableLoader:
        """This process's share of the samples that report, always with the same noises."""
        return self._held_out(self.source.reporting)

    def _held_out(self, part: range) -> ResumableLoader:
        batch_size = min(len(part), self.batch_size or self.wanted.batch_size or 64)
        sampler = EpochBatchSampler(len(part), batch_size, self.seed, *self.processes(), shuffle=False)
        return ResumableLoader(_Samples(self.source, part.start, self._drawn(part), 0, sampler), sampler)

    def _drawn(self, part: range) -> int:
        """The first seed that is drawn for samples held out."""
        return self.first_seed - self.source.num_held + part.start - self.source.num_fitted


class _Samples(Dataset):
    """Index k of epoch e is sample first + k, with seed first_seed + e * stride + k for what is drawn."""

    def __init__(self, source: Source, first: int, first_seed: int, stride: int, sampler: EpochBatchSampler) -> None:
        self.source, self.first, self.first_seed = source, first, first_seed
        self.stride, self.sampler = stride, sampler

    def __getitems__(self, indices: list[int]) -> Batch | tuple[int, ...]:
        seeds = [self.first_seed + self.sampler.epoch * self.stride + index for index in indices]
        return self.source.batch([self.first + index for index in indices], seeds)
