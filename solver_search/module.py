"""Solver search with Lightning: one run searches a list of evaluation counts and writes an artifact for each."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from data.teacher import default_teacher
from data.trajectories import run_teacher
from denoisers import Evaluations, class_labels, condition_to, load_denoiser, with_guidance, with_scale
from solver_search.data import Samples, SearchData
from solver_search.losses import Features, SearchLoss, TeacherPath
from solver_search.memory import describe
from solver_search.objective import Objective
from solver_search.record import log_samples, save_table
from solver_search.stage import Stage, begin_stage
from solvers import SolverTable, resolve_solver
from solvers.artifact import table_from_dict, table_to_dict
from solvers.identity import guidance_range
from training.record import log_table, upload_solver
from training.testing import Evaluation, TableModule

OPTIMIZERS = ("lm", "lion", "adam")


class SolverSearch(TableModule):
    """Searches solver tables that end where a slow teacher ends.

    Each count of `nfe` is a stage of `steps` optimiser steps. Only the numbers of the table are trained; the network
    stays as it is, out of the gradients and out of the checkpoints.

    Args:
        denoiser: the network, or a path for `load_denoiser`.
        output: artifact to write, `*.json`; `{nfe}` stands for the number of evaluations.
        nfe: evaluations, or several, searched one after the other.
        start: where a stage starts: a named solver without its steps, an artifact's path (with `{nfe}`), or several,
            of which the one with the lowest loss after `screening` steps goes on; `paper` for the paper's own
            parametrisation and start.
        warm_start: the solution with fewer evaluations, its widest steps split, is a further start of a stage.
        optimizer: `lm` (Levenberg-Marquardt), `lion` or `adam`.
        learning_rate: of lion and adam.
        steps: optimiser steps of a stage.
        tolerance: a stage of Levenberg-Marquardt ends when a step lowers the loss by a smaller share.
        screening: Levenberg-Marquardt steps given to each of several starts.
        loss: what to match.
        extractor: classifier folder, `timm:NAME` or `inception`, for the feature part of the loss.
        train_timesteps: whether the timesteps told to the network move.
        finish: `data` or `end`, for the paper's parametrisation, see `PaperParameters`.
        guidance_scale: of the denoiser; [lowest, highest] searches one table for a range.
        usable_guidance: [lowest, highest] scale the artifacts may be used at; default: what they were searched at.
        teacher: solver of fresh trajectories; default ddim:100, or euler:100 for a flow schedule.
        micro_batch: samples that go through the network at once.
        tangent_chunk: forward-mode tangents that do, each of `micro_batch` samples.
        tangent_precision: `bf16` computes the derivatives under autocast, which is two to three times as fast.
        curvature_samples: samples of a batch that the Gauss-Newton matrix comes from; the gradient comes from all.
        gradient_checkpointing: recompute each evaluation's activations in the backward pass.
        evaluation: what `train.py test` measures.
    Raises:
        ValueError: an option out of its range, a start or a cache that does not fit.
    Source: arXiv 2505.21114; the second-order search is this project's.
    """

    strict_loading = False

    def __init__(
        self,
        denoiser: str | nn.Module,
        output: str | None = None,
        nfe: int | list[int] = 8,
        start: str | list[str] = "dpmpp",
        warm_start: bool = False,
        optimizer: str = "lm",
        learning_rate: float = 0.01,
        steps: int = 8,
        tolerance: float = 1e-3,
        screening: int = 0,
        loss: SearchLoss = SearchLoss(),  # noqa: B008 - frozen
        extractor: str | None = None,
        train_timesteps: bool = True,
        finish: str = "data",
        guidance_scale: float | list[float] = 1.0,
        usable_guidance: list[float] | None = None,
        teacher: str | None = None,
        micro_batch: int = 32,
        tangent_chunk: int | None = 4,
        tangent_precision: str = "float32",
        curvature_samples: int | None = None,
        gradient_checkpointing: bool = False,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.evaluation = evaluation
        self.nfe = [nfe] if isinstance(nfe, int) else list(nfe)
        self.starts = [start] if isinstance(start, str) else list(start)
        _check_options(self.nfe, output, optimizer, learning_rate, steps)
        self.automatic_optimization = False
        self.guidance_scale, self.usable_guidance = guidance_scale, usable_guidance
        network = load_denoiser(denoiser) if isinstance(denoiser, str) else denoiser
        self.denoiser = with_guidance(network.eval().requires_grad_(False), guidance_scale)
        self.output, self.warm_start = output, warm_start
        self.optimizer_name, self.learning_rate = optimizer, learning_rate
        self.steps, self.tolerance, self.screening, self.loss = steps, tolerance, screening, loss
        self.train_timesteps, self.finish, self.teacher = train_timesteps, finish, teacher
        self.extractor = Features(extractor) if extractor else None
        self.objective = Objective(
            self.denoiser,
            loss,
            self.extractor,
            micro_batch,
            tangent_chunk,
            gradient_checkpointing,
            tangent_precision,
            curvature_samples,
            self.sum_over_processes,
        )
        most = max(self.nfe)
        self.theta = nn.Parameter(torch.zeros(most * (most + 2), dtype=torch.float64))
        self.stage: Stage | None = None
        self.finished: dict[int, SolverTable] = {}

    @property
    def needs_path(self) -> bool:
        """Whether the teacher's states between the first and the last are used."""
        return self.loss.path > 0 or (self.finish == "end" and "paper" in self.starts)

    def table(self, nfe: int | None = None) -> SolverTable:
        """The current table, or the finished one of an evaluation count."""
        if nfe is not None and nfe in self.finished:
            return self.finished[nfe]
        if self.stage is None or nfe not in (None, self.stage.nfe):
            raise ValueError(f"there is no table of {nfe} evaluations yet: finished are {sorted(self.finished)}")
        return self.stage.parameters.table(self._theta).detach()

    def current_tables(self) -> dict[str, SolverTable]:
        """The finished tables and the one that is searched."""
        current = {} if self.stage is None else {f"solver-search-{self.stage.nfe}": self.table()}
        return current | {f"solver-search-{nfe}": table for nfe, table in self.finished.items()}

    def artifact_paths(self) -> dict[str, Path]:
        """One for each number of evaluations."""
        names = [(nfe, (self.output or "").replace("{nfe}", str(nfe))) for nfe in self.nfe]
        return {f"solver-search-{nfe}": Path(name) for nfe, name in names if name}

    def used_seeds(self) -> list[list[int]]:
        """Those of the trajectories."""
        return self.trainer.datamodule.seed_ranges()

    def setup(self, stage: str) -> None:
        """Refuse trajectories of another model or guidance, or of too few steps, before any work."""
        data = self.trainer.datamodule
        if not isinstance(data, SearchData):
            raise ValueError(f"a solver search learns from solver_search.data.SearchData, not {type(data).__name__}")
        caches = data.caches
        for cache in caches:
            cache.check(self.denoiser)
        self.teacher_table = (
            caches[0].table
            if caches
            else resolve_solver(self.teacher or default_teacher(self.denoiser.schedule), self.denoiser.schedule)
        )
        if max(self.nfe) > self.teacher_table.nfe:
            raise ValueError(
                f"{max(self.nfe)} evaluations are more than the teacher's {self.teacher_table.nfe} steps: lower nfe, "
                "or make trajectories with more steps"
            )

    def on_fit_start(self) -> None:
        """Say what the run will need."""
        rank_zero_info(describe(self.objective, max(self.nfe), self.optimizer_name == "lm", len(self.theta)))

    def training_step(self, batch: Samples, batch_idx: int) -> None:
        """One step of the optimiser."""
        if self.stage is not None and self.stage.done:
            self._finish()
            self.stage, self.objective.evaluations = None, Evaluations.of(self.denoiser)
            self.restart_clock()
        teacher = self._teacher_path(batch)
        if self.stage is None and not self._next_stage(teacher):
            return
        stage = self.stage
        assert stage is not None
        before = self._theta
        loss, after = self._lm(teacher) if self.optimizer_name == "lm" else self._first_order(teacher)
        if not (torch.isfinite(torch.tensor(loss)) and bool(torch.isfinite(after).all())):
            self._stop(loss, before, after)
        stage.step += 1
        stage.done |= stage.step >= self.steps
        self.log_dict(
            {"train/loss": loss, "train/rmse": loss**0.5, "nfe": float(stage.nfe)}
            | {"evaluations": float(self.objective.evaluations.calls)},
            prog_bar=True,
        )
        log_table(self.logger, "table", self.table(), f"nfe {stage.nfe}, step {stage.step}")
        if stage.done and stage.nfe == self.nfe[-1]:
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._errors: list[tuple[float, float, int]] = []

    def validation_step(self, batch: Samples, batch_idx: int) -> None:
        """Loss and RMSE of the current table on held-out trajectories."""
        if self.stage is None:
            return
        teacher = self._teacher_path(batch)
        local = Objective(self.denoiser, self.loss, self.extractor, self.objective.micro_batch)
        loss = local.value(self.stage.parameters, self._theta, teacher)
        if batch_idx == 0:
            log_samples(self, teacher)
        self._errors.append((loss, local.rmse(self.table(), teacher), len(teacher)))

    def on_validation_epoch_end(self) -> None:
        """Keep the best theta of the stage."""
        if self.stage is None:
            return
        weights = torch.tensor([[loss * n, rmse**2 * n, n] for loss, rmse, n in self._errors], dtype=torch.float64)
        loss, squared, count = self.sum_over_processes(weights.reshape(-1, 3).sum(0)).tolist()
        rmse = (squared / max(count, 1)) ** 0.5
        self.log("val/rmse", rmse, prog_bar=True)
        self.log("val/loss", loss / max(count, 1))
        if count and loss / count < self.stage.best_loss:
            self.stage.best_loss, self.stage.best_rmse = loss / count, rmse
            self.stage.best_theta = self._theta
            save_table(self, self.stage)

    def on_train_end(self) -> None:
        """Finish the last stage."""
        if self.stage is not None and self.stage.step:
            self._finish()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lion or Adam; for Levenberg-Marquardt the optimiser only takes the step that was found."""
        if self.optimizer_name == "lion":
            from timm.optim import Lion  # imports torchvision, which takes seconds

            return Lion([self.theta], lr=self.learning_rate)
        if self.optimizer_name == "adam":
            return torch.optim.Adam([self.theta], lr=self.learning_rate)
        return torch.optim.SGD([self.theta], lr=1.0)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The searched numbers alone."""
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name == "theta"}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stage, the finished tables and the evaluations spent."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["search"] = {
            "stage": None if self.stage is None else self.stage.to_dict(),
            "finished": {nfe: table_to_dict(table) for nfe, table in self.finished.items()},
            "evaluations": vars(self.objective.evaluations),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the stage."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["search"]
        self.finished = {nfe: table_from_dict(values) for nfe, values in saved["finished"].items()}
        self.stage = None if saved["stage"] is None else Stage.from_dict(saved["stage"], self)
        self.objective.evaluations = Evaluations(**saved["evaluations"])

    @property
    def _theta(self) -> Tensor:
        """The numbers of the current stage, (K,) on the CPU."""
        assert self.stage is not None
        return self.theta.detach()[: self.stage.parameters.size].cpu().clone()

    def _set_theta(self, theta: Tensor) -> None:
        with torch.no_grad():
            self.theta.zero_()
            self.theta[: len(theta)] = theta.to(self.theta)

    def _lm(self, teacher: TeacherPath) -> tuple[float, Tensor]:
        stage, theta = self.stage, self._theta
        result, before = self.objective.lm_step(stage.parameters, theta, teacher, stage.damping)
        stage.damping = result.damping
        stage.done |= not result.moved or before - result.loss < self.tolerance * before
        self._descend(theta - result.theta)
        return result.loss, result.theta

    def _first_order(self, teacher: TeacherPath) -> tuple[float, Tensor]:
        loss, gradient = self.objective.gradient(self.stage.parameters, self._theta, teacher)
        if bool(torch.isfinite(gradient).all()):
            self._descend(gradient)
            self._set_theta(self.stage.parameters.project(self._theta))
        return loss, self._theta if bool(torch.isfinite(gradient).all()) else gradient

    def _descend(self, gradient: Tensor) -> None:
        """Let the optimiser act, so that Lightning counts the step."""
        self.theta.grad = torch.zeros_like(self.theta)
        self.theta.grad[: len(gradient)] = gradient.to(self.theta)
        self.optimizers().step()

    def _next_stage(self, teacher: TeacherPath) -> bool:
        """Whether there is one; there is none when a finished run is resumed."""
        todo = [nfe for nfe in self.nfe if nfe not in self.finished]
        if not todo:
            self.trainer.should_stop = True
            return False
        self.stage, theta = begin_stage(self, todo[0], teacher)
        self._set_theta(theta)
        self.optimizers().optimizer.state.clear()
        rank_zero_info(f"nfe {self.stage.nfe}: {self.stage.parameters.size} numbers, starting from {self.stage.start}")
        return True

    def _finish(self) -> None:
        """Write the stage's best table."""
        stage = self.stage
        if stage.best_theta is not None:
            self._set_theta(stage.best_theta)
        self.finished[stage.nfe] = self.table()
        path = save_table(self, stage)
        if path is not None:
            upload_solver(self.logger, path)

    def _stop(self, loss: float, good: Tensor, found: Tensor) -> None:
        """End the run at a loss that is not finite, the last good table saved."""
        stage = self.stage
        self._set_theta(good if stage.best_theta is None else stage.best_theta)
        path = save_table(self, stage)
        raise ValueError(
            f"the loss is {loss} at step {stage.step} of {stage.nfe} evaluations, numbers {found.tolist()}: lower the "
            f"learning rate or start from another solver; the last good table is {path or 'module.table()'}"
        )

    def _teacher_path(self, batch: Samples) -> TeacherPath:
        if batch.states is None:
            batch = self._run_teacher(batch)
        table = self.teacher_table
        nodes = [table.alpha, table.sigma]
        if batch.states.shape[1] == 2:
            nodes = [value[[0, -1]] for value in nodes]
        condition = with_scale(self.denoiser, batch.condition, batch.guidance_scale)
        return TeacherPath(batch.states, *nodes, batch.states[:, 0] / table.start_scale, condition)

    def _run_teacher(self, batch: Samples) -> Samples:
        """Fresh trajectories; each seed has its own guidance scale where there is a range."""
        seeds = batch.seeds.tolist()
        low, high = guidance_range(self.guidance_scale)
        share = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(s)) for s in seeds]).double()
        scales = low + (high - low) * share
        condition = condition_to(class_labels(self.denoiser, seeds), self.device)
        found = run_teacher(
            self.denoiser,
            self.teacher_table,
            seeds,
            condition=lambda _: with_scale(self.denoiser, condition, scales),
            device=self.device,
        )
        self.objective.evaluations.forward += len(seeds) * self.teacher_table.nfe
        states = found.states if self.needs_path else found.states[:, [0, -1]]
        return Samples(states, batch.seeds, condition, scales)


def _check_options(nfe: list[int], output: str | None, optimizer: str, learning_rate: float, steps: int) -> None:
    if not nfe or min(nfe) < 1 or len(set(nfe)) != len(nfe):
        raise ValueError(f"nfe is {nfe}: give one or several different numbers of evaluations, each at least 1")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    if learning_rate <= 0 or steps < 1:
        raise ValueError(f"learning_rate {learning_rate} and steps {steps} must be positive")
    if output is not None and (not output.endswith(".json") or (len(nfe) > 1 and "{nfe}" not in output)):
        raise ValueError(f"output {output!r} must end in .json, and contain {{nfe}} where several are searched")
