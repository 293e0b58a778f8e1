"""Noise is addressed, not drawn: sample k's noise depends on its seed alone, never on the batch it sits in."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROW_STRIDE = 2**32  # row r of seed s draws from the generator seed s + (r + 1) * 2^32; seeds are below 2^32


def start_noise(seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit Gaussian start noise, (len(seeds), *shape), on the CPU; sample k from seeds[k] alone."""
    return _draw([_checked(seed) for seed in seeds], shape, dtype)


def row_noise(seeds: Sequence[int], row: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh unit Gaussian noise of one table row, (len(seeds), *shape), on the CPU; from each seed and the row."""
    return _draw([_checked(seed) + (row + 1) * _ROW_STRIDE for seed in seeds], shape, dtype)


def _draw(seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Drawn in float32 whatever `dtype`, so that a float64 run sees the same noise."""
    draws = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(dtype) if draws else torch.empty((0, *shape), dtype=dtype)


def _checked(seed: int) -> int:
    if not 0 <= seed < _ROW_STRIDE:
        raise ValueError(f"seed {seed} is outside 0 to 2^32 - 1")
    return int(seed)
