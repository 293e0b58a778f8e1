"""Solver search as a method: one stage for each number of evaluations, and an artifact from each."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from data.loader import ResumableLoader
from data.sources import Batch
from data.teacher_data import Wanted
from denoisers import Evaluations, class_labels, condition_to, with_scale
from evaluation.distances import error_figures, listed
from solver_search.descent import Descent
from solver_search.losses import Features, SearchLoss
from solver_search.memory import describe
from solver_search.objective import Compute, Objective
from solver_search.parameters import FreeParameters
from solver_search.stage import Stage
from solver_search.starts import Start
from solver_search.whitened import whitened
from solvers import SolverTable, sample
from solvers.artifact import table_from_dict, table_to_dict
from training.method import Fitting, Method, Result, Run
from training.record import log_table, takes_pictures
from training.run_card import SPENT

SHOWN = 16  # images in the log


@dataclass(frozen=True)
class SolverSearch(Method):
    """Searches solver tables that end where a slow teacher ends.

    Each count of `nfe` is a stage. Only the numbers of the table are trained; the network stays as it is.

    Args:
        nfe: network calls, or several numbers, searched one after the other.
        start: where a stage starts, and which numbers it has.
        descent: how they move.
        loss: what to match.
        extractor: its name (see evaluation/README.md), for the feature and kernel parts of the loss.
        statistics: of the data that the kernel part compares with, a file of `evaluation.statistics` made with that
            extractor; of other images than those that judge the solver.
        compute: in which pieces and number formats.
    Raises:
        ValueError: no number of evaluations, or one twice; a loss that lacks what it compares with, or that the
            optimizer cannot lower.
    Source: arXiv 2505.21114; the second-order search is this project's.
    """

    nfe: int | list[int] = 8
    start: Start = field(default_factory=Start)
    descent: Descent = field(default_factory=Descent)
    loss: SearchLoss = field(default_factory=SearchLoss)
    extractor: str | None = None
    statistics: str | None = None
    compute: Compute = field(default_factory=Compute)

    name: ClassVar[str] = "solver_search"

    def __post_init__(self) -> None:
        if not self.nfes or min(self.nfes) < 1 or len(set(self.nfes)) != len(self.nfes):
            raise ValueError(
                f"nfe is {self.nfe}: give one or several different numbers of evaluations, each at least 1"
            )
        if self.loss.needs_extractor and self.extractor is None:
            raise ValueError("the loss compares features but no extractor is given: set one, or loss.feature to 0")
        if bool(self.loss.kernel) != bool(self.statistics):
            raise ValueError("loss.kernel compares with the statistics of data: set both of them, or none")
        if self.loss.kernel and (self.descent.optimizer == "lm" or self.start.screening):
            raise ValueError(
                "loss.kernel has no residuals for Levenberg-Marquardt: use adam, whitened, and no screening"
            )
        if self.loss.kernel and self.compute.micro_batch < 3:
            raise ValueError("loss.kernel compares the images of a micro-batch with each other: give it 3 or more")

    @property
    def nfes(self) -> list[int]:
        """The numbers of evaluations, in the order of their stages."""
        return [self.nfe] if isinstance(self.nfe, int) else list(self.nfe)

    @property
    def artifacts(self) -> list[str]:
        """solver-search-<nfe>."""
        return [_name(nfe) for nfe in self.nfes]

    @property
    def wanted(self) -> Wanted:
        """All in one batch; the teacher's path where states on it are compared."""
        needs_path = self.loss.path > 0 or self.start.needs_path
        return Wanted("path" if needs_path else "ends")

    def begin(self, run: Run) -> "Search":
        """Before the first stage."""
        return Search(self, run)


