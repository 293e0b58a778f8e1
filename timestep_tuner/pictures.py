"""Pictures and figures of a tuned solver for the log."""

from typing import Any

import torch

from solvers import SolverTable
from timestep_tuner.judge import Stage
from training.method import Run
from training.record import takes_pictures


def log_tuned(run: Run, name: str, stage: Stage, tuned: SolverTable, base: SolverTable) -> None:
    """Ratios over the steps, and timesteps before and after, where the logger takes pictures."""
    if run.rank or not takes_pictures(run.logger):
        return
    from evaluation.pictures import draw_table

    run.logger.log_image(f"tables/{name}-ratios", [draw_history(stage.history, name)])
    run.logger.log_image(f"tables/{name}", [draw_table(tuned, name, base.timesteps)])


def draw_history(history: list[list[float]], title: str) -> Any:
    """A matplotlib figure of every row's ratio over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    values = torch.tensor(history)
    for row in range(values.shape[1]):
        axes.plot(values[:, row], label=f"row {row}")
    axes.set(xlabel="step", ylabel="ratio", title=title)
    axes.legend(ncols=2, fontsize=7)
    return figure
