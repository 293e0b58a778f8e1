"""Samples in a folder: made block by block, gone on with after an interruption, written as evaluators read them."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from data.shards import add_member
from denoisers.generate import as_images, device_of, image_shape
from evaluation.blocks import read_count, read_tensors, write_tensors
from evaluation.pictures import to_uint8
from solvers.files import atomic_write

FORMATS = ("npz", "adm", "png", "webdataset")


@dataclass(frozen=True, eq=False)
class SampleFolder:
    """Samples on their way to a file.

    Args:
        folder: where they go.
        kind: of FORMATS: `npz`, `samples` as the model makes them, float32; `adm`, uint8 pictures `arr_0`, (n, height,
            width, 3); `png`, a file each; `webdataset`, shards of NAME.png.
        denoiser: makes pictures of states.
        seeds: of the samples.
        key: tells these samples from others; blocks of the same key are kept when a run is broken off.
        size: samples in a block.
    Raises:
        ValueError: pictures of samples that are none.
    """

    folder: Path
    kind: str
    denoiser: Any
    seeds: Sequence[int]
    key: str
    size: int

    def __post_init__(self) -> None:
        shape = image_shape(self.denoiser)
        if self.kind != "npz" and not (len(shape) == 3 and shape[0] in (1, 3)):
            raise ValueError(f"{self.kind} holds pictures, and this model makes {shape}: use --format npz")
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def blocks(self) -> list[range]:
        """Offsets of the samples, block by block."""
        count = len(self.seeds)
        return [range(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def missing(self, blocks: Sequence[range]) -> list[range]:
        """Those of some blocks that are still to be made."""
        return [block for block in blocks if read_count(self._path(block), "samples") < len(block)]

    def keep(self, block: range, samples: Tensor) -> None:
        """Keep a block until all are there."""
        write_tensors(self._path(block), {"samples": samples})

    def kept(self) -> str:
        """What is there if the run is broken off."""
        count = sum(read_count(self._path(block), "samples") for block in self.blocks)
        made = f"{count} of {len(self.seeds)} samples stay in {self.folder}; run the same command again to go on"
        return made if count else "nothing was written"

    def first(self, count: int) -> Tensor:
        """The first samples."""
        found: list[Tensor] = []
        for samples in self._samples():
            found.append(samples)
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def finish(self) -> Path:
        """Write what was asked for, a block in memory at a time, and drop the blocks; returns the file or folder."""
        path = _WRITERS[self.kind](self)
        for block in self.blocks:
            self._path(block).unlink()
        self._path(range(1)).parent.rmdir()
        return path

    def pictures(self) -> Iterator[np.ndarray]:
        """Blocks of pictures, (n, height, width, 3) bytes."""
        device = device_of(self.denoiser)
        return (to_uint8(as_images(self.denoiser, samples.to(device))) for samples in self._samples())

    def _samples(self) -> Iterator[Tensor]:
        return (read_tensors(self._path(block))["samples"] for block in self.blocks)

    def _path(self, block: range) -> Path:
        return self.folder / f".samples-{self.key}-{self.size}" / f"{block.start:09d}.safetensors"


def _npz(target: SampleFolder) -> Path:
    shape = (len(target.seeds), *target.denoiser.sample_shape)
    parts = (samples.numpy() for samples in target._samples())
    return _stream(target.folder / "samples.npz", "samples", shape, np.dtype(np.float32), parts)


def _adm(target: SampleFolder) -> Path:
    height, width = image_shape(target.denoiser)[1:]
    shape = (len(target.seeds), height, width, 3)
    return _stream(target.folder / "samples.npz", "arr_0", shape, np.dtype(np.uint8), target.pictures())


def _stream(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterator[np.ndarray]) -> Path:
    """An npz file of one array, written part by part."""
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as file,
    ):
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())
    return path


def _png(target: SampleFolder) -> Path:
    for block, pictures in zip(target.blocks, target.pictures()):
        for seed, picture in zip(target.seeds[block.start : block.stop], pictures):
            with atomic_write(target.folder / "images" / f"{seed:010d}.png") as path:
                path.write_bytes(_encoded(picture))
    return target.folder / "images"


def _webdataset(target: SampleFolder) -> Path:
    for number, (block, pictures) in enumerate(zip(target.blocks, target.pictures())):
        path = target.folder / f"samples-{number:05d}.tar"
        with atomic_write(path) as temporary, tarfile.open(temporary, "w") as archive:
            for seed, picture in zip(target.seeds[block.start : block.stop], pictures):
                add_member(archive, f"{seed:010d}.png", _encoded(picture))
    return target.folder


def _encoded(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "png")
    return content.getvalue()


_WRITERS: dict[str, Callable[[SampleFolder], Path]] = {
    "npz": _npz,
    "adm": _adm,
    "png": _png,
    "webdataset": _webdataset,
}
