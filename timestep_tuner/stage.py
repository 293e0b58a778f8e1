"""Where a run is with the solver it is tuning."""

from dataclasses import dataclass, field


@dataclass
class Stage:
    """State of one solver's tuning; its fields go into checkpoints as they are.

    Args:
        row: row being tuned, None when all are.
        before: held-out losses of the rows at ratio 1.
        after: those of the tuned rows.
        step: optimiser steps taken, on this row where there is one.
        ends: losses of the whole solver's images before and after, with the trajectory objective.
        history: the ratios after every step.
        curvature: of Gauss-Newton, see `gauss_newton.towards`.
    """

    row: int | None
    before: list[float]
    after: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    step: int = 0
    history: list[list[float]] = field(default_factory=list)
    curvature: list[list[float]] = field(default_factory=list)
