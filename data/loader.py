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
    """Data whose batches the trainer's processes share; modules about solver tables test those, not the data.

    A checkpoint holds the place in the training batches, and a run that is resumed goes on there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loader: ResumableLoader | None = None
        self._place: dict[str, Any] | None = None

    def processes(self) -> tuple[int, int]:
        """(rank, world_size) of the trainer; (0, 1) without one."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def training_loader(
        self, dataset: Dataset, sampler: "EpochBatchSampler", num_workers: int = 0
    ) -> "ResumableLoader":
        """Training batches, from the place of a checkpoint on; under `overfit_batches` every epoch has the same."""
        limit: int | float = self.trainer.limit_train_batches if self.trainer else 1.0
        length = min(len(sampler), limit) if isinstance(limit, int) else int(len(sampler) * limit)
        repeats = bool(self.trainer and self.trainer.overfit_batches)
        self._loader = ResumableLoader(dataset, sampler, num_workers, repeats, length)
        if self._place is not None:
            self._loader.load_state_dict(self._place)
            self._place = None
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """The place in the training batches."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there.

        Raises:
            ValueError: the batches are others than the checkpoint's.
        """
        if self._loader is None:
            self._place = state
        else:
            self._loader.load_state_dict(state)

    def test_dataloader(self) -> list[str]:
        """The names of the module's tables, see `training.testing.TableModule`."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return module.tables_to_test()


class EpochBatchSampler(Sampler[list[int]]):
    """One rank's share of the batches of an epoch.

    All ranks draw the same permutation and cut it into the same batches; each takes its turn in every batch, so the
    samples of a step do not depend on the number of ranks. With `shuffle` the incomplete rest of an epoch is left out;
    without, every sample is visited once, in order, and the last batch may be smaller.

    Args:
        num_samples: size of the data set.
        batch_size: samples of a step, of all ranks together.
        seed: seed of the permutations.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes.
        shuffle: permute anew each epoch.
        even: without `shuffle`, end with an empty batch where others have one more.
    Raises:
        ValueError: fewer samples than one batch, or a batch of fewer samples than ranks (with `shuffle`).
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
        if shuffle and not world_size <= batch_size <= num_samples:
            raise ValueError(
                f"{num_samples} samples, {batch_size} of them in a step of {world_size} processes: each process needs "
                "at least one, and the samples must fill one step; change batch_size"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.shuffle, self.even = rank, world_size, shuffle, even
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_samples // self.batch_size
        first = 0 if self.even else self.rank  # rank 0 has the largest share
        return -(-max(0, self.num_samples - first) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for batch in range(self.start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size].tolist()

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(seed_of("epoch", self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator)


class ResumableLoader(DataLoader):
    """A DataLoader that knows how many batches of which epoch were handed out.

    Each pass is the next epoch, from its start, however far the last one came; only after `load_state_dict` a pass goes
    on inside an epoch. Batches that workers fetched ahead do not count.

    Args:
        dataset: with `__getitems__(indices) -> batch`, so that a batch is made in one indexing operation.
        sampler: the order; its `epoch` and `start` belong to this loader.
        num_workers: processes that fetch ahead; 0 for data in memory.
        repeats: every epoch has the batches of the first.
        length: batches after which an epoch is over; default: all.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: EpochBatchSampler,
        num_workers: int = 0,
        repeats: bool = False,
        length: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=_as_is)
        self.epoch, self.batches, self.repeats = 0, 0, repeats
        self.length = len(sampler) if length is None else length
        self._next = (0, 0)  # epoch and batch that the next pass begins with

    def __iter__(self) -> Iterator[Any]:
        self.epoch, self.batches = self._next
        self._next = (self.epoch + 1, 0)
        self.batch_sampler.epoch, self.batch_sampler.start = 0 if self.repeats else self.epoch, self.batches
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    @property
    def num_samples(self) -> int:
        """Of all processes together."""
        return self.batch_sampler.num_samples  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches handed out in it, and what says which batches these are."""
        return {"epoch": self.epoch, "batches": self.batches, "order": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that `state` was taken at.

        Raises:
            ValueError: the batches were others.
        """
        for name, value in self._settings.items():
            if state["order"][name] != value:
                raise ValueError(
                    f"the checkpoint's data have {name} {state['order'][name]}, this training's {value}: resume with "
                    "the same, or start anew"
                )
        self.epoch, self.batches = state["epoch"], state["batches"]
        is_over = self.batches >= self.length
        self._next = (self.epoch + 1, 0) if is_over else (self.epoch, self.batches)

    @property
    def _settings(self) -> dict[str, int]:
        sampler: Any = self.batch_sampler
        return {"num_samples": sampler.num_samples, "samples in a step": sampler.batch_size, "seed": sampler.seed}


def _as_is(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches."""
    return batch
