"""How far a solver's tuning is, what its ratios are worth on samples held out, and which of them are kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from data.loader import ResumableLoader
from data.shards import Trajectories
from evaluation.distances import error_figures
from timestep_tuner.objective import Objective, squared
from training.method import Run

HALVINGS = 6  # of the way of the ratios from 1, before they are given up


@dataclass
class Stage:
    """State of one solver's tuning; its fields go into checkpoints as they are.

    Args:
        row: row being tuned, None when all are.
        before: losses of the rows at ratio 1 on the samples that choose.
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


@dataclass(frozen=True)
class Reported:
    """What ratios are worth on the samples that report.

    Args:
        losses: of the rows, averaged over the samples.
        samples: mean, median, 99th percentile and worst of the samples' losses, summed over the rows.
        images: see `error_figures`; empty where the teacher's images are not known.
    """

    losses: list[float]
    samples: dict[str, float]
    images: dict[str, float]


@dataclass
class Judge:
    """Losses on the held-out samples of all processes: one half chooses what is kept, the other reports.

    Args:
        run: its data hold some out.
        strategy: where states come from, `parallel` or `sequential`.
        needs_path: whether the whole solver's images must be no worse either.
    """

    run: Run
    strategy: str
    needs_path: bool

    def losses(self, objective: Objective, ratio: Tensor) -> list[float]:
        """Those of the rows on the samples that choose, from states as the strategy has them."""
        return self._row_losses(objective, ratio, self.run.data.choosing_batches()).mean(0).tolist()

    def report(self, objective: Objective, ratio: Tensor) -> Reported:
        """Figures of samples that chose nothing."""
        losses = self._row_losses(objective, ratio, self.run.data.reporting_batches())
        sums, images = losses.sum(1), {}
        if self.needs_path:
            elements = torch.Size(self.run.denoiser.sample_shape).numel()
            images = error_figures(self._end_losses(objective, ratio, self.run.data.reporting_batches()) / elements)
        figures = {"mean": sums.mean(), "median": sums.median(), "p99": sums.quantile(0.99), "worst": sums.max()}
        return Reported(losses.mean(0).tolist(), {name: float(value) for name, value in figures.items()}, images)

    def _row_losses(self, objective: Objective, ratio: Tensor, batches: ResumableLoader) -> Tensor:
        """Of every sample, (samples, rows)."""
        timesteps = objective.ratios.timesteps(ratio)

        def losses(examples: Trajectories) -> Tensor:
            is_parallel = self.strategy == "parallel"
            rows = objective.rows_on_data(examples) if is_parallel else objective.rows_of_run(timesteps, examples)
            return squared(objective.residuals(rows, timesteps)).T

        return self._values(losses, batches, torch.zeros(0, objective.ratios.size))

    def _end_losses(self, objective: Objective, ratio: Tensor, batches: ResumableLoader) -> Tensor:
        """Of every sample, (samples,)."""
        timesteps = objective.ratios.timesteps(ratio)
        return self._values(partial(objective.end_loss, timesteps), batches, torch.zeros(0))

    @torch.no_grad()
    def _values(self, function: Callable[[Trajectories], Tensor], batches: ResumableLoader, none: Tensor) -> Tensor:
        """What a function says of the samples of all processes; `none` is what it says of no samples."""
        found = [function(batch.to(self.run.device)[:]).double().cpu() for batch in batches]
        return self.run.together(torch.cat([none.double(), *found]), batches.num_samples)

    def keep(self, objective: Objective, stage: Stage, ratio: Tensor) -> Tensor:
        """The ratios, 1 for rows that are better so on the samples that choose; sets the losses after.

        Where the teacher's images are known, the solver as a whole must end no further from them either.
        """
        ratio, initial = ratio.clone(), objective.ratios.initial()
        stage.after = self.losses(objective, ratio)
        for row in range(len(ratio)):
            if stage.after[row] < stage.before[row]:
                continue
            without = torch.where(torch.arange(len(ratio)) == row, initial, ratio)
            losses = self.losses(objective, without)
            if sum(losses) < sum(stage.after):  # what a row is told also changes the rows after it
                ratio, stage.after = without, losses
        if self.needs_path:
            ratio, stage.ends = self.shortened(objective, ratio)
            stage.after = self.losses(objective, ratio)
        if not sum(stage.after) < sum(stage.before):
            ratio, stage.after, stage.ends = initial, stage.before, stage.ends[:1] * 2
        return ratio

    def shortened(self, objective: Objective, ratio: Tensor) -> tuple[Tensor, list[float]]:
        """The ratios moved back towards 1 until the images are no worse; the end losses before and after."""

        def end_loss(ratio: Tensor) -> float:
            return float(self._end_losses(objective, ratio, self.run.data.choosing_batches()).mean())

        initial = objective.ratios.initial()
        before = end_loss(initial)
        for _ in range(HALVINGS):
            after = end_loss(ratio)
            if after <= before:
                return ratio, [before, after]
            ratio = (ratio + initial) / 2
        return initial, [before, before]
