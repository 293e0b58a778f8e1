"""ParallelSettings: how a parallel run iterates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

_Rule = tuple[Callable[[Any], bool], str]
_COUNT: _Rule = (lambda value: isinstance(value, Integral) and value >= 1, "a whole number, at least 1")
_POSITIVE: _Rule = (lambda value: _is_finite(value) and value > 0, "finite and positive")
_NOT_NEGATIVE: _Rule = (lambda value: _is_finite(value) and value >= 0, "finite and not negative")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("order", "window", "max_rounds", "batch_size"), _COUNT),
    "memory": (_COUNT[0], f"{_COUNT[1]} (1 is plain iteration)"),
    **dict.fromkeys(("tolerance", "regularization"), _POSITIVE),
    "data_std": _NOT_NEGATIVE,
    "safeguard": (lambda value: isinstance(value, Real) and value > 0, "positive; infinity switches it off"),
}
_OPTIONAL = ("order", "window", "max_rounds", "batch_size", "data_std")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How a parallel run iterates and when it ends; `parallel_sample` takes each by its name, too.

    Args:
        order: rows an equation reaches back, 1 (fixed point) to N (Picard); None: N.
        window: most rows of a round, 1 (sequential) to N; None: N.
        memory: rounds used for acceleration, the current one included; 1 is plain iteration.
        regularization: lambda of the acceleration, relative, > 0.
        safeguard: a row is accelerated only where the residual of all rows up to it fell below `safeguard` times that
            of the round before, > 0; infinity accelerates always.
        data_std: standard deviation of the data; the equations then already know how outputs follow their states for
            Gaussian data (`output_slope`). About 0.5 for images in [-1, 1], 1 for scaled latents; None leaves it out.
        tolerance: about the relative error of the result; a row is finished when all rows before it are and it moved,
            relative to its state, by at most a fifth of it (`equations.finished_tolerance`).
        early_stop: end a sample when its final state settled, rounds before all rows are finished: going on as in the
            last two rounds it would move by at most `tolerance` (root mean square), and no first-order residual exceeds
            tolerance * order / N.
        max_rounds: most rounds; None: N, which always suffice.
        batch_size: most network calls at once, in each process; None: all.
    Raises:
        ValueError: one outside its range.
    """

    order: int | None = None
    window: int | None = None
    memory: int = 3
    regularization: float = 1e-3
    safeguard: float = 0.5
    data_std: float | None = 0.5
    tolerance: float = 1e-3
    early_stop: bool = True
    max_rounds: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, (allows, needed) in _RULES.items():
            value = getattr(self, name)
            if not (allows(value) or (value is None and name in _OPTIONAL)):
                raise ValueError(f"{name} is {value}: it must be {needed}")

    def filled_in(self, rows: int) -> "ParallelSettings":
        """The same with order, window and max_rounds stated, for a table of this many rows.

        Raises:
            ValueError: order or window beyond the table.
        """
        for name in ("order", "window"):
            if (getattr(self, name) or 0) > rows:
                raise ValueError(f"{name} is {getattr(self, name)}: a table of {rows} rows allows 1 to {rows}")
        order, window, rounds = (value or rows for value in (self.order, self.window, self.max_rounds))
        return replace(self, order=order, window=window, max_rounds=rounds)
