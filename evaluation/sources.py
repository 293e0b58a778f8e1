"""Pictures on disk, read block by block: folders of files, webdataset shards, npz files."""

import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from data.image_shards import split_name
from data.pictures import decode_picture, picture_extensions, picture_paths

BLOCK = 128  # pictures in memory
Reader = tuple[str, Callable[[], bytes]]  # a picture's name, and what reads its file


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size.

    Args:
        count: how many.
        read: those of a range, uint8 (n, channels, height, width); cheapest in rising order.
        description: what they are.
    """

    count: int
    read: Callable[[range], Tensor]
    description: str

    @classmethod
    def of(cls, images: Tensor, description: str = "") -> "Pictures":
        """Pictures in memory.

        Raises:
            ValueError: images that are not uint8.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"reference images are {images.dtype}: give uint8 pictures")
        return cls(len(images), lambda chosen: images[chosen.start : chosen.stop], description)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture."""
        return tuple(self.read(range(1)).shape[1:])

    def __iter__(self) -> Iterator[Tensor]:
        """Block by block."""
        return (self.read(range(start, min(start + BLOCK, self.count))) for start in range(0, self.count, BLOCK))


def find_pictures(path: str | Path) -> Pictures:
    """The pictures of a path.

    Args:
        path: an npz file, of `arr_0`, uint8 (n, height, width, 3), or of `samples`, float32 in [-1, 1] (n, channels,
            height, width); or a folder: of what `sample.py generate` wrote, of webdataset shards (where some are called
            train, of those), or of picture files.
    Raises:
        ValueError: no pictures there, or not all of one size.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _npz(path)
    if (path / "samples.npz").is_file():
        return _npz(path / "samples.npz")
    shards = sorted(path.glob("*train*.tar*")) or sorted(path.glob("*.tar*"))
    if shards:
        called = "training shards" if "train" in shards[0].name else "shards"
        return _files(_members(shards), f"{called} of {path.name}")
    folder = path / "images" if (path / "images").is_dir() else path
    files = list(picture_paths(folder))
    if not files:
        raise ValueError(f"{path} has no pictures: give a folder of picture files or of shards (.tar), or an .npz file")
    return _files([(str(file), file.read_bytes) for file in files], f"pictures of {path.name}")


def _files(readers: Sequence[Reader], description: str) -> Pictures:
    sizes: set[tuple[int, ...]] = set()  # of all that were read

    def read(chosen: range) -> Tensor:
        pictures = [_decode(*readers[index]) for index in chosen]
        channels = max(map(len, pictures))
        pictures = [picture.expand(channels, -1, -1) for picture in pictures]
        sizes.update(tuple(picture.shape[1:]) for picture in pictures)
        if len(sizes) > 1:
            raise ValueError(f"{description} differ in size ({', '.join(map(str, sorted(sizes)))}): crop them to one")
        return torch.stack(pictures)

    return Pictures(len(readers), read, description)


def _decode(name: str, read: Callable[[], bytes]) -> Tensor:
    try:
        return torch.from_numpy(np.array(decode_picture(read())))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _members(shards: Sequence[Path]) -> list[Reader]:
    readers: list[Reader] = []
    for shard in shards:
        archive = tarfile.open(shard)  # noqa: SIM115  (read from as long as the pictures are)
        readers += [
            (f"{member.name} in {shard}", lambda archive=archive, member=member: archive.extractfile(member).read())
            for member in archive
            if split_name(member.name)[1] in picture_extensions()
        ]
    return readers


def _npz(path: Path) -> Pictures:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): give an .npz file of pictures") from error
    names = {Path(name).stem for name in archive.namelist()}
    if not names & {"arr_0", "samples"}:
        raise ValueError(f"{path} holds {', '.join(sorted(names))} and no pictures: they are called arr_0 or samples")
    name = "arr_0" if "arr_0" in names else "samples"
    file = archive.open(f"{name}.npy")
    npy.read_magic(file)
    shape, is_fortran, dtype = npy.read_array_header_1_0(file)
    channels, wanted = (shape[-1], np.uint8) if name == "arr_0" else (shape[1], np.float32)
    if len(shape) != 4 or channels not in (1, 3) or dtype != wanted or is_fortran:
        raise ValueError(
            f"{name} of {path} is {dtype} {shape}: pictures have 1 or 3 channels (--format adm makes them)"
        )
    begin, size = file.tell(), int(np.prod(shape[1:])) * dtype.itemsize

    def read(chosen: range) -> Tensor:
        file.seek(begin + chosen.start * size)
        rows = np.frombuffer(file.read(len(chosen) * size), dtype).reshape(len(chosen), *shape[1:])
        if name == "arr_0":
            return torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())
        return ((torch.from_numpy(rows.copy()).clamp(-1, 1) + 1) * 127.5).round().byte()

    return Pictures(shape[0], read, f"pictures of {path.name}")
