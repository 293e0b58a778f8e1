"""Pictures with captions in batches, decoded ahead by threads; what cannot be used is noted, and the rest goes on."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data.image_sources import Files, LeftOut, Source
from data.pictures import cover, picture_extensions, read_picture
from solvers.errors import one_line
from solvers.text import decode_text

LONGEST_KEY = 88  # bytes, so that the header of its file in a shard is one block
Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageTextBatch:
    """Pictures with captions.

    Args:
        keys: names of the samples in their source.
        images: uint8 (batch, 3, height, width).
        captions: one each.
        share: of the source, so far.
    """

    keys: list[str]
    images: Tensor
    captions: list[str]
    share: float


def read_image_text(
    source: Source, size: tuple[int, int], batch_size: int, left_out: LeftOut, workers: int = 4
) -> Iterator[ImageTextBatch]:
    """Samples of a source in order; threads read and decode a batch while the caller works on the one before.

    Args:
        source: see `find_sources`.
        size: height and width; pictures are resized to cover it, and their centre is cut out.
        batch_size: samples in a batch; the last one, and one with samples that are left out, may be smaller.
        left_out: gets what cannot be used.
        workers: threads that decode.
    """
    return ahead(_batches(source, size, batch_size, left_out, workers))


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Each item is made while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def decode(key: str, files: Files, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A sample's picture, uint8 (3, height, width), and caption: NAME.txt, or `caption` in NAME.json.

    Raises:
        ValueError: it has no picture or caption, or they cannot be read, or the name is too long to be stored.
    """
    extension = next((name for name in picture_extensions() if name in files), None)
    if extension is None:
        raise ValueError(f"it has no picture (.jpg, .png, ...), only {', '.join(files)}")
    if len(key.encode("utf-8", "surrogateescape")) > LONGEST_KEY:
        raise ValueError(f"its name is longer than {LONGEST_KEY} bytes")
    return cover(read_picture(files[extension]), size), _caption(files).strip()


def _caption(files: Files) -> str:
    if "txt" in files:
        return decode_text(files["txt"])
    told = json.loads(decode_text(files["json"])) if "json" in files else None
    caption = told.get("caption") if isinstance(told, dict) else None
    if not isinstance(caption, str):
        raise ValueError(f"it has no caption (.txt, or caption in .json), only {', '.join(files)}")
    return decode_text(caption.encode("utf-8", "surrogatepass"))  # which refuses half a letter


def _batches(
    source: Source, size: tuple[int, int], batch_size: int, left_out: LeftOut, workers: int
) -> Iterator[ImageTextBatch]:
    samples, read, count = source.samples(left_out), 0, 0
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(samples, batch_size)):
            decoding = [(key, pool.submit(decode, key, files, size)) for key, files in group]
            read += sum(len(content) for _, files in group for content in files.values())
            count += len(group)
            if found := _usable(decoding, left_out):
                keys, images, captions = zip(*found)
                pixels = torch.from_numpy(np.stack(images))
                yield ImageTextBatch(list(keys), pixels, list(captions), source.share(count, read))


def _usable(decoding: list[tuple[str, Future]], left_out: LeftOut) -> list[tuple[str, np.ndarray, str]]:
    found = []
    for key, future in decoding:
        try:
            found.append((key, *future.result()))
        except Exception as error:  # whatever a file makes a decoder raise
            left_out.note(f"sample {key}: {one_line(str(error), 150) or type(error).__name__}")
    return found
