"""How far a solver's tuning is, what its ratios are worth on samples held out, and which of them are kept."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.shards import Trajectories
from timestep_tuner.objective import Objective
from training.method import Run

HALVINGS = 6  # of the way of the ratios from 1, before they are given up


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


@dataclass
class Judge:
    """Losses on the held-out samples of all processes.

    Args:
        run: its data hold some out.
        strategy: where states come from, `parallel` or `sequential`.
        needs_path: whether the whole solver's images must be no worse either.
    """

    run: Run
    strategy: str
    needs_path: bool

    def losses(self, objective: Objective, ratio: Tensor) -> list[float]:
        """Those of the rows, from states as the strategy has them."""
        run = objective.parallel if self.strategy == "parallel" else objective.sequential
        return self._mean(run, objective.ratios.timesteps(ratio))

    def _mean(self, run: Callable[[Tensor, Trajectories], Tensor], timesteps: Tensor) -> list[float]:
        """Mean of run(timesteps, examples) over the held-out samples of all processes; each has some."""
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for batch in self.run.data.held_out_batches():
                losses = run(timesteps, batch.to(self.run.device)[:]).double().cpu()
                total = total + torch.cat([losses, torch.ones(1, dtype=torch.float64)]) * len(batch)
        total = self.run.sum(total)
        return (total[:-1] / total[-1]).tolist()

    def keep(self, objective: Objective, stage: Stage, ratio: Tensor) -> Tensor:
        """The ratios, 1 for rows that are better so on the held-out samples; sets the losses after.

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
        initial = objective.ratios.initial()
        before = self._mean(objective.end_loss, objective.ratios.timesteps(initial))[0]
        for _ in range(HALVINGS):
            after = self._mean(objective.end_loss, objective.ratios.timesteps(ratio))[0]
            if after <= before:
                return ratio, [before, after]
            ratio = (ratio + initial) / 2
        return initial, [before, before]
