"""Conditions: None, a tensor, or nested dicts, lists and tuples of tensors, all indexed on dimension 0."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def map_condition(function: Callable[[Tensor], Tensor], condition: Any) -> Any:
    """Apply `function` to every tensor; None stays None."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return function(condition)
    if isinstance(condition, dict):
        return {key: map_condition(function, value) for key, value in condition.items()}
    if isinstance(condition, (list, tuple)):
        return type(condition)([map_condition(function, value) for value in condition])
    raise ValueError(f"a condition holds a {type(condition).__name__}: use None, tensors, dicts, lists and tuples")


def condition_tensors(condition: Any) -> list[Tensor]:
    """All tensors of a condition, in the order of its containers."""
    found: list[Tensor] = []

    def collect(value: Tensor) -> Tensor:
        found.append(value)
        return value

    map_condition(collect, condition)
    return found


def condition_length(condition: Any) -> int | None:
    """Number of samples of a condition; None when it holds no tensor.

    Raises:
        ValueError: tensors of different length on dimension 0.
    """
    lengths = {len(value) for value in condition_tensors(condition)}
    if len(lengths) > 1:
        raise ValueError(f"the tensors of a condition have {sorted(lengths)} samples on dimension 0: give all the same")
    return lengths.pop() if lengths else None


def index_condition(condition: Any, index: Tensor | slice | Sequence[int]) -> Any:
    """The samples `index` (a slice, or integers of any repetition and order) of a condition."""
    if isinstance(index, slice):
        return map_condition(lambda value: value[index], condition)
    index = torch.as_tensor(index)
    return map_condition(lambda value: value[index.to(value.device)], condition)


def concatenate_conditions(conditions: Sequence[Any]) -> Any:
    """Join conditions of one structure on dimension 0.

    Raises:
        ValueError: structures that differ.
    """
    first = conditions[0]
    if isinstance(first, Tensor) and all(isinstance(value, Tensor) for value in conditions):
        return torch.cat(list(conditions))
    if first is None and all(value is None for value in conditions):
        return None
    if isinstance(first, dict) and all(isinstance(c, dict) and c.keys() == first.keys() for c in conditions):
        return {key: concatenate_conditions([c[key] for c in conditions]) for key in first}
    if isinstance(first, (list, tuple)) and all(type(c) is type(first) and len(c) == len(first) for c in conditions):
        return type(first)([concatenate_conditions(parts) for parts in zip(*conditions)])
    found = ", ".join(sorted({_structure(condition) for condition in conditions}))
    raise ValueError(f"conditions of different structure cannot be joined: found {found}")


def condition_to(condition: Any, device: torch.device | str) -> Any:
    """A condition moved to a device."""
    return map_condition(lambda value: value.to(device), condition)


def _structure(condition: Any) -> str:
    if isinstance(condition, dict):
        return "{" + ", ".join(map(str, condition)) + "}"
    return type(condition).__name__
