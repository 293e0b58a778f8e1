"""Data sets by name: uint8 images with their labels, downloaded by torchvision where that is needed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class NamedSet:
    """How to get a data set.

    Args:
        load: (folder, training images or the others) -> images uint8 (n, channels, height, width), labels int64 (n,).
        download: puts what is missing into the folder; None where nothing is to be downloaded.
        mirrored: whether a mirrored image is one of its kind.
        white: the pixel value that becomes 1.
    """

    load: Callable[[Path, bool], Arrays]
    download: Callable[[Path], None] | None = None
    mirrored: bool = False
    white: int = 255


def _digits(folder: Path, train: bool) -> Arrays:
    """scikit-learn's 1,797 digits with values 0..16; every tenth is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 10 == 9) != train
    return digits.images[chosen].astype(np.uint8)[:, None], digits.target[chosen].astype(np.int64)


def _cifar10(folder: Path, train: bool) -> Arrays:
    images, labels = _torchvision("CIFAR10", folder, train)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def _grey(name: str, torchvision_name: str, folder: Path, train: bool) -> Arrays:
    """Images of 28x28 in a black frame that makes them 32x32, from NAME-train.npz or else torchvision's download."""
    path = _npz_path(name, folder, train)
    images, labels = _read_npz(path) if path.is_file() else _torchvision(torchvision_name, folder, train)
    return np.pad(images[:, None], ((0, 0), (0, 0), (2, 2), (2, 2))), labels


def _download_grey(name: str, torchvision_name: str, folder: Path) -> None:
    for train in (True, False):
        if not _npz_path(name, folder, train).is_file():
            _torchvision(torchvision_name, folder, train, download=True)


def _download_cifar10(folder: Path) -> None:
    _torchvision("CIFAR10", folder, train=True, download=True)


def _npz_path(name: str, folder: Path, train: bool) -> Path:
    return folder / f"{name}-{'train' if train else 'test'}.npz"


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it needs the arrays images and labels") from error
    if images.dtype != np.uint8 or images.shape != (len(labels), 28, 28):
        raise ValueError(
            f"{path} holds images {images.shape} of {images.dtype} and {len(labels)} labels: "
            "give uint8 images (n, 28, 28), each with its label"
        )
    return images, labels.astype(np.int64)


def _torchvision(name: str, folder: Path, train: bool, download: bool = False) -> Arrays:
    import torchvision.datasets

    try:
        data = getattr(torchvision.datasets, name)(str(folder), train=train, download=download)
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"torchvision has no {name} in {folder} ({reason}): download it once where there is network, or give the "
            "folder that holds it with --data.init_args.data_dir (or DATA_DIR)"
        ) from error
    return np.asarray(data.data), np.asarray(data.targets, dtype=np.int64)


def _grey_set(name: str, torchvision_name: str, mirrored: bool) -> NamedSet:
    names = (name, torchvision_name)
    return NamedSet(partial(_grey, *names), partial(_download_grey, *names), mirrored)


NAMED_SETS = {
    "cifar10": NamedSet(_cifar10, _download_cifar10, mirrored=True),
    "fashion": _grey_set("fashion", "FashionMNIST", mirrored=True),
    "mnist": _grey_set("mnist", "MNIST", mirrored=False),
    "digits": NamedSet(_digits, white=16),
}
