"""Shards of latents with text embeddings: written once, mapped into memory, read by indexing.

A shard is a webdataset tar of equally long files NAME.safetensors, so each tensor of all its samples is one strided
view of the mapped file: a batch is read by indexing, without decoding. A folder also holds the embeddings of the empty
prompt (`unconditional.safetensors`), `manifest.json` (encoders, shapes, and the checksum of every shard) and
`skipped.txt`, which names what was left out.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from data.image_sources import LeftOut
from data.manifest import MANIFEST_NAME, parse_manifest
from data.shards import add_member, check_shard, flatten_condition, record_path, unflatten_condition
from solvers.conditions import map_condition
from solvers.files import atomic_write, sha256

MAKE = "python train.py predict --config configs/encode/..."
AGAIN = f"encode again with `{MAKE}`"
FIELDS = ("encoded", "complete", "shards")
NULL_NAME, SKIPPED_NAME = "unconditional.safetensors", "skipped.txt"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32}


@dataclass(frozen=True)
class LatentSamples:
    """Latents with the conditions of their captions, on the CPU, in the dtype they are stored in.

    Args:
        keys: names of the samples.
        latents: (n, *shape).
        condition: of the denoiser, without the null prompt.
    """

    keys: list[str]
    latents: Tensor
    condition: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in a file."""
        return {"latents": self.latents, **flatten_condition("condition", self.condition)}


def stored(value: Any, dtype: torch.dtype) -> Any:
    """A condition, or one tensor, on the CPU in the dtype of shards; integers stay what they are."""
    return map_condition(lambda one: one.to("cpu", dtype) if one.is_floating_point() else one.cpu(), value)


@contextmanager
def latent_file(path: Path, left_out: LeftOut) -> Iterator[Callable[[LatentSamples], None]]:
    """A shard that is written whole or not at all, and beside it first a JSON record with checksum and layout.

    Args:
        path: of the shard.
        left_out: what the record names of the shard's source.
    Returns:
        What appends samples.
    """
    count = 0

    def append(samples: LatentSamples) -> None:
        nonlocal count
        tensors = samples.tensors()
        for index, key in enumerate(samples.keys):
            content = save({name: value[index].contiguous() for name, value in tensors.items()})
            add_member(archive, f"{key}.safetensors", content)
        count += len(samples.keys)

    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:  # every header is one block
            yield append
        record = {
            "sha256": sha256(temporary),
            "bytes": temporary.stat().st_size,
            "samples": count,
            "skipped": len(left_out.notes) - left_out.is_cut,
            "is_cut": left_out.is_cut,
            "notes": left_out.notes,
        }
        with atomic_write(record_path(path)) as beside:
            beside.write_text(json.dumps(record) + "\n")


