"""What tuning leaves behind: artifacts, and pictures of the ratios and timesteps in the log."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from denoisers import Evaluations
from solvers import identify, save_solver
from timestep_tuner.stage import Stage


def save_tuned(tuner: Any, index: int, stage: Stage, spent: Evaluations) -> Path | None:
    """Write the artifact of a tuned solver, in the first process. None without an output path."""
    if tuner.output is None:
        return None
    path = Path(tuner.output.replace("{name}", tuner.names[index]))
    if tuner.global_rank == 0:
        save_solver(
            tuner.table(index),
            path,
            identify(tuner.denoiser),
            method="timestep_tuner",
            fitted_on=_fitted_on(tuner, index) | {"evaluations": spent.record(), "seconds": tuner.fitting_seconds},
            validation={
                "objective": tuner.kind,
                "before": sum(stage.before),
                "after": sum(stage.after),
                "rows_before": stage.before,
                "rows_after": stage.after,
                **dict(zip(("end_before", "end_after"), stage.ends)),
            },
            config=_config(tuner, index),
        )
    return path


@rank_zero_only
def log_tuned(tuner: Any, index: int, stage: Stage, path: Path | None) -> None:
    """Ratios over the steps and timesteps before and after as pictures, and the artifact, where the logger is W&B's."""
    if not hasattr(tuner.logger, "log_image"):
        return
    from evaluation.pictures import draw_table
    from training.record import upload_solver

    name, base = tuner.names[index], tuner.objectives[index].base
    tuner.logger.log_image(f"{name}/ratios", [draw_history(stage.history, name)])
    tuner.logger.log_image(f"{name}/timesteps", [draw_table(tuner.table(index), name, base.timesteps)])
    losses = {"before": sum(stage.before), "after": sum(stage.after)}
    tuner.logger.log_metrics({f"{name}/held_out_{key}": value for key, value in losses.items()})
    if path is not None:
        upload_solver(tuner.logger, path)


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


def _fitted_on(tuner: Any, index: int) -> dict[str, Any]:
    data, objective = tuner.trainer.datamodule, tuner.objectives[index]
    known = objective.base.info.get("fitted_on", {}).get("seeds", [])
    return {
        "base": tuner.solvers[index] if tuner.solvers[index].count(":") else Path(tuner.solvers[index]).name,
        "original_timesteps": objective.base.timesteps.tolist(),
        "data": data.samples.origin["data"],
        "samples": len(data.samples),
        "seeds": [*known, *data.seed_ranges()],
    }


def _config(tuner: Any, index: int) -> dict[str, Any]:
    return {
        "solver": tuner.names[index],
        "objective": tuner.kind,
        "strategy": tuner.strategy,
        "optimizer": tuner.optimizer,
        "learning_rate": tuner.learning_rate,
        "steps": tuner.steps,
        "decay": tuner.decay,
        "free_last": tuner.free_last,
        "batch_size": tuner.trainer.datamodule.batch_size,
        "processes": tuner.trainer.world_size,
        "precision": str(tuner.trainer.precision),
    }
