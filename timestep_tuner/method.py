"""Timestep tuning as a method: the solvers of a list, one after the other, and an artifact of each."""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from data.shards import Trajectories
from data.teacher_data import Wanted
from denoisers import Evaluations
from evaluation.distances import listed
from solvers import SolverTable, resolve_solver
from timestep_tuner.gauss_newton import Slopes, slopes, towards
from timestep_tuner.judge import Judge, Reported, Stage
from timestep_tuner.objective import OBJECTIVES, STRATEGIES, Objective
from timestep_tuner.pictures import log_tuned
from timestep_tuner.ratios import Ratios
from training.arguments import check_choice
from training.method import Fitting, Method, Result, Run

LEARNED = ("olss", "solver_search")
OPTIMIZERS = {"gauss_newton": 1.0, "adam": 0.01}  # and their default learning rates


@dataclass(frozen=True)
class Descent:
    """How the ratios move.

    Args:
        optimizer: `gauss_newton`, or `adam` (the paper's).
        learning_rate: of Adam in units of the ratio, default 0.01; of Gauss-Newton the share of its step, default 1.
        steps: optimiser steps, for a solver (parallel) or for each of its rows (sequential).
        decay: last share of the steps over which the rate falls linearly to zero; 0 keeps it.
    Raises:
        ValueError: an option out of its range.
    """

    optimizer: str = "gauss_newton"
    learning_rate: float | None = None
    steps: int = 20
    decay: float = 0.5

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.peak <= 0 or self.steps < 1 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"learning_rate {self.learning_rate} and steps {self.steps} must be positive, decay {self.decay} in "
                "[0, 1]"
            )

    @property
    def peak(self) -> float:
        """The learning rate before it falls."""
        return OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return self.peak * (min(1.0, (self.steps - step) / (self.decay * self.steps)) if self.decay else 1.0)


@dataclass(frozen=True)
class TimestepTuner(Method):
    """Tunes what each solver of a list tells the network at every evaluation; nothing else of the solver changes.

    Solvers are tuned one after the other. The parallel strategy tunes all rows of a solver at once, the sequential one
    row after row. Rows that are no better on the half of the held-out samples that chooses keep their timestep, so a
    solver never ends worse than it started there; figures are of the other half.

    Args:
        solvers: what to tune, name:steps or artifacts' paths.
        objective: `noise` (the paper's) or `trajectory`.
        strategy: `parallel` or `sequential`.
        free_last: also tune the last row.
        descent: how the ratios move.
    Raises:
        ValueError: an option out of its range.
    Source: arXiv 2310.09469: sequential, Adam, learning rate 2e-3, 500 steps, no decay.
    """

    solvers: list[str] = field(default_factory=list)
    objective: str = "noise"
    strategy: str = "parallel"
    free_last: bool = False
    descent: Descent = field(default_factory=Descent)

    name: ClassVar[str] = "timestep_tuner"

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"the solvers have names {self.names}: give one or more, no two of the same name")
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("strategy", self.strategy, STRATEGIES)

    @property
    def names(self) -> list[str]:
        """What they are called."""
        return [solver_name(solver) for solver in self.solvers]

    @property
    def artifacts(self) -> list[str]:
        """tuned-<name>."""
        return [f"tuned-{name}" for name in self.names]

    @property
    def needs_path(self) -> bool:
        """Whether the teacher's states are aimed at."""
        return self.objective == "trajectory"

    @property
    def wanted(self) -> Wanted:
        """Whole trajectories, or clean samples with noise."""
        return Wanted("path" if self.needs_path else "samples", batch_size=16)

    def begin(self, run: Run) -> "Tuning":
        """Before the first solver."""
        return Tuning(self, run)


