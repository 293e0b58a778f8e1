"""What a search leaves behind: artifacts, and pictures of the table and its samples in the log."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from solvers import identify, sample, save_solver


def save_table(search: Any, stage: Any) -> Path | None:
    """Write the artifact of a stage: its best table, else its current one. None without an output path.

    Args:
        search: the module, attached to its trainer.
        stage: the stage; its figures go into the artifact.
    """
    if search.output is None:
        return None
    path = Path(search.output.replace("{nfe}", str(stage.nfe)))
    if search.global_rank == 0:
        scale = search.usable_guidance or search.guidance_scale
        theta = search._theta if stage.best_theta is None else stage.best_theta
        save_solver(
            stage.parameters.table(theta).detach(),
            path,
            identify(search.denoiser, guidance_scale=scale),
            method="solver_search",
            fitted_on=_fitted_on(search),
            validation=_validation(stage),
            config=_config(search, stage),
        )
    return path


@rank_zero_only
def log_samples(search: Any, teacher: Any) -> None:
    """Up to 16 images of the current table above the teacher's, where the logger takes pictures."""
    if not hasattr(search.logger, "log_image"):
        return
    from evaluation.pictures import image_grid

    count = min(16, len(teacher))
    part = next(search.objective._parts(teacher))
    with torch.no_grad():
        images = sample(search.denoiser, search.table(), part.noise, part.condition)
    rows = torch.cat([images[:count], part.end[:count]])
    search.logger.log_image("samples", [image_grid(rows, min(count, len(images)))])


def _fitted_on(search: Any) -> dict[str, Any]:
    data = search.trainer.datamodule
    return {
        "teacher_steps": search.teacher_table.nfe,
        "seeds": data.seed_ranges(),
        "trajectories": [Path(folder).name for folder in data.folders],
        "evaluations": search.objective.evaluations.record(),
        "seconds": search.fitting_seconds,
    }


def _validation(stage: Any) -> dict[str, Any]:
    if stage.best_theta is None:
        return {}
    return {"rmse": stage.best_rmse, "loss": stage.best_loss}


def _config(search: Any, stage: Any) -> dict[str, Any]:
    loss = search.loss
    return {
        "nfe": stage.nfe,
        "start": stage.start,
        "optimizer": search.optimizer_name,
        "learning_rate": None if search.optimizer_name == "lm" else search.learning_rate,
        "steps": stage.step,
        "loss": {name: getattr(loss, name) for name in ("endpoint", "path", "huber", "huber_delta", "feature")},
        "train_timesteps": search.train_timesteps,
        "precision": str(search.trainer.precision),
    }
