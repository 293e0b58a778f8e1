"""Webdataset shards of pictures with captions, NAME.jpg (any picture) and NAME.txt, in batches; damage is named."""

import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.image_shards import split_name
from data.pictures import cover, picture_extensions, read_picture
from solvers.text import decode_text

Files = dict[str, bytes]  # content by extension


class Damage:
    """What happens to corrupt samples and shards: an error, or a note of what was left out.

    Args:
        skip: leave them out.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.notes: list[str] = []

    def report(self, message: str) -> None:
        """Take a note, or raise ValueError where nothing is to be skipped."""
        if not self.skip:
            raise ValueError(f"{message}; repair it, or leave such samples out with skip_corrupt: true")
        self.notes.append(message)


@dataclass(frozen=True)
class ImageTextBatch:
    """Pictures with captions.

    Args:
        keys: names of the samples in their shard.
        images: uint8 (batch, 3, height, width).
        captions: one each.
    """

    keys: list[str]
    images: Tensor
    captions: list[str]


def read_image_text(
    path: Path, size: tuple[int, int], batch_size: int, damage: Damage, workers: int = 4
) -> Iterator[ImageTextBatch]:
    """Samples of a shard in order; threads decode a batch while the caller works on the one before.

    Args:
        path: the shard, .tar or .tar.gz.
        size: height and width; pictures are resized to cover it, and their centre is cut out.
        batch_size: samples in a batch; the last one, and one that lost corrupt samples, may be smaller.
        damage: what to do about corrupt samples.
        workers: threads that decode.
    Raises:
        ValueError: a corrupt shard or sample, unless `damage` skips them.
    """
    samples = read_samples(path, damage)
    ahead: list[tuple[str, Future]] = []
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(samples, batch_size)):
            decoding = [(key, pool.submit(decode, files, size)) for key, files in group]
            yield from _collect(path, ahead, damage)
            ahead = decoding
        yield from _collect(path, ahead, damage)


def read_samples(path: Path, damage: Damage) -> Iterator[tuple[str, Files]]:
    """Key and files of each sample of a shard: neighbouring files of one name, as webdataset groups them."""
    try:
        with tarfile.open(path) as archive:
            files = (member for member in archive if member.isfile())
            for key, members in groupby(files, key=lambda member: split_name(member.name)[0]):
                yield key, {split_name(one.name)[1]: archive.extractfile(one).read() for one in members}  # type: ignore
            _check_end(archive)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        damage.report(f"shard {path} is corrupt ({error})")


def decode(files: Files, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A sample's picture, uint8 (3, height, width), and caption.

    Raises:
        ValueError: it has no picture or caption.
    """
    extension = next((name for name in picture_extensions() if name in files), None)
    if extension is None or "txt" not in files:
        missing = "caption (.txt)" if extension else "picture (.jpg, .png, ...)"
        raise ValueError(f"it has no {missing}, only {', '.join(files)}")
    return cover(read_picture(files[extension]), size), decode_text(files["txt"]).strip()


def _collect(path: Path, decoding: list[tuple[str, Future]], damage: Damage) -> Iterator[ImageTextBatch]:
    """At most one batch: of the samples that can be decoded."""
    found = []
    for key, future in decoding:
        error = future.exception()  # of any kind: decoders of pictures raise what they like
        if error is None:
            found.append((key, *future.result()))
        else:
            damage.report(f"sample {key} of shard {path} is corrupt: {error}")
    if found:
        keys, images, captions = zip(*found)
        yield ImageTextBatch(list(keys), torch.from_numpy(np.stack(images)), list(captions))


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end: a whole archive ends in a block of zeros."""
    archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # type: ignore[union-attr]
        raise tarfile.ReadError("it is cut off, or damaged in a header")
