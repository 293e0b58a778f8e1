"""Features of the data that samples are compared with: mean, covariance and a subset, in one safetensors file."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from data.image_shards import read_shards
from data.named import NAMED_SETS
from denoisers.generate import device_of
from evaluation.distances import FrechetTo, Gaussian, KernelTo, Manifold
from evaluation.extractors import DEFAULT_EXTRACTOR, Extractor, load_extractor
from solvers.files import atomic_write

FORMAT_VERSION = 1
STATISTICS_NAME = "reference_statistics.safetensors"
SUBSET = 2000


@dataclass(frozen=True)
class DataStatistics:
    """What distances need to know of the data.

    Args:
        gaussian: mean, covariance and count of all features.
        features: (m, d) a fixed subset of them, for kernel distance, precision and recall.
        extractor: fingerprint of the extractor.
        data: hash of the images.
        description: what the images are.
    """

    gaussian: Gaussian
    features: Tensor
    extractor: str
    data: str
    description: str = ""

    @cached_property
    def frechet(self) -> FrechetTo:
        """Distances to the data, its covariance's root taken once."""
        return FrechetTo(self.gaussian)

    @cached_property
    def kernel(self) -> KernelTo:
        """Kernel distances to the subset."""
        return KernelTo(self.features)

    @cached_property
    def manifold(self) -> Manifold:
        """The subset's manifold."""
        return Manifold(self.features)

    @property
    def fingerprint(self) -> str:
        """Hash of the extractor and of the data."""
        return f"{self.extractor}-{self.data}"


def data_statistics(images: Tensor, extractor: Extractor, cache: str | Path, description: str = "") -> DataStatistics:
    """Statistics of images, computed once per data, extractor and preprocessing.

    Args:
        images: uint8 (n, channels, height, width), as saved pictures.
        extractor: the network; its device is used.
        cache: folder of the files, named by the two hashes.
        description: kept in the file.
    """
    path = Path(cache) / f"{extractor.fingerprint}-{data_hash(images)}.safetensors"
    if path.is_file():
        return load_statistics(path, extractor)
    found = compute_statistics(images, extractor, description)
    save_statistics(found, path)
    return found


def compute_statistics(
    images: Tensor, extractor: Extractor, description: str = "", batch_size: int = 250
) -> DataStatistics:
    """Statistics of uint8 images (n, channels, height, width); the subset is spread evenly over them.

    Raises:
        ValueError: images that are not uint8, or too few of them for a covariance.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"reference images are {images.dtype}: give uint8 pictures")
    bar = tqdm(images.split(batch_size), desc="data statistics", unit="batch", disable=None)
    device = device_of(extractor)
    features = torch.cat([extractor(part.to(device).float() / 127.5 - 1)[0].cpu() for part in bar])
    chosen = torch.linspace(0, len(features) - 1, min(SUBSET, len(features))).round().long()
    # Rounded to what the file holds, so that computed and loaded statistics give the same distances.
    subset = features[chosen].half().float()
    return DataStatistics(Gaussian.of(features), subset, extractor.fingerprint, data_hash(images), description)


def data_hash(images: Tensor) -> str:
    """Hash of uint8 images, their shape and order."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy())
    return digest.hexdigest()[:16]


def save_statistics(statistics: DataStatistics, path: str | Path) -> None:
    """Write the file: mean and covariance in float64, the subset in float16."""
    tensors = {
        "mean": statistics.gaussian.mean,
        "covariance": statistics.gaussian.covariance,
        "features": statistics.features.half(),
    }
    metadata = {
        "format_version": FORMAT_VERSION,
        "count": statistics.gaussian.count,
        "extractor": statistics.extractor,
        "data": statistics.data,
        "description": statistics.description,
    }
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={key: str(value) for key, value in metadata.items()})


def load_statistics(path: str | Path, extractor: Extractor | None = None) -> DataStatistics:
    """Read a statistics file.

    Args:
        path: the file.
        extractor: the extractor its distances will be measured with.
    Raises:
        ValueError: missing, damaged, of another version, or made with another extractor.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data statistics at {path}: give a file, or a folder of image shards")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["format_version"] != str(FORMAT_VERSION):
            raise ValueError(f"format_version is {metadata['format_version']}, this project reads {FORMAT_VERSION}")
        gaussian = Gaussian(tensors["mean"], tensors["covariance"], int(metadata["count"]))
        found = (metadata["extractor"], metadata["data"], metadata["description"])
        statistics = DataStatistics(gaussian, tensors["features"].float(), *found)
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a file of data statistics ({error}): make it again") from error
    if extractor is not None and statistics.extractor != extractor.fingerprint:
        raise ValueError(
            f"the data statistics {path} are of the extractor {statistics.extractor}, but the samples would go "
            f"through {extractor.identity['name']} ({extractor.fingerprint}): distances between different feature "
            "spaces mean nothing; give statistics of the same extractor, or a folder of images to compute them from"
        )
    return statistics


def find_statistics(
    source: str | None,
    extractor: Extractor,
    extractor_name: str | Path = DEFAULT_EXTRACTOR,
    cache: str | Path = "runs/cache",
) -> DataStatistics | None:
    """The statistics a user means.

    Args:
        source: a file, a folder of webdataset shards (its training shards are used), or None: the file shipped beside
            the extractor.
        extractor: the extractor.
        extractor_name: its folder.
        cache: where statistics of a folder of images are kept.
    Returns:
        None when none were given and none are shipped.
    Raises:
        ValueError: see `load_statistics`, and a folder without shards.
    """
    if source is None:
        shipped = Path(extractor_name) / STATISTICS_NAME
        return load_statistics(shipped, extractor) if shipped.is_file() else None
    if not Path(source).is_dir():
        return load_statistics(source, extractor)
    if not any(Path(source).glob("*train*.tar*")):
        raise ValueError(f"{source} has no image shards *train*.tar: give a folder of them, or a statistics file")
    images, _ = read_shards(source, "*train*.tar*")
    return data_statistics(torch.from_numpy(images), extractor, cache, f"training shards of {Path(source).name}")


def describe(statistics: DataStatistics | None) -> dict[str, Any] | None:
    """For a report: what the distances refer to."""
    if statistics is None:
        return None
    count = statistics.gaussian.count
    return {"description": statistics.description, "images": count, "fingerprint": statistics.fingerprint}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the statistics of a data set beside a classifier's weights, where comparisons find them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("data_dir", help="folder of the data")
    parser.add_argument("--source", choices=NAMED_SETS, help="default: webdataset shards")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which of its images")
    parser.add_argument("--extractor", default=str(DEFAULT_EXTRACTOR), help="folder of a classifier")
    parser.add_argument("--description", default="", help="what the images are, for reports")
    options = parser.parse_args(arguments)
    if options.source is None:
        images, _ = read_shards(options.data_dir, f"*{options.split}*.tar*")
    else:
        images, _ = NAMED_SETS[options.source].load(Path(options.data_dir), options.split == "train")
    found = compute_statistics(torch.from_numpy(images), load_extractor(options.extractor), options.description)
    save_statistics(found, Path(options.extractor) / STATISTICS_NAME)


if __name__ == "__main__":
    main()
