"""Webdataset shards of images with labels, NAME.jpg (any picture, or .npy for latents) and NAME.cls: into memory."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import read_record
from data.pictures import decode_picture, picture_extensions
from solvers.text import decode_text

MANIFEST_NAME = "samples.json"  # beside shards that a teacher made


def read_array(content: bytes) -> np.ndarray:
    """A .npy file's array; pickled objects are refused."""
    return np.load(io.BytesIO(content), allow_pickle=False)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a file in a shard: the extension begins at the first dot of the last part of the path."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def read_shards(folder: str | Path, pattern: str, arrays: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Decode all images of the webdataset shards that match, in the order of their names.

    Args:
        folder: where the shards are, .tar or .tar.gz.
        pattern: glob pattern of their names.
        arrays: also read .npy files, of latents.
    Returns:
        (images (n, channels, height, width), uint8 where they were pictures, labels int64 (n,)); pictures have three
        channels as soon as one of them has colour.
    Raises:
        ValueError: no shard matches, or a shard does not hold equally sized images with their .cls labels.
    """
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        raise ValueError(
            f"no image shards {pattern} in {Path(folder)}: give the folder that holds them with "
            "--data.init_args.data_dir (or DATA_DIR), or use --data.init_args.source cifar10 to download CIFAR-10"
        )
    samples = [sample for path in paths for sample in _read_shard(path, arrays)]
    channels = max(len(image) for image, _ in samples)
    images = [np.repeat(image, channels, axis=0) if len(image) == 1 else image for image, _ in samples]
    if len({image.shape for image in images}) != 1:
        raise ValueError(
            f"the images of {folder}/{pattern} differ in size: crop them to one size when writing the shards"
        )
    return np.stack(images), np.array([label for _, label in samples], dtype=np.int64)


def describe_samples(folder: str | Path) -> dict[str, Any]:
    """What an artifact says about shards: their folder, and the teacher and seeds they were sampled from, if any."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return {"data": f"shards {Path(folder).name}"}
    record = read_record(path, "sample the images again")
    return {
        "data": f"images {Path(folder).name}, sampled from the model with {record['solver']}",
        "seeds": record["seeds"],
    }


def _read_shard(path: Path, arrays: bool) -> list[tuple[np.ndarray, int]]:
    images: dict[str, np.ndarray] = {}
    labels: dict[str, int] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, extension = split_name(member.name)
            try:
                if extension in picture_extensions():
                    images[key] = decode_picture(_content(archive, member))
                elif arrays and extension == "npy":
                    images[key] = read_array(_content(archive, member))
                elif extension == "cls":
                    labels[key] = int(decode_text(_content(archive, member)))
            except ValueError as error:
                raise ValueError(f"{member.name} in {path}: {error}") from error
    if not images or images.keys() != labels.keys():
        raise ValueError(
            f"{path}: {len(images)} images and {len(labels)} .cls labels, each image needs one of the same key"
        )
    return [(images[key], labels[key]) for key in images]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return archive.extractfile(member).read()  # type: ignore[union-attr]
