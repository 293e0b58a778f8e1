"""Images in [-1, 1] with their labels, from webdataset shards or from a data set known by its name."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.image_shards import describe_samples, read_shards
from data.loader import EpochBatchSampler, ResumableLoader, SharedData
from data.named import NAMED_SETS
from denoisers import check_labels

SOURCES = ("shards", *NAMED_SETS)


class ImageArray(Dataset):
    """Images held as uint8 in memory, scaled to [-1, 1] when indexed.

    Args:
        images: uint8, (n, channels, height, width).
        labels: int64, (n,).
        flip: also hold every image mirrored, at index n + i: an epoch then shows each image and its mirror image once.
        maximum: the pixel value that becomes 1.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, flip: bool = False, maximum: int = 255) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.flip, self.maximum = flip, maximum

    def __len__(self) -> int:
        return len(self.images) * (2 if self.flip else 1)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """(images float32 (batch, channels, height, width) in [-1, 1], labels int64 (batch,))."""
        index = torch.tensor(indices)
        source = index % len(self.images)
        images = self.images[source].float() * (2 / self.maximum) - 1
        mirrored = (index >= len(self.images)).view(-1, 1, 1, 1)
        return torch.where(mirrored, images.flip(-1), images), self.labels[source]


class ImageData(SharedData):
    """Images and labels for base models.

    Args:
        source: `shards`: webdataset shards with keys NAME.jpg (or .png) and NAME.cls; `cifar10`, `fashion`
            (Fashion-MNIST) or `mnist`: torchvision's, downloaded into `data_dir` on first use, the last two with one
            channel and a black frame to 32x32, and read from NAME-train.npz and NAME-test.npz (arrays `images`, uint8
            (n, 28, 28), and `labels`) where `data_dir` has them; `digits`: scikit-learn's 8x8 digits, one channel.
        data_dir: folder of the shards or of the download; default: the environment variable DATA_DIR, else data/SOURCE
            (data/cifar10 for shards).
        train_shards: pattern of the training shards in `data_dir`.
        val_shards: pattern of the validation shards in `data_dir`.
        batch_size: images per batch and process.
        flip: show every image mirrored too; default: where a mirrored image is one of its kind, so not for figures.
        seed: seed of the order of the images.
        val_images: number of validation images, the first ones of the validation set.
    Raises:
        ValueError: unknown source; on set-up: a folder without matching shards, or shards that hold something else.
    """

    def __init__(
        self,
        source: str = "shards",
        data_dir: str | None = None,
        train_shards: str = "*train*.tar*",
        val_shards: str = "*test*.tar*",
        batch_size: int = 64,
        flip: bool | None = None,
        seed: int = 0,
        val_images: int = 2000,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"unknown image source {source!r}: use one of {', '.join(SOURCES)}")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._set = NAMED_SETS.get(source)
        self.flip = (self._set is None or self._set.mirrored) if flip is None else flip
        default = "data/cifar10" if self._set is None else f"data/{source}"
        self.data_dir = Path(data_dir or os.environ.get("DATA_DIR") or default)
        self.train_shards, self.val_shards, self.val_images = train_shards, val_shards, val_images
        self._train: ImageArray | None = None
        self._val: ImageArray | None = None

    def prepare_data(self) -> None:
        """Download what is missing of the data, once per machine."""
        if self._set is not None and self._set.download is not None:
            self._set.download(self.data_dir)

    def setup(self, stage: str) -> None:
        """Decode the images this stage needs into memory."""
        if stage == "fit" and self._train is None:
            images, labels, maximum = self._load(train=True)
            self._train = ImageArray(images, labels, self.flip, maximum)
        if stage in ("fit", "validate") and self._val is None:
            images, labels, maximum = self._load(train=False)
            self._val = ImageArray(images[: self.val_images], labels[: self.val_images], maximum=maximum)

    def check(self, denoiser: Any) -> None:
        """Refuse training images that a denoiser does not take, after set-up.

        Raises:
            ValueError: images of another shape, or labels beyond its classes.
        """
        assert self._train is not None
        found, wanted = tuple(self._train.images.shape[1:]), tuple(denoiser.sample_shape)
        if found != wanted:
            raise ValueError(
                f"the training data have shape {found}, the denoiser takes {wanted}: give data of its size"
            )
        if getattr(denoiser, "num_classes", None):
            check_labels(denoiser, self._train.labels)

    def origin(self) -> dict[str, Any]:
        """What an artifact says about the data: `data`, and the teacher's `seeds` where it made them."""
        return describe_samples(self.data_dir) if self.source == "shards" else {"data": self.source}

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; resumes at the exact batch."""
        return self.training_loader(self._train, self._order(self._train, shuffle=True))

    def val_dataloader(self) -> ResumableLoader:
        """The first `val_images` validation images, in order."""
        return ResumableLoader(self._val, self._order(self._val, shuffle=False))

    def _order(self, images: ImageArray, shuffle: bool) -> EpochBatchSampler:
        rank, world_size = self.processes()
        return EpochBatchSampler(len(images), self.batch_size * world_size, self.seed, rank, world_size, shuffle)

    def _load(self, train: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """(images, labels, value of white)."""
        if self._set is not None:
            return *self._set.load(self.data_dir, train), self._set.white
        return *read_shards(self.data_dir, self.train_shards if train else self.val_shards), 255
