"""One evaluation count of a search: where it started, how far it is, and its best numbers so far."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solver_search.lm import Damping
from solver_search.losses import TeacherPath
from solver_search.parameters import FreeParameters, PaperParameters, Parameters
from solver_search.starts import check_start, split_widest, start_table
from solvers import SolverTable
from solvers.artifact import table_from_dict, table_to_dict


@dataclass
class Stage:
    """State of a stage; `to_dict` and `from_dict` carry it over a resume.

    Args:
        nfe: network evaluations.
        start: name of the start.
        parameters: theta -> table.
        damping: of Levenberg-Marquardt.
        step: optimiser steps taken.
        done: whether the stage has ended.
        best_theta: with the lowest validation loss, None without validation.
        best_loss, best_rmse: on held-out trajectories.
    """

    nfe: int
    start: str
    parameters: Parameters
    damping: Damping
    step: int = 0
    done: bool = False
    best_theta: Tensor | None = None
    best_loss: float = float("inf")
    best_rmse: float = float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; the table it starts from instead of the parameters."""
        free = isinstance(self.parameters, FreeParameters)
        return {
            "nfe": self.nfe,
            "start": self.start,
            "table": table_to_dict(self.parameters.start) if free else None,
            "damping": [self.damping.value, self.damping.growth],
            "step": self.step,
            "done": self.done,
            "best_theta": None if self.best_theta is None else self.best_theta.tolist(),
            "best_loss": self.best_loss,
            "best_rmse": self.best_rmse,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], search: Any) -> "Stage":
        """Inverse of `to_dict`, for a module with the same settings."""
        table = None if values["table"] is None else table_from_dict(values["table"])
        best = values["best_theta"]
        kept = {name: values[name] for name in ("nfe", "start", "step", "done", "best_loss", "best_rmse")}
        return cls(
            parameters=make_parameters(search, values["nfe"], table),
            damping=Damping(*values["damping"]),
            best_theta=None if best is None else torch.tensor(best, dtype=torch.float64),
            **kept,
        )


def make_parameters(search: Any, nfe: int, start: SolverTable | None) -> Parameters:
    """The free parametrisation around a table, or the paper's where there is none."""
    schedule = search.denoiser.schedule
    if start is None:
        return PaperParameters(schedule, nfe, finish=search.finish)
    return FreeParameters(start, (schedule.t_min, schedule.t_max), search.train_timesteps)


def begin_stage(search: Any, nfe: int, teacher: TeacherPath) -> tuple[Stage, Tensor]:
    """The stage of `nfe` evaluations with the best of its starts, and its theta.

    Each start gets `search.screening` steps of Levenberg-Marquardt on `teacher` first; with one start none is taken.
    """
    candidates = [_begin(search, nfe, name) for name in search.starts]
    if search.warm_start and any(done < nfe for done in search.finished):
        candidates.append(_warm(search, nfe))
    if len(candidates) == 1:
        return candidates[0], candidates[0].parameters.initial()
    tried = [_screened(search, stage, teacher) for stage in candidates]
    best = min(tried, key=lambda result: result[0])
    return best[1], best[2]


def _begin(search: Any, nfe: int, name: str) -> Stage:
    table = None if name == "paper" else start_table(name, nfe, search.denoiser.schedule)
    return Stage(nfe, name, make_parameters(search, nfe, table), Damping())


def _warm(search: Any, nfe: int) -> Stage:
    """From the largest finished table with fewer evaluations."""
    known = max(done for done in search.finished if done < nfe)
    table = search.finished[known]
    for _ in range(nfe - known):
        table = split_widest(table, search.denoiser.schedule)
    check_start(table, f"the solution at {known}", nfe, search.denoiser.schedule)
    return Stage(nfe, f"solution at {known}", make_parameters(search, nfe, table), Damping())


def _screened(search: Any, stage: Stage, teacher: TeacherPath) -> tuple[float, Stage, Tensor]:
    """(loss, stage, theta) after a few steps."""
    theta = stage.parameters.initial()
    if not search.screening:
        return search.objective.value(stage.parameters, theta, teacher), stage, theta
    loss = float("inf")
    for _ in range(search.screening):
        result, _ = search.objective.lm_step(stage.parameters, theta, teacher, stage.damping)
        theta, stage.damping, loss = result.theta, result.damping, result.loss
    return loss, stage, theta
