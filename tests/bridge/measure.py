"""What a row shows: its own scheduler as a table, a solver learned on a few of its runs, and the pipeline saved."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tests.bridge import fresh
from tests.bridge.rows import Row

STEPS, TEACHER_STEPS, TRAJECTORIES = 4, 12, 4
SEEDS = (101, 102)
Again = Callable[[Path], Tensor]


def measure(row: Row, folder: Path, again: Again) -> dict[str, Any]:
    """Errors of a row against its own runs, relative to their size; or the line that refuses it.

    Args:
        row: the pipeline.
        folder: an empty one.
        again: runs a saved pipeline, see `fresh_process`.
    """
    pipe = row.pipeline()
    try:
        own = own_scheduler_error(row, pipe, folder)
        table, identity = learn(row, pipe, folder)
    except ValueError as refusal:
        return {"refused": str(refusal)}
    teacher, plain = (runs(row, pipe, steps) for steps in (TEACHER_STEPS, STEPS))
    pipe.scheduler = scheduler_of(table, identity, pipe, folder)
    learned = runs(row, pipe, STEPS)
    errors = {"own": own, "plain": error(plain, teacher), "learned": error(learned, teacher)}
    try:
        pipe.save_pretrained(folder / "saved")
    except ValueError as refusal:
        return errors | {"unsaved": str(refusal)}
    torch.save({"arguments": arguments(row, pipe, STEPS), "seeds": SEEDS}, folder / "saved" / "call.pt")
    return errors | {"saved": error(again(folder / "saved"), learned)}


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
    call = arguments(row, pipe, told or steps)
    made = [pipe(**call, generator=fresh.seeded(seed))[0] for seed in SEEDS]
    return torch.stack([torch.as_tensor(one).double() for one in made])


def arguments(row: Row, pipe: Any, steps: int) -> dict[str, Any]:
    """Of a call, with the first prompt."""
    entries = PipelineDenoiser(pipe, row.prompts, **row.call).entries
    return {**entries[0], **row.call, "num_inference_steps": steps}


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.std())


@contextmanager
def fresh_process(home: Path) -> Iterator[Again]:
    """One process that runs saved pipelines: isolated, offline, in a folder of its own, and without this project."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.defpath}
    environment |= {"HF_HOME": str(home / "home"), "HOME": str(home)}
    log, command = home / "errors", [sys.executable, "-I", fresh.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": home, "env": environment}
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors, **pipes) as process:

        def again(folder: Path) -> Tensor:
            print(folder, file=process.stdin, flush=True)
            assert process.stdout.readline().strip() == str(folder), log.read_text()
            return torch.load(folder / "images.pt", weights_only=True)

        yield again
