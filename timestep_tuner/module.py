"""Timestep tuning with Lightning: one run tunes a list of solvers and writes an artifact for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from denoisers import Evaluations, load_denoiser, with_guidance
from solvers import SolverTable, resolve_solver
from timestep_tuner.data import TunerData
from timestep_tuner.gauss_newton import Slopes, slopes, towards
from timestep_tuner.objective import OBJECTIVES, STRATEGIES, Examples, Objective
from timestep_tuner.ratios import Ratios
from timestep_tuner.record import log_tuned, save_tuned
from timestep_tuner.stage import Stage
from training.testing import Evaluation, TableModule

HALVINGS = 6  # of the way of the ratios from 1, before they are given up
LEARNED = ("olss", "solver_search")
OPTIMIZERS = {"gauss_newton": 1.0, "adam": 0.01}  # and their default learning rates


class TimestepTuner(TableModule):
    """Tunes what each solver of a list tells the network at every evaluation; nothing else of the solver changes.

    Solvers are tuned one after the other. The parallel strategy tunes all rows of a solver at once, in `steps` steps;
    the sequential one row after row, `steps` steps each. Rows that are no better on the held-out samples keep their
    timestep, so a solver never ends worse than it started.

    Args:
        denoiser: the network, or a path for `load_denoiser`.
        solvers: what to tune, name:steps or artifacts' paths.
        output: artifact to write, `*.json`; `{name}` stands for the solver, `ddim-10` for ddim:10, or the file's name.
        objective: `noise` (the paper's) or `trajectory`.
        strategy: `parallel` or `sequential`.
        optimizer: `gauss_newton`, or `adam` (the paper's).
        learning_rate: of Adam in units of the ratio, default 0.01; of Gauss-Newton the share of its step, default 1.
        steps: optimiser steps, for a solver (parallel) or for each of its rows (sequential).
        decay: last share of the steps over which the rate falls linearly to zero; 0 keeps it.
        free_last: also tune the last row.
        guidance_scale: uncond + guidance_scale (cond - uncond).
        evaluation: what `train.py test` measures.
    Raises:
        ValueError: an option out of its range; a solver that does not fit; on set-up: data that do not.
    Source: arXiv 2310.09469: sequential, Adam, learning rate 2e-3, 500 steps, no decay.
    """

    strict_loading = False

    def __init__(
        self,
        denoiser: str | nn.Module,
        solvers: str | list[str],
        output: str | None = None,
        objective: str = "noise",
        strategy: str = "parallel",
        optimizer: str = "gauss_newton",
        learning_rate: float | None = None,
        steps: int = 20,
        decay: float = 0.5,
        free_last: bool = False,
        guidance_scale: float = 1.0,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.evaluation = evaluation
        self.solvers = [solvers] if isinstance(solvers, str) else list(solvers)
        self.names = [solver_name(solver) for solver in self.solvers]
        _check_options(self.names, output, objective, strategy, optimizer, learning_rate, steps, decay)
        network = load_denoiser(denoiser) if isinstance(denoiser, str) else denoiser
        self.denoiser = with_guidance(network.eval().requires_grad_(False), guidance_scale)
        self.learning_rate = OPTIMIZERS[optimizer] if learning_rate is None else learning_rate
        self.output, self.strategy, self.optimizer = output, strategy, optimizer
        self.steps, self.decay, self.free_last = steps, decay, free_last
        self.objectives = [self._objective(solver, objective) for solver in self.solvers]
        self.kind = objective
        self.ratio = nn.Parameter(torch.ones(max(o.ratios.size for o in self.objectives), dtype=torch.float64))
        self.automatic_optimization = False
        self.stage: Stage | None = None
        self.finished: list[list[float]] = []

    @property
    def needs_path(self) -> bool:
        """Whether the data must be whole trajectories."""
        return self.kind == "trajectory"

    def table(self, index: int | None = None) -> SolverTable:
        """The tuned table of a finished solver; by default the current one."""
        index = len(self.finished) if index is None else index
        ratios = self.objectives[index].ratios
        finished = index < len(self.finished)
        ratio = torch.tensor(self.finished[index], dtype=torch.float64) if finished else self._ratio(ratios)
        return ratios.table(ratio).detach()

    def current_tables(self) -> dict[str, SolverTable]:
        """The finished solvers and the one that is tuned."""
        known = len(self.finished) + (self.stage is not None)
        return {self.names[index]: self.table(index) for index in range(known)}

    def artifact_paths(self) -> dict[str, Path]:
        """One for each solver."""
        return {name: Path(self.output.replace("{name}", name)) for name in self.names if self.output}

    def used_seeds(self) -> list[list[int]]:
        """Those of the samples and their noises."""
        return self.trainer.datamodule.seed_ranges()

    def setup(self, stage: str) -> None:
        """Refuse data of another kind."""
        if not isinstance(self.trainer.datamodule, TunerData):
            raise ValueError(
                f"a tuner takes timestep_tuner.data.TunerData, not {type(self.trainer.datamodule).__name__}"
            )

    def training_step(self, batch: Examples, batch_idx: int) -> None:
        """One step of the optimiser."""
        if len(self.finished) == len(self.solvers):  # a finished run is resumed
            self.trainer.should_stop = True
            return
        if self.stage is None:
            self._begin()
        stage, objective = self.stage, self.objectives[len(self.finished)]
        optimizer: Any = self.optimizers()
        optimizer.param_groups[0]["lr"] = self.learning_rate * stage.rate(self.steps, self.decay)
        optimizer.zero_grad()
        losses = (self._gradient if self.optimizer == "adam" else self._gauss_newton)(objective, batch, stage)
        optimizer.step()
        self._project(objective.ratios)
        self._log(losses, stage)
        self._advance(objective)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """On the ratios: Adam, or plain steps along what Gauss-Newton leaves as the gradient."""
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.SGD
        return kind([self.ratio], lr=self.learning_rate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The ratios alone: the network stays out of checkpoints."""
        return {"ratio": self.ratio.detach()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the place in the list and what was found."""
        super().on_save_checkpoint(checkpoint)
        spent = [vars(objective.evaluations) for objective in self.objectives]
        stage = None if self.stage is None else vars(self.stage).copy()
        checkpoint["tuner"] = {"finished": self.finished, "stage": stage, "evaluations": spent}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["tuner"]
        self.finished = saved["finished"]
        self.stage = None if saved["stage"] is None else Stage(**saved["stage"])
        for objective, spent in zip(self.objectives, saved["evaluations"]):
            objective.evaluations = Evaluations(**spent)

    def held_out(self, objective: Objective, ratio: Tensor) -> list[float]:
        """Losses of the rows on the held-out samples of all processes, from states as the strategy has them."""
        run = objective.parallel if self.strategy == "parallel" else objective.sequential
        return self._over_held_out(run, objective.ratios.timesteps(ratio))

    def _over_held_out(self, run: Callable, timesteps: Tensor) -> list[float]:
        """Mean of run(timesteps, examples) over the held-out samples of all processes."""
        total: Tensor | float = 0.0
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in self.trainer.datamodule.held_out():
                losses = run(timesteps, batch.to(self.device)).double().cpu()
                total = total + torch.cat([losses, torch.ones(1, dtype=torch.float64)]) * len(batch)
        total = self.sum_over_processes(torch.as_tensor(total))
        return (total[:-1] / total[-1]).tolist()

    def _objective(self, solver: str, kind: str) -> Objective:
        schedule = self.denoiser.schedule
        base = resolve_solver(solver, schedule, denoiser=self.denoiser)
        if base.info.get("method") in LEARNED:
            rank_zero_warn(
                f"{solver} was learned for the timesteps it has: its rows do not aim at what the objective asks of "
                "them, and better losses have made worse images (docs/results.md)"
            )
        try:
            ratios = Ratios(base, (schedule.t_min, schedule.t_max), self.free_last)
            return Objective(self.denoiser, ratios, schedule, kind)
        except ValueError as error:
            raise ValueError(f"{solver} cannot be tuned: {error}") from error

    def _begin(self) -> None:
        """Start with the next solver, at ratio 1."""
        objective = self.objectives[len(self.finished)]
        self.restart_clock()
        with torch.no_grad():
            self.ratio.fill_(1)
        self._forget_momentum()
        self.stage = Stage(
            row=0 if self.strategy == "sequential" else None,
            before=self.held_out(objective, self._ratio(objective.ratios)),
        )

    def _gradient(self, objective: Objective, batch: Examples, stage: Stage) -> Tensor:
        """Losses of the rows; their gradient by backpropagation."""
        timesteps = objective.ratios.timesteps(self.ratio[: objective.ratios.size].cpu())
        run, rows = (objective.parallel, ()) if stage.row is None else (objective.sequential, (stage.row,))
        losses = run(timesteps, batch, *rows)
        self.manual_backward(losses.sum())
        return losses.detach()

    def _gauss_newton(self, objective: Objective, batch: Examples, stage: Stage) -> Tensor:
        """Losses of the rows; the way back from where they would be smallest stands for their gradient."""
        ratio = self._ratio(objective.ratios)
        timesteps = objective.ratios.timesteps(ratio)
        if stage.row is None:
            rows = objective.rows_on_data(batch, timesteps)
        else:
            rows = objective.rows_of_run(timesteps, batch, stage.row)
        found = slopes(objective, rows, ratio)
        sums = [found.square, found.gradient, found.curvature, torch.full_like(found.square, len(batch))]
        square, gradient, curvature, samples = self.sum_over_processes(torch.stack(sums))
        past = torch.tensor(stage.curvature or [[0.0, 0.0]] * len(square), dtype=torch.float64)
        aim, past = towards(Slopes(found.middle, square, gradient, curvature), float(samples[0]), past)
        stage.curvature = past.tolist()
        self.ratio.grad = torch.zeros_like(self.ratio)
        self.ratio.grad[rows.index] = (ratio[rows.index] - aim).to(self.ratio)
        return square / samples

    def _advance(self, objective: Objective) -> None:
        """Count the step; go to the next row, or finish the solver."""
        stage = self.stage
        assert stage is not None
        stage.step += 1
        if stage.step < self.steps:
            return
        if stage.row is not None and stage.row + 1 < objective.ratios.size:
            stage.row, stage.step, stage.curvature = stage.row + 1, 0, []
            self._forget_momentum()
            return
        self._finish(objective)

    def _finish(self, objective: Objective) -> None:
        """Keep what is better, write the artifact, and stop after the last solver."""
        stage, index = self.stage, len(self.finished)
        assert stage is not None
        ratio = self._keep(objective, stage)
        self.finished.append(ratio.tolist())
        self.stage = None
        spent = objective.evaluations.summed(self.sum_over_processes)
        rank_zero_info(
            f"{self.solvers[index]}: held-out loss {sum(stage.before):.5g} -> {sum(stage.after):.5g}, "
            f"{spent.calls} network calls"
        )
        log_tuned(self, index, stage, save_tuned(self, index, stage, spent))
        self.trainer.should_stop = len(self.finished) == len(self.solvers)

    def _keep(self, objective: Objective, stage: Stage) -> Tensor:
        """The ratios, 1 for rows that are better so on the held-out samples; sets the losses after.

        Where the teacher's images are known, the solver as a whole must end no further from them either.
        """
        ratio, initial = self._ratio(objective.ratios), objective.ratios.initial()
        stage.after = self.held_out(objective, ratio)
        for row in range(len(ratio)):
            if stage.after[row] < stage.before[row]:
                continue
            without = torch.where(torch.arange(len(ratio)) == row, initial, ratio)
            losses = self.held_out(objective, without)
            if sum(losses) < sum(stage.after):  # what a row is told also changes the rows after it
                ratio, stage.after = without, losses
        if self.needs_path:
            ratio, stage.ends = self._shortened(objective, ratio)
            stage.after = self.held_out(objective, ratio)
        if not sum(stage.after) < sum(stage.before):
            ratio, stage.after, stage.ends = initial, stage.before, stage.ends[:1] * 2
        return ratio

    def _shortened(self, objective: Objective, ratio: Tensor) -> tuple[Tensor, list[float]]:
        """The ratios moved back towards 1 until the images are no worse; the end losses before and after."""
        initial = objective.ratios.initial()
        before = self._over_held_out(objective.end_loss, objective.ratios.timesteps(initial))[0]
        for _ in range(HALVINGS):
            after = self._over_held_out(objective.end_loss, objective.ratios.timesteps(ratio))[0]
            if after <= before:
                return ratio, [before, after]
            ratio = (ratio + initial) / 2
        return initial, [before, before]

    def _project(self, ratios: Ratios) -> None:
        """Back into the bounds; stop at a ratio that is no number."""
        ratio = self.ratio.detach()[: ratios.size].cpu()
        if not bool(torch.isfinite(ratio).all()):
            solver, step = self.solvers[len(self.finished)], self.stage.step if self.stage else 0
            raise ValueError(
                f"the ratios of {solver} are {ratio.tolist()} after step {step}: check the denoiser's outputs, or "
                "lower the learning rate; solvers tuned before it have their artifacts"
            )
        with torch.no_grad():
            self.ratio[: ratios.size] = ratios.project(ratio).to(self.ratio)

    def _log(self, losses: Tensor, stage: Stage) -> None:
        index, ratio = len(self.finished), self.ratio.detach().cpu()
        rows = range(len(losses)) if stage.row is None else [stage.row]
        stage.history.append(ratio[: self.objectives[index].ratios.size].tolist())
        self.log_dict({f"{self.names[index]}/loss_{row}": loss for row, loss in zip(rows, losses)})
        self.log_dict(
            {"loss": losses.sum(), "solver": float(index + 1), "row": float(-1 if stage.row is None else stage.row)},
            prog_bar=True,
        )

    def _forget_momentum(self) -> None:
        """Adam would otherwise go on moving rows that are finished."""
        optimizer: Any = self.optimizers()
        optimizer.optimizer.state.clear()

    def _ratio(self, ratios: Ratios) -> Tensor:
        return self.ratio.detach()[: ratios.size].cpu().clone()


def solver_name(solver: str) -> str:
    """`ddim-10` for ddim:10, `olss-8` for some/folder/olss-8.json."""
    return Path(solver).stem if solver.endswith(".json") else solver.replace(":", "-").replace("@", "-")


def _check_options(
    names: list[str],
    output: str | None,
    objective: str,
    strategy: str,
    optimizer: str,
    learning_rate: float | None,
    steps: int,
    decay: float,
) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"the solvers have names {names}: give one or more, no two of the same name")
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: use one of {', '.join(OBJECTIVES)}")
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    if (learning_rate is not None and learning_rate <= 0) or steps < 1 or not 0 <= decay <= 1:
        raise ValueError(f"learning_rate {learning_rate} and steps {steps} must be positive, decay {decay} in [0, 1]")
    if output is not None and (not output.endswith(".json") or (len(names) > 1 and "{name}" not in output)):
        raise ValueError(f"output {output!r} must end in .json, and contain {{name}} where several solvers are tuned")
