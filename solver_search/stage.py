"""One evaluation count of a search: where it started, how far it is, and its best numbers so far."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from solver_search.lm import Damping
from solver_search.parameters import FreeParameters
from solver_search.starts import Start
from solvers import NoiseSchedule, SolverTable
from solvers.artifact import table_from_dict, table_to_dict
from training.method import Parameters


@dataclass
class Stage:
    """State of a stage; `to_dict` and `from_dict` carry it over a resume.

    Args:
        nfe: network evaluations.
        start: name of the start.
        parameters: theta -> table.
        theta: the numbers, (size,) float64 on the CPU.
        damping: of Levenberg-Marquardt.
        step: optimiser steps taken.
        judged: the step that was last judged on the trajectories that choose; -1 before the start was.
        done: whether the stage has ended.
        best_theta: with the lowest loss on these trajectories, None without any.
        best_loss: its loss there.
        reported, started: figures of the best and of the start on the trajectories that report, which chose nothing.
    """

    nfe: int
    start: str
    parameters: Parameters
    theta: Tensor
    damping: Damping = Damping()  # noqa: RUF009 - frozen
    step: int = 0
    judged: int = -1
    done: bool = False
    best_theta: Tensor | None = None
    best_loss: float = math.inf
    reported: dict[str, float] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)

    @property
    def table(self) -> SolverTable:
        """The table of the numbers as they are."""
        return self.parameters.table(self.theta.detach()).detach()

    @property
    def best_table(self) -> SolverTable:
        """The table with the lowest loss on the trajectories that choose; without any the present one."""
        return self.table if self.best_theta is None else self.parameters.table(self.best_theta).detach()

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; the table it starts from instead of the parameters."""
        free = self.parameters if isinstance(self.parameters, FreeParameters) else None
        start = free and {"table": table_to_dict(free.start), "basis": free.basis}
        return vars(self) | {"parameters": start, "damping": vars(self.damping)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], start: Start, schedule: NoiseSchedule) -> "Stage":
        """Inverse of `to_dict`, for a search with the same options."""
        free = values["parameters"]
        parameters = start.parameters(values["nfe"], schedule, free and table_from_dict(free["table"]))
        if isinstance(parameters, FreeParameters):
            parameters = replace(parameters, basis=free["basis"])
        return cls(**values | {"parameters": parameters, "damping": Damping(**values["damping"])})