def map_latents(path: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of all samples of a shard, (n, ...), read from the disk where it is indexed."""
    with open(path, "rb") as file:
        member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    first = tarfile.BLOCKSIZE + 8 + length
    blocks = -(-member.size // tarfile.BLOCKSIZE)
    stride = tarfile.BLOCKSIZE * (1 + blocks)
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=record["bytes"])
    views = {}
    for name, entry in header.items():
        dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
        offset, step = (first + entry["data_offsets"][0]) // dtype.itemsize, stride // dtype.itemsize
        strides = (step, *torch.empty(shape, device="meta").stride())
        views[name] = torch.empty(0, dtype=dtype).set_(storage, offset, (record["samples"], *shape), strides)  # type: ignore
    return views


class LatentShards:
    """The shards of a folder, as samples 0 .. len - 1.

    Args:
        folder: written by `train.py predict --config configs/encode/...`.
        skip_corrupt: leave out shards that are missing, damaged or of another size; `notes` says which.
    Raises:
        ValueError: no complete set of shards is there, one of them is missing or has another size, or the embeddings
            are missing.
    """

    def __init__(self, folder: str | Path, skip_corrupt: bool = False) -> None:
        self.folder, self.skip_corrupt = Path(folder), skip_corrupt
        self.manifest = _read_manifest(self.folder)
        self.notes: list[str] = []
        self.records: dict[str, dict[str, Any]] = dict(self.manifest["shards"])
        for name, record in self.manifest["shards"].items():
            self._try(name, lambda name=name, record=record: _check_size(self.folder / name, record))
        self._check_embeddings()
        self._index()

    def verify(self, rank: int = 0, world_size: int = 1) -> list[str]:
        """Compare this process's share of the shards with their checksums; returns the names of damaged ones.

        Raises:
            ValueError: one is damaged, unless corrupt shards are skipped.
        """
        before = set(self.records)
        for name in list(self.records)[rank::world_size]:
            self._try(name, lambda name=name: check_shard(self.folder / name, self.records[name], AGAIN))
        return sorted(before - set(self.records))

    def leave_out(self, names: Sequence[str]) -> None:
        """Drop shards, which other processes found damaged."""
        self.records = {name: record for name, record in self.records.items() if name not in names}
        self._index()

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample's latents."""
        return tuple(self.manifest["encoded"]["sample_shape"])

    @cached_property
    def null(self) -> Any:
        """The condition of the empty prompt, (1, ...)."""
        return map_condition(_float32, unflatten_condition("condition", load_file(self.folder / NULL_NAME)))

    def check(self, denoiser: Any) -> None:
        """Make sure that these are latents and embeddings of a denoiser's autoencoder and text encoders.

        A denoiser that was not loaded from a pipeline's folder knows no encoders: only shapes are compared then.

        Raises:
            ValueError: latents of another shape, embeddings that the network does not take, other encoders, or
                prompts encoded with other options.
        """
        if self.sample_shape != tuple(denoiser.sample_shape):
            raise ValueError(
                f"{self.folder} holds latents of shape {self.sample_shape}, the denoiser takes "
                f"{tuple(denoiser.sample_shape)}: encode pictures of its size"
            )
        self._check_widths(getattr(denoiser, "condition_widths", {}))
        source = getattr(denoiser, "source", None)
        if source is not None:
            from denoisers.encoder_files import encoder_hashes

            self._check_options(source.options.get("encode") or {})
            self._check_encoders(source.root, encoder_hashes(source.root, source.variant))

    def read(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
        """Latents (batch, *sample_shape) and their condition with the null prompt.

        Both are float32: autocast refuses to join tensors of another half precision than its own, as guidance does.
        """
        index = torch.as_tensor(list(indices))
        shards = torch.searchsorted(self._bounds, index, right=True) - 1
        rows = index - self._bounds[shards]
        order = torch.argsort(shards, stable=True)
        chosen, counts = torch.unique_consecutive(shards[order], return_counts=True)
        parts = rows[order].split(counts.tolist())
        place = torch.argsort(order)
        read = [
            {name: view[part] for name, view in self._view(shard).items()}
            for shard, part in zip(chosen.tolist(), parts)
        ]
        tensors = {name: _float32(torch.cat([one[name] for one in read])[place]) for name in read[0]}
        latents = tensors.pop("latents")
        null = map_condition(lambda value: value.expand(len(index), *value.shape[1:]), self.null)
        return latents, {**unflatten_condition("condition", tensors), "null": null}

    def _view(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._views:
            name = list(self.records)[shard]
            self._views[shard] = map_latents(self.folder / name, self.records[name])
        return self._views[shard]

    def _try(self, name: str, check: Any) -> None:
        try:
            check()
        except ValueError as error:
            if not self.skip_corrupt:
                raise ValueError(f"{error}; or leave such shards out with skip_corrupt: true") from error
            self.notes.append(str(error))
            del self.records[name]

    def _index(self) -> None:
        counts = [0, *(record["samples"] for record in self.records.values())]
        self._bounds = torch.tensor(counts).cumsum(0)  # index of the first sample of every shard, and one more
        self._views: dict[int, dict[str, Tensor]] = {}
        if not len(self):
            raise ValueError(f"no sample of {self.folder} is left, all of its shards are corrupt or empty: {AGAIN}")

    def _check_embeddings(self) -> None:
        path = self.folder / NULL_NAME
        if not any(name.startswith("condition") for name in self.manifest["encoded"]["tensors"]):
            raise ValueError(f"the shards in {self.folder} hold no text embeddings, only latents: {AGAIN}")
        if not path.is_file() or sha256(path) != self.manifest["null_sha256"]:
            state = "corrupt" if path.is_file() else "missing"
            raise ValueError(f"{path}, the embeddings of the empty prompt, is {state}: delete it and {AGAIN}")

    def _check_widths(self, wanted: dict[str, int]) -> None:
        shapes = self.manifest["encoded"]["tensors"]
        found = {name: shapes.get(f"condition/{name}", [None])[-1] for name in wanted}
        if found != wanted:
            raise ValueError(
                f"{self.folder} holds text embeddings of width {found}, the denoiser takes {wanted}: encode with the "
                "text encoders of its own folder"
            )

    def _check_options(self, wanted: dict[str, Any]) -> None:
        found = self.manifest["encoded"].get("options", wanted)
        if found != wanted:
            raise ValueError(
                f"{self.folder} holds prompts encoded with the options {found}, the denoiser's are {wanted}: write the "
                "same `encode: {...}` in its denoiser.yaml, or encode again"
            )

    def _check_encoders(self, root: str, wanted: dict[str, str]) -> None:
        encoded = self.manifest["encoded"]
        for name, digest in wanted.items():
            found = encoded["encoders"].get(name)
            if found is not None and found != digest:
                raise ValueError(
                    f"{self.folder} was encoded with another {name}: weights {str(found)[:12]} of {encoded['model']}, "
                    f"the denoiser's folder {root} has {digest[:12]}: encode with that folder and its variant"
                )


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _check_size(path: Path, record: dict[str, Any]) -> None:
    """What can be checked of a shard without reading it."""
    size = path.stat().st_size if path.is_file() else None
    if size != record["bytes"]:
        check_shard(path, record, AGAIN)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no encoded shards (no {MANIFEST_NAME}): make them with `{MAKE}`")
    manifest = parse_manifest(path, FIELDS, f"delete the folder and {AGAIN}")
    if not manifest["complete"]:
        raise ValueError(f"{folder} is incomplete: {AGAIN}, it makes only what is missing")
    return manifest