class Tuning(Fitting):
    """The solvers of a run, one after the other.

    Args:
        options: what to tune.
        run: its data hold something out.
    Raises:
        ValueError: a solver that does not fit, nothing held out.
    """

    def __init__(self, options: TimestepTuner, run: Run) -> None:
        self.options, self.run = options, run
        run.data.source.check_halves()
        self.objectives = [self._objective(solver) for solver in options.solvers]
        self.judge = Judge(run, options.strategy, options.needs_path)
        self.finished: list[list[float]] = []
        self.stage: Stage | None = None
        self.ratio = torch.ones(0, dtype=torch.float64)
        self.adam: torch.optim.Adam | None = None

    @property
    def done(self) -> bool:
        """Whether every solver is tuned."""
        return len(self.finished) == len(self.objectives)

    def table(self, index: int) -> SolverTable:
        """The tuned table of a finished solver, or the current one."""
        is_finished = index < len(self.finished)
        ratio = torch.tensor(self.finished[index], dtype=torch.float64) if is_finished else self.ratio
        return self.objectives[index].ratios.table(ratio).detach()

    def tables(self) -> dict[str, SolverTable]:
        """The finished solvers and the one that is tuned."""
        known = len(self.finished) + (self.stage is not None)
        return {name: self.table(index) for index, name in enumerate(self.options.artifacts[:known])}

    def step(self, batch: Any) -> None:
        """One step of the optimiser."""
        objective, examples = self.objectives[len(self.finished)], batch[:]
        self.stage = stage = self.stage or self._begin(objective)
        move = self._adam if self.options.descent.optimizer == "adam" else self._gauss_newton
        losses = move(objective, examples, stage)
        self._project(objective.ratios, stage)
        self._log(losses, stage)
        self._advance(objective, stage)

    def state(self) -> dict[str, Any]:
        """The place in the list and what was found."""
        return {
            "finished": self.finished,
            "ratio": self.ratio.tolist(),
            "stage": None if self.stage is None else vars(self.stage).copy(),
            "adam": None if self.adam is None else self.adam.state_dict(),
            "evaluations": [vars(objective.evaluations) for objective in self.objectives],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.finished = state["finished"]
        self.stage = None if state["stage"] is None else Stage(**state["stage"])
        self._restart(torch.tensor(state["ratio"], dtype=torch.float64))
        if state["adam"] is not None:
            self.adam.load_state_dict(state["adam"])
        for objective, spent in zip(self.objectives, state["evaluations"]):
            objective.evaluations = Evaluations(**spent)

    def _objective(self, solver: str) -> Objective:
        denoiser = self.run.denoiser
        base, schedule = resolve_solver(solver, denoiser.schedule, denoiser=denoiser), denoiser.schedule
        if base.info.get("method") in LEARNED and self.run.rank == 0:
            warnings.warn(
                f"{solver} was learned for the timesteps it has: its rows do not aim at what the objective asks of "
                "them, and better losses have made worse images (docs/experiments.md)",
                stacklevel=2,
            )
        try:
            ratios = Ratios(base, (schedule.t_min, schedule.t_max), self.options.free_last)
            return Objective(denoiser, ratios, schedule, self.options.objective)
        except ValueError as error:
            raise ValueError(f"{solver} cannot be tuned: {error}") from error

    def _begin(self, objective: Objective) -> Stage:
        """Start with the next solver, at ratio 1."""
        self.run.restart_clock()
        self._restart(objective.ratios.initial())
        row = 0 if self.options.strategy == "sequential" else None
        before = self.judge.losses(objective, self.ratio)
        if not math.isfinite(sum(before)):
            raise ValueError(
                f"the losses of {self.options.solvers[len(self.finished)]} are {before} before it is tuned: check the "
                "network and its number format, and the samples"
            )
        return Stage(row, before=before)

    def _restart(self, ratio: Tensor) -> None:
        """Go on from these ratios, without the momentum of earlier steps."""
        self.ratio = ratio
        self.adam = torch.optim.Adam([ratio]) if self.options.descent.optimizer == "adam" else None

    def _adam(self, objective: Objective, examples: Trajectories, stage: Stage) -> Tensor:
        """Losses of the rows; a step along their gradient, by backpropagation."""
        leaf = self.ratio.clone().requires_grad_()
        run, rows = (objective.parallel, ()) if stage.row is None else (objective.sequential, (stage.row,))
        losses = run(objective.ratios.timesteps(leaf), examples, *rows)
        losses.sum().backward()
        parts = [losses.detach().cpu().double(), leaf.grad, torch.ones(1, dtype=torch.float64)]
        found = self.run.sum(torch.cat(parts) * len(examples))
        self.ratio.grad = found[len(losses) : -1] / found[-1]
        self.adam.param_groups[0]["lr"] = self.options.descent.rate(stage.step)
        self.adam.step()
        return found[: len(losses)] / found[-1]

    def _gauss_newton(self, objective: Objective, examples: Trajectories, stage: Stage) -> Tensor:
        """Losses of the rows; a step towards where they would be smallest."""
        timesteps = objective.ratios.timesteps(self.ratio)
        if stage.row is None:
            rows = objective.rows_on_data(examples, timesteps)
        else:
            rows = objective.rows_of_run(timesteps, examples, stage.row)
        found = slopes(objective, rows, self.ratio)
        sums = [found.square, found.gradient, found.curvature, torch.full_like(found.square, len(examples))]
        square, gradient, curvature, samples = self.run.sum(torch.stack(sums))
        past = torch.tensor(stage.curvature or [[0.0, 0.0]] * len(square), dtype=torch.float64)
        aim, past = towards(Slopes(found.middle, square, gradient, curvature), float(samples[0]), past)
        stage.curvature = past.tolist()
        back = torch.zeros_like(self.ratio)
        back[rows.index] = self.ratio[rows.index] - aim
        self.ratio.sub_(back, alpha=self.options.descent.rate(stage.step))
        return square / samples

    def _advance(self, objective: Objective, stage: Stage) -> None:
        """Count the step; go to the next row, or finish the solver."""
        stage.step += 1
        if stage.step < self.options.descent.steps:
            return
        if stage.row is not None and stage.row + 1 < objective.ratios.size:
            stage.row, stage.step, stage.curvature = stage.row + 1, 0, []
            self._restart(self.ratio)
            return
        self._finish_solver(objective, stage)

    def _finish_solver(self, objective: Objective, stage: Stage) -> None:
        """Keep what is better, and write the artifact."""
        index, name = len(self.finished), self.options.solvers[len(self.finished)]
        kept, initial = self.judge.keep(objective, stage, self.ratio), objective.ratios.initial()
        before = self.judge.report(objective, initial)
        after = before if torch.equal(kept, initial) else self.judge.report(objective, kept)
        self.finished.append(kept.tolist())
        self.stage = None
        changes = [f"{figure} {before.samples[figure]:.5g} -> {after.samples[figure]:.5g}" for figure in before.samples]
        images = f"; images: {listed(after.images)}" if after.images else ""
        spent = f"{objective.evaluations.calls} network calls in this process"
        self.run.say(f"{name}: held-out loss {', '.join(changes)}{images}; {spent}")
        self.run.save(self._result(index, stage, before, after))
        log_tuned(self.run, self.options.artifacts[index], stage, self.table(index), objective.base)

    def _project(self, ratios: Ratios, stage: Stage) -> None:
        """Back into the bounds; stop at a ratio that is no number."""
        if not bool(torch.isfinite(self.ratio).all()):
            raise ValueError(
                f"the ratios of {self.options.solvers[len(self.finished)]} are {self.ratio.tolist()} after step "
                f"{stage.step}: check the denoiser's outputs, or lower the learning rate; solvers tuned before it have "
                "their artifacts"
            )
        self.ratio.copy_(ratios.project(self.ratio))

    def _log(self, losses: Tensor, stage: Stage) -> None:
        index = len(self.finished)
        rows = range(len(losses)) if stage.row is None else [stage.row]
        stage.history.append(self.ratio.tolist())
        name, found = f"train/{self.options.artifacts[index]}", {"loss": losses.sum()}
        self.run.log({f"{name}/loss_{row}": loss for row, loss in zip(rows, losses)}, bar=False)
        if stage.row is not None:
            found["row"] = float(stage.row)
        found["learning_rate"] = self.options.descent.rate(stage.step)
        if self.adam is not None:
            found["gradient_norm"] = self.ratio.grad.norm()
        self.run.log({f"{name}/{key}": value for key, value in found.items()})

    def _result(self, index: int, stage: Stage, before: Reported, after: Reported) -> Result:
        options, data, objective = self.options, self.run.data, self.objectives[index]
        solver, source = options.solvers[index], data.source
        known = objective.base.info.get("fitted_on", {}).get("seeds", [])
        return Result(
            options.artifacts[index],
            self.table(index),
            objective.evaluations,
            source.record
            | {
                "base": solver if ":" in solver else Path(solver).name,
                "original_timesteps": objective.base.timesteps.tolist(),
                "samples": source.num_fitted + source.num_held,
                "seeds": [*known, *data.seed_ranges()],
            },
            {
                "objective": options.objective,
                **_named("before", before.samples),
                **_named("after", after.samples),
                "rows_before": before.losses,
                "rows_after": after.losses,
                **after.images,
                **{f"start_{name}": value for name, value in before.images.items()},
                **data.held_out_seeds(),
                "chosen_from": {
                    "before": sum(stage.before),
                    "after": sum(stage.after),
                    **dict(zip(("end_before", "end_after"), stage.ends)),
                },
            },
            {
                "solver": options.names[index],
                "objective": options.objective,
                "strategy": options.strategy,
                **vars(options.descent),
                "learning_rate": options.descent.peak,
                "free_last": options.free_last,
                "batch_size": data.batch_size or options.wanted.batch_size,
                "processes": self.run.world_size,
                "precision": self.run.precision,
            },
        )


def _named(when: str, figures: dict[str, float]) -> dict[str, float]:
    """The mean by the name of `when`, the others with it in front."""
    return {when if name == "mean" else f"{when}_{name}": value for name, value in figures.items()}


def solver_name(solver: str) -> str:
    """`ddim-10` for ddim:10, `olss-8` for some/folder/olss-8.json."""
    return Path(solver).stem if solver.endswith(".json") else solver.replace(":", "-").replace("@", "-")
