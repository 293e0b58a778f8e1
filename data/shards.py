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
from solvers.nodes import Nodes


@dataclass(frozen=True)
class Trajectories:
    """Some trajectories of one solver.

    Args:
        states: (batch, K+1, *shape): all M+1 of the solver, or the first and the last alone. The first is the start
            noise as the solver scaled it, the last the image.
        outputs: (batch, M, *shape), what the network said at states 0 to M-1; None where they were not kept.
        condition: None, a tensor, or nested containers of tensors with the batch on dimension 0.
        seeds: one per sample.
        nodes: of the states.
    """

    states: Tensor
    outputs: Tensor | None
    condition: Any
    seeds: tuple[int, ...]
    nodes: Nodes

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice) -> "Trajectories":
        return self._take(index, self.seeds[index])

    @property
    def noise(self) -> Tensor:
        """Unit noise they started from, (batch, *shape)."""
        return self.states[:, 0] / self.nodes.start_scale

    @property
    def end(self) -> Tensor:
        """The images, (batch, *shape)."""
        return self.states[:, -1]

    def at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The state at a node, (batch, *shape), see `Nodes.between`; differentiable in the node."""
        upper, weights = self.nodes.between(alpha, sigma)
        weights = weights.to(self.states)
        return weights[0] * self.states[:, upper - 1] + weights[1] * self.states[:, upper]

    def ends(self) -> "Trajectories":
        """The first and the last states alone, copied."""
        return replace(self, states=self.states[:, [0, -1]], outputs=None, nodes=self.nodes.ends)

    def choose(self, indices: Sequence[int]) -> "Trajectories":
        """Some of them, in any order."""
        return self._take(torch.tensor(list(indices), dtype=torch.int64), tuple(self.seeds[i] for i in indices))

    def to(self, *args: Any, **kwargs: Any) -> "Trajectories":
        """States and outputs as `Tensor.to` would move or convert them; the condition only changes device."""
        states = self.states.to(*args, **kwargs)
        outputs = None if self.outputs is None else self.outputs.to(*args, **kwargs)
        return replace(self, states=states, outputs=outputs, condition=condition_to(self.condition, states.device))

    @classmethod
    def join(cls, parts: "Sequence[Trajectories]") -> "Trajectories":
        """Several of one solver, at least one, as one."""
        outputs = [part.outputs for part in parts if part.outputs is not None]
        return cls(
            torch.cat([part.states for part in parts]),
            torch.cat(outputs) if len(outputs) == len(parts) else None,
            concatenate_conditions([part.condition for part in parts]),
            tuple(seed for part in parts for seed in part.seeds),
            parts[0].nodes,
        )

    def _take(self, index: Any, seeds: tuple[int, ...]) -> "Trajectories":
        outputs = None if self.outputs is None else self.outputs[index]
        condition = index_condition(self.condition, index)
        return replace(self, states=self.states[index], outputs=outputs, condition=condition, seeds=seeds)


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


def read_shard(path: Path, nodes: Nodes, positions: Sequence[int] | None = None) -> Trajectories:
    """Read some samples of a shard without touching the others; default: all."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        chosen = members if positions is None else [members[position] for position in positions]
        return Trajectories.join([_decode(archive.extractfile(one).read(), nodes) for one in chosen])  # type: ignore


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
    assert sample.outputs is not None
    tensors = {"states": sample.states, "outputs": sample.outputs} | flatten_condition("condition", sample.condition)
    tensors = {name: value[0].contiguous() for name, value in tensors.items()}
    return save(tensors | {"timesteps": timesteps.clone(), "seed": torch.tensor(sample.seeds[0])})


def _decode(content: bytes, nodes: Nodes) -> Trajectories:
    tensors = load(content)
    leaves = {name: value[None] for name, value in tensors.items() if name.startswith("condition")}
    condition, seeds = unflatten_condition("condition", leaves), (int(tensors["seed"]),)
    return Trajectories(tensors["states"][None], tensors["outputs"][None], condition, seeds, nodes)


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
