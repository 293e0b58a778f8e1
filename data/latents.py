"""Training data: latents and text embeddings that were encoded once, from shards mapped into memory."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.latent_shards import LatentShards
from data.loader import EpochBatchSampler, ResumableLoader, SharedData


class LatentData(SharedData):
    """Batches (latents, condition) of shards made by `train.py predict --config configs/encode/...`.

    Latents are float32 and scaled as the network takes them; the condition has the embeddings of the captions and, as
    "null", of the empty prompt. No autoencoder and no text encoder is loaded while training.

    Args:
        folder: of the shards.
        batch_size: samples per batch and process.
        num_workers: processes that fetch batches ahead; 0 reads them between the steps.
        verify: compare every shard with its checksum before training, which reads all of them once, each process a
            share; without, only their sizes.
        skip_corrupt: leave out corrupt shards, which are named, instead of refusing to start.
        seed: of the order.
    Raises:
        ValueError: on set-up: no complete set of shards, missing embeddings, a corrupt shard (unless skipped), too few
            samples, or latents and embeddings of another model.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 12,
        num_workers: int = 0,
        verify: bool = True,
        skip_corrupt: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self.folder, self.batch_size, self.num_workers = folder, batch_size, num_workers
        self.verify, self.skip_corrupt, self.seed = verify, skip_corrupt, seed
        self.shards: LatentShards | None = None

    def setup(self, stage: str) -> None:
        """Open the shards and check that they are whole."""
        if self.shards is not None:
            return
        shards = LatentShards(self.folder, self.skip_corrupt)
        if self.verify:
            shards.leave_out(_gather(shards.verify(*self.processes())))
        for note in shards.notes:
            print(f"left out: {note}", file=sys.stderr)
        self.shards = shards

    def check(self, denoiser: Any) -> None:
        """Refuse shards that do not fit a denoiser, after set-up; see `LatentShards.check`."""
        assert self.shards is not None
        self.shards.check(denoiser)

    def origin(self) -> dict[str, Any]:
        """What an artifact says about the data."""
        assert self.shards is not None
        encoded, count, folder = self.shards.manifest["encoded"], len(self.shards), self.shards.folder.name
        if "solver" not in encoded:
            return {"data": f"{count} pictures with captions, {folder}, encoded by {encoded['model']}"}
        return {
            "data": f"{count} samples of {encoded['model']} by {encoded['solver']}, {folder}",
            "seeds": encoded["seeds"],
        }

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; resumes at the exact batch."""
        assert self.shards is not None
        rank, world_size = self.processes()
        sampler = EpochBatchSampler(len(self.shards), self.batch_size * world_size, self.seed, rank, world_size)
        return self.training_loader(_Samples(self.shards), sampler, self.num_workers)


class _Samples(Dataset):
    def __init__(self, shards: LatentShards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, dict[str, Any]]:
        return self.shards.read(indices)


def _gather(names: Sequence[str]) -> list[str]:
    """The names that any process found."""
    if not torch.distributed.is_initialized():
        return list(names)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, list(names))
    return sorted({name for part in found for name in part})
