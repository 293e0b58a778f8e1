"""What a pipeline is called with: one entry for each prompt, put together for a batch, and described for manifests."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

PLAIN = (str, int, float, bool, type(None))


def entries_of(prompts: Sequence[Any] | None, prompt_argument: str) -> list[dict[str, Any]]:
    """The arguments that each prompt stands for; without prompts one entry without arguments.

    Args:
        prompts: values of `prompt_argument`, or mappings from arguments to values.
        prompt_argument: which argument of the call takes them.
    Raises:
        ValueError: no list, an empty one, or mappings of different arguments.
    """
    if prompts is None:
        return [{}]
    if isinstance(prompts, str | Mapping) or not len(prompts):
        raise ValueError(f"prompts is {prompts!r}: give a list of at least one prompt, or none for a pipeline without")
    entries = [dict(entry) if isinstance(entry, Mapping) else {prompt_argument: entry} for entry in prompts]
    if other := [entry for entry in entries if entry.keys() != entries[0].keys()]:
        names = ", ".join(sorted(other[0].keys() ^ entries[0].keys()))
        raise ValueError(f"some prompts have {names} and some do not: give each prompt the same arguments")
    return entries


def batch_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of one call for several prompts, each a list with an entry for each prompt."""
    return {name: [entry[name] for entry in entries] for name in entries[0]}


def described(value: Any) -> Any:
    """A value as JSON types: as it is where they hold it, else its class and the hash of its numbers."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(name): described(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    numbers = value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else _numbers(value)
    name = type(value).__name__
    return name if numbers is None else f"{name} {hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}"


def _numbers(value: Any) -> np.ndarray | None:
    """The numbers of arrays and pictures; None for what has none."""
    try:
        numbers = np.asarray(value)
    except (TypeError, ValueError):
        return None
    return np.ascontiguousarray(numbers) if numbers.dtype.kind in "biuf" else None
