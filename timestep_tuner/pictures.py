"""Pictures and figures of a tuned solver for the log."""

from typing import Any

import torch

from solvers import SolverTable
from timestep_tuner.judge import Stage
from training.method import Run


def log_tuned(run: Run, name: str, stage: Stage, tuned: SolverTable, base: SolverTable) -> None:
    """Ratios over the steps, timesteps before and after, and losses, where the logger takes pictures."""
    if run.rank or not hasattr(run.logger, "log_image"):
        return
    from evaluation.pictures import draw_table

    run.logger.log_image(f"{name}/ratios", [draw_history(stage.history, name)])
    run.logger.log_image(f"{name}/timesteps", [draw_table(tuned, name, base.timesteps)])
    losses = {"before": sum(stage.before), "after": sum(stage.after)}
    run.logger.log_metrics({f"{name}/held_out_{key}": value for key, value in losses.items()})


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
