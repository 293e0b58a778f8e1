"""Class labels and prompts as conditions, addressed by seed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solvers.conditions import condition_length, index_condition


def class_labels(denoiser: Any, seeds: Sequence[int]) -> Any:
    """The condition that belongs to each seed, so that conditions, like noises, are addressed by the seed.

    Args:
        denoiser: with `num_classes`: labels; with `conditions` (prompt embeddings): its entries; with `condition_of`:
            what that says.
        seeds: integers, one per sample.
    Returns:
        int64 (len(seeds),), seed % num_classes; or entry seed % length of `conditions`; or None when unconditional.
    """
    if hasattr(denoiser, "condition_of"):
        return denoiser.condition_of(list(seeds))
    seeds = torch.as_tensor(list(seeds), dtype=torch.int64)
    num_classes = getattr(denoiser, "num_classes", None)
    if num_classes:
        return seeds % num_classes
    bank = getattr(denoiser, "conditions", None)
    return None if bank is None else index_condition(bank, seeds % condition_length(bank))


def check_labels(denoiser: Any, labels: Sequence[int] | Tensor) -> Tensor:
    """`labels` as int64 (n,), once each is known to be a class of the denoiser.

    Raises:
        ValueError: a denoiser without classes, or a label outside 0 .. num_classes - 1.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64).flatten()
    num_classes = getattr(denoiser, "num_classes", None)
    if not num_classes:
        raise ValueError("labels were given, but this denoiser has no classes: leave them out")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is out of range: this denoiser has classes 0 to {num_classes - 1}")
    return labels
