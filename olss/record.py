"""How good a student is on trajectories it was not fitted on, and what is kept of it."""

from pathlib import Path
from typing import Any

import torch

from data.shards import seed_ranges
from olss.student import Fit
from solvers.artifact import save_solver
from solvers.identity import identify
from solvers.sampler import sample
from training.record import log_table, upload_solver


def held_out_error(module: Any, fit: Fit) -> float:
    """Root-mean-square difference of the student's images to the teacher's, from the held-out noises.

    The finished table is run by the shared sampler; processes share the samples.
    """
    held_out, table = module.data.held_out(), fit.table(module.teacher)
    mine = list(range(module.global_rank, len(held_out), module.trainer.world_size))
    total = torch.zeros((), dtype=torch.float64, device=module.device)
    for start in range(0, len(mine), module.data.batch_size):
        batch = held_out.choose(mine[start : start + module.data.batch_size]).to(module.device)
        image = sample(module.network, table, batch.states[:, 0] / table.start_scale, batch.condition)
        total += (image - batch.states[:, -1]).double().pow(2).sum()
    return float(module.all_gather(total).sum() / held_out.states[:, -1].numel()) ** 0.5


def save_student(module: Any, nfe: int) -> Path:
    """Write the artifact of a finished student; its picture and file go into the log."""
    fit, table, manifest = module.fits[nfe], module.table(nfe), module.data.cache.manifest
    path = save_solver(
        table,
        module.output / f"olss-{nfe}.json",
        identify(module.denoiser),
        method="olss",
        fitted_on={
            "seeds": seed_ranges(module.data.fitted_seeds),
            "teacher": manifest["solver"],
            "teacher_steps": module.teacher.nfe,
            "precision": manifest["teacher"]["precision"],
            "seconds": module.fitting_seconds,
        },
        validation={
            "rmse": module.validation[nfe],
            "seeds": seed_ranges(module.data.held_out_seeds),
            "chose_the_path": module.path == "search",
            "row_errors": fit.errors,
            "conditions": fit.conditions,
        },
        config={"basis": module.basis, "path": module.path, "indices": fit.path, "ridge": module.ridge},
    )
    log_table(module.logger, path.stem, table)
    upload_solver(module.logger, path)
    return path
