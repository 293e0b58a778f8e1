"""What a row shows: its own scheduler as a table, and a solver learned on a few of its runs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.pipeline_recorder import record_trajectories
from denoisers.pipeline import PipelineDenoiser
from olss.path import uniform_path
from olss.plan import CallPlan
from olss.run import fit_run
from solvers import SolverTable, TableScheduler, identify, save_solver
from tests.bridge.rows import Row

STEPS, TEACHER_STEPS, TRAJECTORIES = 4, 12, 4
SEEDS = (101, 102)


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Errors of a row against its own runs, relative to their size; or the line that refuses it."""
    pipe = row.pipeline()
    try:
        own = own_scheduler_error(row, pipe, folder)
        table, identity = learn(row, pipe, folder)
    except ValueError as refusal:
        return {"refused": str(refusal)}
    teacher, plain = (runs(row, pipe, steps) for steps in (TEACHER_STEPS, STEPS))
    original, pipe.scheduler = pipe.scheduler, scheduler_of(table, identity, pipe, folder)
    learned = runs(row, pipe, STEPS)
    pipe.scheduler = original
    return {"own": own, "plain": error(plain, teacher), "learned": error(learned, teacher)}


def own_scheduler_error(row: Row, pipe: Any, folder: Path) -> float:
    """Of the pipeline's own scheduler as a table, in the pipeline."""
    denoiser = PipelineDenoiser(pipe, row.prompts, **row.call)
    table, expected, original = denoiser.table(STEPS), runs(row, pipe, STEPS), pipe.scheduler
    pipe.scheduler = scheduler_of(table, identify(denoiser), pipe, folder)
    found = runs(row, pipe, STEPS, told=table.num_rows)
    pipe.scheduler = original
    return error(found, expected)


def learn(row: Row, pipe: Any, folder: Path) -> tuple[SolverTable, Any]:
    """A solver fitted to a few recorded runs."""
    cache = record_trajectories(
        pipe, row.prompts, folder / "runs", TEACHER_STEPS, num_trajectories=TRAJECTORIES, progress=False, **row.call
    )
    denoiser = PipelineDenoiser(pipe, row.prompts, **row.call)
    plan = CallPlan(tuple(uniform_path(cache.table.num_rows, STEPS)))
    return fit_run(denoiser, cache.table, [cache.load()], plan).fit.table(cache.table), cache.identity


def scheduler_of(table: SolverTable, identity: Any, pipe: Any, folder: Path) -> TableScheduler:
    """A table in a pipeline, by way of an artifact."""
    return TableScheduler.for_pipeline(save_solver(table, folder / "solver.json", identity, method="test"), pipe)


def runs(row: Row, pipe: Any, steps: int, told: int | None = None) -> Tensor:
    """What the pipeline makes of unseen seeds and the first prompt, one by one."""
    prompts = PipelineDenoiser(pipe, row.prompts, **row.call).entries
    arguments = {**prompts[0], **row.call, "num_inference_steps": told or steps}
    made = [pipe(**arguments, generator=torch.Generator().manual_seed(seed))[0] for seed in SEEDS]
    return torch.stack([torch.as_tensor(one).double() for one in made])


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.std())
