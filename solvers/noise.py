"""Noise is addressed, not drawn: sample k's noise depends on its seed alone, never on the batch it sits in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SEED_LIMIT = 2**32  # torch's CPU generator reads the low 32 bits of a seed only


def start_noise(seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit Gaussian start noise, (len(seeds), *shape), on the CPU; sample k from seeds[k] alone."""
    generators = [torch.Generator().manual_seed(check_seed(seed)) for seed in seeds]
    plain = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    return _stacked([torch.randn(tuple(shape), generator=one, **plain) for one in generators], shape, dtype)


def row_noise(seeds: Sequence[int], row: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh unit Gaussian noise of one table row, (len(seeds), *shape), on the CPU; from each seed and the row.

    A counter-based generator (Philox, keyed by seed and row), so that any row is drawn without those before it.
    """
    generators = [np.random.Generator(np.random.Philox(key=[check_seed(seed), row])) for seed in seeds]
    draws = [torch.as_tensor(source.standard_normal(tuple(shape), dtype=np.float32)) for source in generators]
    return _stacked(draws, shape, dtype)


def _stacked(draws: list[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Draws are float32 whatever `dtype`, so that a float64 run sees the same noise."""
    return torch.stack(draws).to(dtype) if draws else torch.empty((0, *shape), dtype=dtype)


def check_seed(seed: int) -> int:
    """The seed as an int.

    Raises:
        ValueError: outside 0 to 2^32 - 1.
    """
    if not 0 <= seed < _SEED_LIMIT:
        raise ValueError(f"seed {seed} is outside 0 to 2^32 - 1")
    return int(seed)
