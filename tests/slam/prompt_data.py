"""Made-up latents with a model's own prompt embeddings, for commands that train its student."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from data.loader import EpochBatchSampler, ResumableLoader, SharedData
from denoisers import class_labels, load_denoiser
from solvers import start_noise


class PromptData(SharedData):
    """Batches (latents, condition).

    Args:
        model: path of a denoiser with prompts.
        batch_size: samples per batch and process.
        count: samples.
    """

    def __init__(self, model: str, batch_size: int = 1, count: int = 8) -> None:
        super().__init__()
        self.model, self.batch_size, self.count = model, batch_size, count

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches."""
        rank, world_size = self.processes()
        sampler = EpochBatchSampler(self.count, self.batch_size * world_size, 0, rank, world_size)
        return self.training_loader(_Samples(load_denoiser(self.model), self.count), sampler, 0)


class _Samples(Dataset):
    def __init__(self, denoiser: Any, count: int) -> None:
        self.denoiser, self.count = denoiser, count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Any]:
        return start_noise(indices, self.denoiser.sample_shape), class_labels(self.denoiser, indices)
