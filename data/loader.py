"""Batches that are a pure function of (seed, epoch, rank), from a loader that resumes at the exact sample."""

import hashlib
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SharedData(lightning.LightningDataModule):
    """Data whose batches the trainer's processes share; modules about solver tables test those, not the data."""

    def processes(self) -> tuple[int, int]:
        """(rank, world_size) of the trainer; (0, 1) without one."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def test_dataloader(self) -> list[str]:
        """The names of the module's tables, see `training.testing.TableModule`."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return module.tables_to_test()


class EpochBatchSampler(Sampler[list[int]]):
    """One rank's share of the batches of an epoch.

    All ranks draw the same permutation and take turns in it, so no sample is seen twice in an epoch. With `shuffle`
    the incomplete rest of an epoch is left out and every rank has equally many full batches; without, every sample
    is visited once, in order, and the last batch may be smaller; ranks may then have one batch more than others.

    Args:
        num_samples: size of the data set.
        batch_size: samples per batch and rank.
        seed: seed of the permutations.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes.
        shuffle: permute anew each epoch.
        even: without `shuffle`, end with an empty batch where others have one more.
    Raises:
        ValueError: fewer samples than one batch for each rank (with `shuffle`).
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        even: bool = False,
    ) -> None:
        if shuffle and num_samples < batch_size * world_size:
            raise ValueError(
                f"{num_samples} samples do not fill one batch of {batch_size} on each of {world_size} processes: "
                "lower batch_size"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.shuffle, self.even = rank, world_size, shuffle, even
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_samples // (self.batch_size * self.world_size)
        first = 0 if self.even else self.rank  # rank 0 has the largest share
        return -(-len(range(first, self.num_samples, self.world_size)) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        share = self._order()[self.rank :: self.world_size]
        for batch in range(self.start, len(self)):
            yield share[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(seed_of("epoch", self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator)


class ResumableLoader(DataLoader):
    """A DataLoader that knows how many batches of which epoch were handed out, and goes on from there.

    It counts epochs itself: each complete pass moves to the next one, so neither `set_epoch` nor the trainer's own
    count is needed. Batches that workers fetched ahead do not count.

    Args:
        dataset: with `__getitems__(indices) -> batch`, so that a batch is made in one indexing operation.
        sampler: the order; its `epoch` and `start` belong to this loader.
        num_workers: processes that fetch ahead; 0 for data in memory.
    """

    def __init__(self, dataset: Dataset, sampler: EpochBatchSampler, num_workers: int = 0) -> None:
        super().__init__(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=_as_is)
        self.epoch, self.batches = 0, 0

    def __iter__(self) -> Iterator[Any]:
        if self.batches >= len(self):
            self.epoch, self.batches = self.epoch + 1, 0
        self.batch_sampler.epoch, self.batch_sampler.start = self.epoch, self.batches
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches handed out in it."""
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch that `state` was taken at."""
        self.epoch, self.batches = state["epoch"], state["batches"]


def _as_is(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches."""
    return batch
