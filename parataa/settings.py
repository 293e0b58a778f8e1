"""The settings of a parallel run, checked once."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from denoisers.conditions import condition_length
from parataa.iteration import Acceleration
from solvers.table import SolverTable


@dataclass(frozen=True)
class Settings:
    """What `parallel_sample` documents, with every default filled in."""

    order: int
    window: int
    acceleration: Acceleration
    data_std: float | None
    tolerance: float
    noise_tolerance: float
    early_stop: bool
    max_rounds: int
    batch_size: int | None


def check_settings(
    nfe: int,
    *,
    order: int | None,
    window: int | None,
    memory: int,
    regularization: float,
    safeguard: float,
    data_std: float | None,
    tolerance: float,
    noise_tolerance: float,
    early_stop: bool,
    max_rounds: int | None,
    batch_size: int | None,
) -> Settings:
    """Fill in the defaults for a table of `nfe` rows.

    Raises:
        ValueError: a setting outside its range.
    """
    order, window, max_rounds = (nfe if value is None else value for value in (order, window, max_rounds))
    for name, value in (("order", order), ("window", window)):
        if not 1 <= value <= nfe:
            raise ValueError(f"{name} is {value}: a table of {nfe} rows allows 1 to {nfe}")
    for name, value in (("memory", memory), ("max_rounds", max_rounds), ("batch_size", batch_size)):
        if value is not None and value < 1:
            hint = " (1 is plain iteration)" if name == "memory" else ""
            raise ValueError(f"{name} is {value}: it must be at least 1{hint}")
    for name, value in (("tolerance", tolerance), ("regularization", regularization)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}: it must be finite and positive")
    for name, value in (("noise_tolerance", noise_tolerance), ("data_std", data_std)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}: it must be finite and not negative")
    if not safeguard > 0:
        raise ValueError(f"safeguard is {safeguard}: it must be positive; infinity switches it off")
    rule = Acceleration(memory, regularization, safeguard)
    return Settings(order, window, rule, data_std, tolerance, noise_tolerance, early_stop, max_rounds, batch_size)


def check_inputs(table: SolverTable, noise: Tensor, condition: Any, warm_start: Tensor | None) -> None:
    """Whether table, noise, condition and warm start fit each other.

    Raises:
        ValueError: they do not, or the table evaluates the network in vain.
    """
    if noise.ndim < 2 or len(noise) == 0 or not noise.is_floating_point():
        raise ValueError(f"noise has shape {tuple(noise.shape)} and {noise.dtype}: needed is floating (batch, *shape)")
    unused = table.unused_evaluations()
    if unused:
        raise ValueError(
            f"the outputs of rows {unused} never reach the final state, so that a parallel run would wait for rows "
            "that do not matter: remove them from the table, or use the sequential sampler"
        )
    length = condition_length(condition)
    if length not in (None, len(noise)):
        raise ValueError(f"the condition has {length} samples and the noise {len(noise)}: give the same number")
    needed = (table.nfe + 1, *noise.shape)
    if warm_start is not None and tuple(warm_start.shape) != needed:
        raise ValueError(f"warm_start has shape {tuple(warm_start.shape)}: needed are all states, {needed}")