class Search(Fitting):
    """The stages of a run, one after the other.

    Args:
        options: what to search.
        run: its data are a teacher's trajectories.
    Raises:
        ValueError: more evaluations than the teacher has, or a single trajectory held out.
    """

    def __init__(self, options: SolverSearch, run: Run) -> None:
        self.options, self.run, self.schedule = options, run, run.denoiser.schedule
        run.data.source.check_halves(may_be_empty=True)
        steps = run.data.source.table.num_rows
        if max(options.nfes) > steps:
            raise ValueError(
                f"{max(options.nfes)} evaluations are more than the teacher's {steps} steps: lower nfe, or make "
                "trajectories with more steps"
            )
        features = (options.extractor, options.statistics)
        extractor = Features(*features).to(run.device) if options.extractor else None
        most = options.compute.curvature_samples
        if most is not None and most < run.world_size:
            raise ValueError(f"curvature_samples {most}: each of {run.world_size} processes needs one; raise it")
        self.objective = Objective(run.denoiser, options.loss, extractor, options.compute, run.sum, self._share)
        self.judge = Objective(run.denoiser, options.loss, extractor, options.compute)
        self.stage: Stage | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.finished: dict[int, SolverTable] = {}

    @property
    def done(self) -> bool:
        """Whether the last stage has ended."""
        open_stages = [nfe for nfe in self.options.nfes if nfe not in self.finished]
        return not open_stages or (len(open_stages) == 1 and self.stage is not None and self.stage.done)

    def start(self) -> None:
        """Say what the run will need."""
        denoiser, compute, most = self.run.denoiser, self.options.compute, max(self.options.nfes)
        condition = condition_to(class_labels(denoiser, [0]), self.run.device)
        condition = with_scale(denoiser, condition, torch.ones(1, device=self.run.device))
        tangents = most * (most + 2) if self.options.descent.optimizer == "lm" else None
        batch, checkpointing = compute.micro_batch, compute.gradient_checkpointing
        self.run.say(describe(denoiser, condition, batch, most, checkpointing, tangents))

    def tables(self) -> dict[str, SolverTable]:
        """The finished tables and the one that is searched."""
        current = {} if self.stage is None else {self.stage.nfe: self.stage.table}
        return {_name(nfe): table for nfe, table in (current | self.finished).items()}

    def step(self, batch: Batch | tuple[int, ...]) -> None:
        """One step of the optimiser, after the end of a stage of the next one."""
        if self.stage is not None and self.stage.done:
            self.finish()
            self.objective.evaluations = Evaluations.of(self.run.denoiser)
            self.run.restart_clock()
        teacher = self._teacher(batch)
        stage = self.stage = self.stage or self._begun(self._next_stage(teacher))
        before = stage.theta.clone()
        loss, found = self._lm(stage, teacher) if self.optimizer is None else self._first_order(stage, teacher)
        if not (torch.isfinite(torch.tensor(loss)) and bool(torch.isfinite(found).all())):
            self._stop(stage, loss, before, found)
        stage.step += 1
        stage.done |= stage.step >= self.options.descent.steps
        if stage.done:
            self.end_epoch()
        self._log(stage, loss)

    def end_epoch(self) -> None:
        """Judge where the stage is now."""
        found = self._judge()
        if found:
            for name, value in found.items():
                key = f"train/{_name(self.stage.nfe)}/choosing_{name}"
                self.run.log({key: value}, bar=name == "rmse", of_epoch=True)

    def finish(self) -> None:
        """Write the stage's best table."""
        if self.stage is not None and self.stage.step:
            self._judge()
            self.finished[self.stage.nfe] = self.stage.best_table
            if self.stage.reported:
                self.run.say(f"nfe {self.stage.nfe}: the best has held-out {listed(self.stage.reported)}")
            self.run.save(self._result(self.stage))
            self.stage = None

    def state(self) -> dict[str, Any]:
        """The stage, the finished tables and the evaluations spent."""
        return {
            "stage": None if self.stage is None else self.stage.to_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "finished": {nfe: table_to_dict(table) for nfe, table in self.finished.items()},
            "evaluations": vars(self.objective.evaluations),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up the stage."""
        self.finished = {nfe: table_from_dict(values) for nfe, values in state["finished"].items()}
        self.objective.evaluations = Evaluations(**state["evaluations"])
        if state["stage"] is not None:
            self.stage = Stage.from_dict(state["stage"], self.options.start, self.schedule)
            self.optimizer = self.options.descent.make(self.stage.theta)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def _teacher(self, batch: Batch | tuple[int, ...]) -> Batch:
        """A batch as it is, or the trajectories of fresh seeds; on the device."""
        if not isinstance(batch, tuple):
            return batch.to(self.run.device)
        self.objective.evaluations.forward += len(batch) * self.run.data.source.table.nfe
        return self.run.data.run_teacher(batch, self.run.device)

    def _next_stage(self, teacher: Batch) -> Stage:
        """The next number of evaluations, from the best of its starts."""
        options = self.options
        nfe = next(nfe for nfe in options.nfes if nfe not in self.finished)
        stages = []
        for name, table in options.start.tables(nfe, self.schedule, self.finished).items():
            parameters = options.start.parameters(nfe, self.schedule, table)
            stages.append(Stage(nfe, name, parameters, parameters.initial()))
        losses = [self._screened(stage, teacher) for stage in stages] if len(stages) > 1 else [0.0]
        stage = stages[losses.index(min(losses))]
        if options.descent.whitens and isinstance(stage.parameters, FreeParameters):
            stage.parameters = whitened(stage.parameters, self.objective, teacher)
        self.optimizer = options.descent.make(stage.theta)
        self.run.say(f"nfe {nfe}: {stage.parameters.size} numbers, starting from {stage.start}")
        return stage

    def _judge(self) -> dict[str, float] | None:
        """Figures of the stage on the trajectories that choose, once a step; the best so far is kept, measured on those
        that report, and saved."""
        stage, data = self.stage, self.run.data
        if stage is None or stage.judged == stage.step or not data.source.num_choosing:
            return None
        stage.judged, found = stage.step, self._measured(stage, data.choosing_batches())
        if found["loss"] < stage.best_loss:
            stage.best_loss, stage.best_theta = found["loss"], stage.theta.clone()
            stage.reported = self._measured(stage, data.reporting_batches(), shows=True)
            stage.started = stage.started or stage.reported
            self.run.save(self._result(stage), is_final=False)
        return found

    @torch.no_grad()
    def _measured(self, stage: Stage, batches: ResumableLoader, shows: bool = False) -> dict[str, float]:
        """Errors and loss of the stage's table, on the trajectories of all processes."""
        total, squared = torch.zeros((), dtype=torch.float64), [torch.zeros(0)]
        for number, batch in enumerate(batches):
            teacher = self._teacher(batch)
            if shows and not number:
                self._show(stage.table, teacher)
            total += self.judge.value(stage.parameters, stage.theta, teacher) * len(teacher)
            squared.append(self.judge.squared_errors(stage.table, teacher))
        errors = self.run.together(torch.cat(squared).double(), batches.num_samples)
        return error_figures(errors) | {"loss": float(self.run.sum(total)) / len(errors)}

    def _begun(self, stage: Stage) -> Stage:
        """The stage, its start judged on held-out trajectories: what a search ends with is never worse."""
        self.stage = stage
        if stage.table.has_branches:
            self.objective.evaluations.calls_each = 1  # its calls are counted one by one
        found = self._judge()
        if found:
            if not math.isfinite(found["loss"]):
                self._refuse_start(stage)
            self.run.say(f"nfe {stage.nfe}: the start has held-out {listed(stage.reported)}")
        return stage

    def _share(self, count: int) -> int:
        """How many of the first samples of a step are this process's."""
        return len(range(self.run.rank, count, self.run.world_size))

    def _screened(self, stage: Stage, teacher: Batch) -> float:
        """Loss after a few steps of Levenberg-Marquardt."""
        if not self.options.start.screening:
            return self.objective.value(stage.parameters, stage.theta, teacher)
        for _ in range(self.options.start.screening):
            result, _ = self.objective.lm_step(stage.parameters, stage.theta, teacher, stage.damping)
            stage.theta, stage.damping = result.theta, result.damping
        return result.loss

    def _lm(self, stage: Stage, teacher: Batch) -> tuple[float, Tensor]:
        result, before = self.objective.lm_step(stage.parameters, stage.theta, teacher, stage.damping)
        stage.theta, stage.damping = result.theta, result.damping
        stage.done |= not result.moved or before - result.loss < self.options.descent.tolerance * before
        return result.loss, result.theta

    def _first_order(self, stage: Stage, teacher: Batch) -> tuple[float, Tensor]:
        def loss_here() -> Tensor:
            here = stage.parameters.project(stage.theta)
            loss, stage.theta.grad = self.objective.gradient(stage.parameters, here, teacher)
            return torch.tensor(loss, dtype=torch.float64)

        if self.options.descent.decay:
            self.optimizer.param_groups[0]["lr"] = self.options.descent.rate_at(stage.step)
        loss = self.optimizer.step(loss_here)
        stage.theta.copy_(stage.parameters.project(stage.theta))
        return float(loss), stage.theta

    def _log(self, stage: Stage, loss: float) -> None:
        """Figures and the table of a step, under the name of its artifact."""
        name, found = f"train/{_name(stage.nfe)}", {"loss": loss}
        if not self.options.loss.kernel:  # unbiased, so that it may be below zero
            found["rmse"] = loss**0.5
        if self.optimizer is None:
            found["damping"] = stage.damping.value
        else:
            found["gradient_norm"] = float(stage.theta.grad.norm())
            found["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.run.log({f"{name}/{key}": value for key, value in found.items()} | {SPENT: self._spent()})
        log_table(self.run.logger, _name(stage.nfe), stage.table, f"nfe {stage.nfe}, step {stage.step}")

    def _spent(self) -> float:
        """Network calls of all processes."""
        return float(self.objective.evaluations.summed(self.run.sum).calls)

    def _stop(self, stage: Stage, loss: float, good: Tensor, found: Tensor) -> None:
        """End the run at a loss that is not finite, the last good table saved."""
        if not stage.step:
            self._refuse_start(stage)
        stage.theta = good
        path = self.run.save(self._result(stage), is_final=False)
        raise ValueError(
            f"the loss is {loss} at step {stage.step} of {stage.nfe} evaluations, numbers {found.tolist()}: lower the "
            f"learning rate or start from another solver; the last good table is {path or 'in fitting.tables()'}"
        )

    def _refuse_start(self, stage: Stage) -> NoReturn:
        """Nothing has been found yet."""
        raise ValueError(
            f"the loss of the start, {stage.start} of {stage.nfe} evaluations, is not finite: check the network and "
            "its number format, and the trajectories"
        )

    def _show(self, table: SolverTable, teacher: Batch) -> None:
        """Images of the current table above the teacher's, where the logger takes pictures."""
        if self.run.rank or not takes_pictures(self.run.logger):
            return
        from evaluation.pictures import image_grid

        part = teacher[:SHOWN]
        with torch.no_grad():
            images = sample(self.run.denoiser, table, part.noise, part.condition)
        self.run.logger.log_image(
            f"pictures/{_name(self.stage.nfe)}", [image_grid(torch.cat([images, part.end]), len(part))]
        )

    def _result(self, stage: Stage) -> Result:
        options, data = self.options, self.run.data
        return Result(
            _name(stage.nfe),
            stage.best_table,
            self.objective.evaluations,
            data.source.record | {"seeds": data.seed_ranges()},
            _reported(stage) | data.held_out_seeds() if stage.reported else {},
            {
                "nfe": stage.nfe,
                "start": stage.start,
                **vars(options.descent),
                "learning_rate": None if self.optimizer is None else options.descent.learning_rate,
                "steps": stage.step,
                "loss": vars(options.loss),
                "extractor": options.extractor if options.loss.needs_extractor else None,
                "statistics": options.statistics,
                "train_timesteps": options.start.train_timesteps,
                "keep_last_row": options.start.keep_last_row,
                "precision": self.run.precision,
            },
        )


def _reported(stage: Stage) -> dict[str, Any]:
    """Figures of the best table and, named so, of the start."""
    return stage.reported | {f"start_{name}": value for name, value in stage.started.items()}


def _name(nfe: int) -> str:
    """Of the artifact."""
    return f"solver-search-{nfe}"
