"""Trajectory shards: webdataset tar files with one safetensors member per sample, written whole or not at all."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from solvers.conditions import concatenate_conditions, condition_to, index_condition
from solvers.files import atomic_write, sha256


@dataclass(frozen=True)
class Trajectories:
    """Some trajectories of one solver.

    Args:
        states: (batch, M+1, *shape), state 0 is the scaled start noise, state M the image.
        outputs: (batch, M, *shape), what the network said at states 0 to M-1.
        condition: None, a tensor, or nested containers of tensors with the batch on dimension 0.
        seeds: one per sample.
    """

    states: Tensor
    outputs: Tensor
    condition: Any
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice) -> "Trajectories":
        condition = index_condition(self.condition, index)
        return Trajectories(self.states[index], self.outputs[index], condition, self.seeds[index])

    def choose(self, indices: Sequence[int]) -> "Trajectories":
        """Some of them, in any order."""
        index = list(indices)
        condition = index_condition(self.condition, index)
        return Trajectories(self.states[index], self.outputs[index], condition, tuple(self.seeds[i] for i in index))

    def to(self, *args: Any, **kwargs: Any) -> "Trajectories":
        """States and outputs as `Tensor.to` would move or convert them; the condition only changes device."""
        states = self.states.to(*args, **kwargs)
        condition = condition_to(self.condition, states.device)
        return replace(self, states=states, outputs=self.outputs.to(*args, **kwargs), condition=condition)

    @classmethod
    def join(cls, parts: "Sequence[Trajectories]") -> "Trajectories":
        """Several, at least one, as one."""
        return cls(
            torch.cat([part.states for part in parts]),
            torch.cat([part.outputs for part in parts]),
            concatenate_conditions([part.condition for part in parts]),
            tuple(seed for part in parts for seed in part.seeds),
        )


def write_shard(path: Path, trajectories: Trajectories, timesteps: Tensor) -> None:
    """Write a shard and, beside it, a JSON file with its checksum, size and seeds.

    Each sample is NAME.safetensors, NAME its seed, with `states`, `outputs`, `timesteps`, `seed` and the leaves of
    the condition. The JSON file comes first and the shard last, so a shard that exists is complete.
    """
    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w") as archive:
            for index, seed in enumerate(trajectories.seeds):
                add_member(archive, f"{seed:010d}.safetensors", _encode(trajectories[index : index + 1], timesteps))
        record = {
            "sha256": sha256(temporary),
            "bytes": temporary.stat().st_size,
            "seeds": seed_ranges(trajectories.seeds),
        }
        with atomic_write(record_path(path)) as beside:
            beside.write_text(json.dumps(record) + "\n")


def record_path(path: Path) -> Path:
    """The JSON file beside a shard."""
    return path.with_suffix(".json")


def check_shard(path: Path, record: dict[str, Any], again: str = "generate the trajectories again") -> None:
    """Compare a shard with its size and checksum.

    Args:
        path: the shard.
        record: with its `bytes` and `sha256`.
        again: how shards are made, for the message.
    Raises:
        ValueError: it is missing, truncated or altered.
    """
    advice = f"delete it and {record_path(path).name}, then {again}: only it is recomputed"
    if not path.is_file():
        raise ValueError(f"shard {path} is missing: {advice}")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise ValueError(f"shard {path} has {size} bytes, {record['bytes']} were written: {advice}")
    if sha256(path) != record["sha256"]:
        raise ValueError(f"shard {path} is corrupt, its SHA-256 differs from the one written: {advice}")


def read_shard(path: Path, start: int = 0, stop: int | None = None) -> Trajectories:
    """Read samples `start` to `stop` of a shard without touching the others."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()[start:stop]
        return Trajectories.join([_decode(archive.extractfile(member).read()) for member in members])  # type: ignore


def seed_ranges(seeds: Sequence[int]) -> list[list[int]]:
    """Seeds as half-open ranges [start, stop], in the order given."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and ranges[-1][1] == seed:
            ranges[-1][1] = seed + 1
        else:
            ranges.append([seed, seed + 1])
    return ranges


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _encode(sample: Trajectories, timesteps: Tensor) -> bytes:
    tensors = {"states": sample.states, "outputs": sample.outputs} | flatten_condition("condition", sample.condition)
    tensors = {name: value[0].contiguous() for name, value in tensors.items()}
    return save(tensors | {"timesteps": timesteps.clone(), "seed": torch.tensor(sample.seeds[0])})


def _decode(content: bytes) -> Trajectories:
    tensors = load(content)
    leaves = {name: value[None] for name, value in tensors.items() if name.startswith("condition")}
    seeds = (int(tensors["seed"]),)
    return Trajectories(
        tensors["states"][None], tensors["outputs"][None], unflatten_condition("condition", leaves), seeds
    )


def flatten_condition(name: str, condition: Any) -> dict[str, Tensor]:
    """Names and tensors of nested dicts (`/key`), lists and tuples (`#index`)."""
    if condition is None:
        return {}
    if isinstance(condition, Tensor):
        return {name: condition}
    if isinstance(condition, dict):
        if any(set("/#") & set(key) for key in condition):
            raise ValueError(f"the keys of a condition, {sorted(condition)}, may not contain / or #")
        parts = [(f"{name}/{key}", value) for key, value in condition.items()]
    elif isinstance(condition, list | tuple):
        parts = [(f"{name}#{index:03d}", value) for index, value in enumerate(condition)]
    else:
        raise ValueError(f"a condition holds {type(condition).__name__}: use tensors, dicts, lists and tuples")
    return {leaf: tensor for part, value in parts for leaf, tensor in flatten_condition(part, value).items()}


def unflatten_condition(name: str, leaves: dict[str, Tensor]) -> Any:
    """Inverse of `flatten_condition`; lists come back as tuples."""
    if not leaves:
        return None
    if name in leaves:
        return leaves[name]
    heads = sorted({name + leaf[len(name)] + _head(leaf[len(name) + 1 :]) for leaf in leaves})
    parts = {head: unflatten_condition(head, {k: v for k, v in leaves.items() if _below(k, head)}) for head in heads}
    if heads[0][len(name)] == "#":
        return tuple(parts[head] for head in heads)
    return {head[len(name) + 1 :]: value for head, value in parts.items()}


def _head(rest: str) -> str:
    """What comes before the next separator."""
    return rest.replace("#", "/").split("/", 1)[0]


def _below(leaf: str, head: str) -> bool:
    return leaf.startswith(head) and (len(leaf) == len(head) or leaf[len(head)] in "/#")
