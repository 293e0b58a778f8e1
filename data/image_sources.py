"""Where pictures with captions come from: webdataset shards, or a folder of files. One source becomes one shard."""

import hashlib
import json
import tarfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from data.captions import read_captions
from data.image_shards import split_name
from data.pictures import files_below, picture_extensions
from solvers.errors import one_line

Files = dict[str, bytes]  # content by extension
TEXTS = ("txt", "json")


@dataclass
class LeftOut:
    """What cannot be used of a source.

    Args:
        notes: one for each sample, and for a shard that is cut off.
        is_cut: whether it is not known how many samples are lost.
    """

    notes: list[str] = field(default_factory=list)
    is_cut: bool = False

    def note(self, text: str) -> None:
        """One more, in one line; of a name that is no text the odd bytes by their codes."""
        self.notes.append(one_line(text.encode("utf-8", "backslashreplace").decode()))


@dataclass(frozen=True)
class SeedSource:
    """What becomes one shard.

    Args:
        name: of the shard.
        seeds: of its samples.
    """

    name: str
    seeds: Sequence[int]

    @property
    def identity(self) -> str:
        """What tells a changed source from this one."""
        return f"seeds {self.seeds[0]} to {self.seeds[-1]}"


class Source(ABC):
    """Samples in a fixed order."""

    name: str

    @property
    @abstractmethod
    def identity(self) -> int | str:
        """What tells a changed source from this one; JSON types."""

    @abstractmethod
    def samples(self, left_out: LeftOut) -> Iterator[tuple[str, Files]]:
        """Key and files of each sample."""

    @abstractmethod
    def share(self, samples: int, read: int) -> float:
        """How much of it that many samples and bytes are, about; 1 is all."""


class ShardSource(Source):
    """A webdataset shard, .tar or .tar.gz."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.size = path, path.name.partition(".")[0], path.stat().st_size

    @property
    def identity(self) -> int:
        """Its size."""
        return self.size

    def samples(self, left_out: LeftOut) -> Iterator[tuple[str, Files]]:
        """Neighbouring files of one name are a sample, as webdataset groups them; hidden files are not seen."""
        try:
            with tarfile.open(self.path) as archive:
                files = (member for member in archive if member.isfile() and not _is_hidden(member.name))
                for key, members in groupby(files, key=lambda member: split_name(member.name)[0]):
                    yield key, {split_name(one.name)[1]: archive.extractfile(one).read() for one in members}  # type: ignore
                _check_end(archive)
        except Exception as error:  # each compression raises its own
            left_out.note(f"shard {self.path.name} is corrupt ({one_line(str(error), 150)}): what came before is kept")
            left_out.is_cut = True

    def share(self, samples: int, read: int) -> float:
        """By bytes."""
        return min(1.0, read / max(self.size, 1))


class FolderSource(Source):
    """Some files of a folder.

    Args:
        name: of the shard.
        folder: where they lie.
        files: paths below it, by key and extension.
        captions: by path below it; they go before those beside the pictures.
    """

    def __init__(
        self, name: str, folder: Path, files: Mapping[str, Mapping[str, str]], captions: Mapping[str, str]
    ) -> None:
        self.name, self.folder, self.files, self.captions = name, folder, files, captions

    @property
    def identity(self) -> str:
        """Hash of their names, sizes and captions in the table."""
        names = [path for files in self.files.values() for path in files.values()]
        listed = [(path, _size(self.folder / path), self.captions.get(path)) for path in names]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def samples(self, left_out: LeftOut) -> Iterator[tuple[str, Files]]:
        """Files of one name beside each other are a sample."""
        for key, paths in self.files.items():
            caption = next((self.captions[path] for path in paths.values() if path in self.captions), None)
            try:
                files = {extension: (self.folder / path).read_bytes() for extension, path in paths.items()}
            except OSError as error:
                left_out.note(f"sample {key}: {error}")
                continue
            yield key, files if caption is None else {**files, "txt": caption.encode("utf-8", "surrogatepass")}

    def share(self, samples: int, read: int) -> float:
        """By samples."""
        return samples / len(self.files)


def find_sources(images: str | Path, pattern: str, captions: str | None = None, shard_size: int = 1000) -> list[Source]:
    """The shards of a folder, else its files, and those in folders below, `shard_size` of them to a shard.

    Args:
        images: the folder.
        pattern: of shards.
        captions: a table of captions of files, see `read_captions`.
        shard_size: samples of files that make a shard.
    Raises:
        ValueError: neither is there, captions for shards, or a table that cannot be read or is of other pictures.
    """
    folder = Path(images)
    if paths := sorted(folder.glob(pattern)):
        if captions is not None:
            raise ValueError(f"{folder} holds shards, whose captions are in them: give no table of captions")
        return [ShardSource(path) for path in paths]
    files, table = list(_grouped(folder)), read_captions(captions) if captions is not None else {}
    if not files:
        raise ValueError(f"no image-text shards {pattern} and no files in {folder}: give the folder that holds them")
    if table and not any(path in table for _, paths in files for path in paths.values()):
        raise ValueError(
            f"{captions} names {next(iter(table))} and no picture of {folder}: give paths below that folder"
        )
    parts = (dict(files[start : start + shard_size]) for start in range(0, len(files), shard_size))
    return [FolderSource(f"shard-{number:05d}", folder, part, table) for number, part in enumerate(parts)]


def _grouped(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Key of each picture below a folder, and paths by extension of it and of the texts of its name, in order."""
    pictures, texts = defaultdict[str, list[Path]](list), defaultdict[str, dict[str, str]](dict)
    for path in files_below(folder):
        name, extension = path.relative_to(folder), path.suffix[1:].lower()
        key = name.with_suffix("").as_posix()
        if extension in picture_extensions():
            pictures[key].append(name)
        elif extension in TEXTS:
            texts[key][extension] = name.as_posix()
    for key, names in sorted(pictures.items()):
        for name in names:  # those that differ in their kind alone have it in their key
            files = {name.suffix[1:].lower(): name.as_posix()} | texts.get(key, {})
            yield key if len(names) == 1 else name.as_posix(), files


def _is_hidden(name: str) -> bool:
    """Such as ._NAME.jpg, which macOS packs before each NAME.jpg."""
    return name.rpartition("/")[2].startswith(".")


def _size(path: Path) -> int | None:
    """None where there is nothing behind a link."""
    return path.stat().st_size if path.exists() else None


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end: a whole archive ends in a block of zeros."""
    archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # type: ignore[union-attr]
        raise tarfile.ReadError("it is cut off, or damaged in a header")
