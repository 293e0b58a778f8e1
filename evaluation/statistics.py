"""Features of the data that samples are compared with: mean, covariance and a subset, in one safetensors file."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.named import NAMED_SETS
from denoisers.generate import device_of
from evaluation.distances import FrechetTo, Gaussian, KernelTo, Manifold
from evaluation.extractors import DEFAULT_EXTRACTOR, Extractor, load_extractor
from evaluation.foreign import is_foreign, read_moments, write_moments
from evaluation.parts import Parts, evenly
from evaluation.sources import Pictures, find_pictures
from solvers.files import atomic_write, sha256
from solvers.progress import progress_bar

FORMAT_VERSION = 1
STATISTICS_NAME = "reference_statistics.safetensors"
SUBSET = 2000


@dataclass(frozen=True)
class DataStatistics:
    """What distances need to know of the data.

    Args:
        gaussian: mean, covariance and count of all features.
        features: (m, d) a fixed subset of them, for what is taken of pairs; none where only moments are known.
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

    @cached_property
    def wide_manifold(self) -> Manifold:
        """The same by the fifth neighbour, for density and coverage."""
        return Manifold(self.features, 5)

    @property
    def fingerprint(self) -> str:
        """Hash of the extractor and of the data."""
        return f"{self.extractor}-{self.data}"


def data_statistics(pictures: Pictures, extractor: Extractor, cache: str | Path) -> DataStatistics:
    """Statistics of pictures, computed once per data, extractor and preprocessing.

    Args:
        pictures: the data.
        extractor: the network; its device is used.
        cache: folder of the files, named by the two hashes.
    """
    path = Path(cache) / f"{extractor.fingerprint}-{data_hash(pictures)}.safetensors"
    if path.is_file():
        return load_statistics(path, extractor)
    found = compute_statistics(pictures, extractor)
    save_statistics(found, path)
    return found


def compute_statistics(pictures: Pictures, extractor: Extractor) -> DataStatistics:
    """Statistics of pictures, a block of them in memory at a time; the subset is spread evenly over them."""
    device, chosen = device_of(extractor), evenly(pictures.count, SUBSET)
    subset, digest = [], _digest(pictures)

    def features() -> Iterator[Tensor]:
        start = 0
        with progress_bar(desc="data statistics", unit="picture", total=pictures.count) as bar:
            for block in pictures:
                digest.update(block.contiguous().numpy())
                found = extractor(block.to(device).float() / 127.5 - 1)[0].cpu()
                subset.append(found[chosen[(chosen >= start) & (chosen < start + len(block))] - start])
                start += len(block)
                bar.update(len(block))
                yield found

    gaussian = Gaussian.of(Parts(features, pictures.count))
    # Rounded to what the file holds, so that computed and loaded statistics give the same distances.
    rounded = torch.cat(subset).half().float()
    return DataStatistics(gaussian, rounded, extractor.fingerprint, digest.hexdigest()[:16], pictures.description)


def data_hash(pictures: Pictures) -> str:
    """Hash of pictures, their shape and order."""
    digest = _digest(pictures)
    for block in pictures:
        digest.update(block.contiguous().numpy())
    return digest.hexdigest()[:16]


def _digest(pictures: Pictures) -> Any:
    return hashlib.sha256(str((pictures.count, *pictures.shape)).encode())


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
        raise ValueError(f"no data statistics at {path}: give a file, or a folder of pictures")
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
        source: a file of ours, moments of other programs (see `evaluation.foreign`), pictures (see
            `evaluation.sources`), or None: the file shipped beside the extractor.
        extractor: the extractor.
        extractor_name: its folder.
        cache: where statistics of pictures are kept.
    Returns:
        None when none were given and none are shipped.
    Raises:
        ValueError: see `load_statistics`, and a folder without pictures.
    """
    if source is None:
        shipped = Path(extractor_name) / STATISTICS_NAME
        return load_statistics(shipped, extractor) if shipped.is_file() else None
    if is_foreign(source, extractor.identity["name"]):
        gaussian = read_moments(source, extractor.identity["name"], extractor.num_features)
        return _of_moments(gaussian, Path(source), extractor, cache)
    if Path(source).is_dir() or Path(source).suffix == ".npz":
        return data_statistics(find_pictures(source), extractor, cache)
    return load_statistics(source, extractor)


def _of_moments(gaussian: Gaussian, path: Path, extractor: Extractor, cache: str | Path) -> DataStatistics:
    """Moments of a file, and the features of the pictures in it, where there are some."""
    try:
        features = data_statistics(find_pictures(path), extractor, cache).features
    except ValueError:
        features = torch.empty(0, len(gaussian.mean))
    return DataStatistics(gaussian, features, extractor.fingerprint, sha256(path)[:16], f"moments of {path.name}")


def describe(statistics: DataStatistics | None) -> dict[str, Any] | None:
    """For a report: what the distances refer to."""
    if statistics is None:
        return None
    count = statistics.gaussian.count
    return {"description": statistics.description, "images": count, "fingerprint": statistics.fingerprint}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the statistics of a data set beside a classifier's weights, where comparisons find them, or to a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("data_dir", help="folder of the data, or an .npz file of pictures")
    parser.add_argument("--source", choices=NAMED_SETS, help="default: shards, picture files or an .npz file")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which images of --source")
    parser.add_argument("--extractor", default=str(DEFAULT_EXTRACTOR), help="see evaluation/README.md")
    parser.add_argument("--description", default="", help="what the images are, for reports")
    parser.add_argument("--output", help="a file, as other programs read it where it ends in .npz")
    options = parser.parse_args(arguments)
    try:
        _write(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")


def _write(options: argparse.Namespace) -> None:
    if options.source is None:
        pictures = find_pictures(options.data_dir)
    else:
        images, _ = NAMED_SETS[options.source].load(Path(options.data_dir), options.split == "train")
        pictures = Pictures.of(torch.from_numpy(images))
    extractor = load_extractor(options.extractor)
    path = Path(options.output or Path(options.extractor.partition("@")[0]) / STATISTICS_NAME)
    if not options.output and not path.parent.is_dir():
        raise ValueError(f"{options.extractor} is no folder to keep statistics in: give a file with --output")
    found = compute_statistics(replace(pictures, description=options.description), extractor)
    if path.suffix == ".npz":
        write_moments(path, found.gaussian, extractor.identity["name"])
    else:
        save_statistics(found, path)


if __name__ == "__main__":
    main()
