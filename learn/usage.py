"""How the solvers are used: lines of Python, a scheduler's folder, a pipeline."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learn.options import LearnOptions
from learn.subject import Subject
from solvers import load_solver


def usage(subject: Subject, paths: Mapping[int, Path], scheduler: Path | None, options: LearnOptions) -> list[str]:
    """Four lines of Python, or fewer."""
    best = paths[max(paths)]
    if subject.pipe is None:
        return [
            subject.load,
            "from denoisers import class_labels; from solvers import load_solver, sample, start_noise",
            f'solver, noise = load_solver("{best}", denoiser), start_noise(range(16), denoiser.sample_shape)',
            "images = sample(denoiser, solver, noise, class_labels(denoiser, range(16)))",
        ]
    rows, scale = load_solver(best).num_rows, options.guidance_scale
    prompt = "".join("**prompt, " if isinstance(one, Mapping) else f"{one!r}, " for one in (options.prompts or ())[:1])
    given = "" if scale is None else f", guidance_scale={scale:g}"
    more = "".join(f", {name}={value!r}" for name, value in options.call.items())
    if scheduler is not None:
        use = f'from solvers import TableScheduler; pipe.scheduler = TableScheduler.from_pretrained("{scheduler}")'
    else:
        use = f'from solvers import accelerate_pipeline; accelerate_pipeline(pipe, "{best}"{given})'
    return [subject.load, use, f"result = pipe({prompt}num_inference_steps={rows}{given}{more})"]


def write_scheduler(subject: Subject, paths: Mapping[int, Path], folder: Path) -> Path | None:
    """A diffusers scheduler with all step counts; None where it takes more than a scheduler to run a solver."""
    solvers = by_rows(paths)
    if subject.pipe is None or any(load_solver(path).has_own_calls for path in solvers):
        return None
    from solvers import TableScheduler

    TableScheduler.for_pipeline(solvers, subject.pipe).save_pretrained(folder)
    return folder


def accelerated(subject: Subject, paths: Mapping[int, Path], options: LearnOptions) -> Any:
    """A copy of the pipeline that shares its parts and runs the solvers, or the largest where it can run but one."""
    from solvers import TableScheduler, accelerate_pipeline

    pipe, solvers = copy.copy(subject.pipe), by_rows(paths)
    if any(load_solver(path).has_own_calls for path in solvers):
        accelerate_pipeline(pipe, solvers[-1], guidance_scale=options.guidance_scale)
    else:
        pipe.scheduler = TableScheduler.for_pipeline(solvers, subject.pipe)
    return pipe


def by_rows(paths: Mapping[int, Path]) -> list[Path]:
    """One solver for each number of rows, ascending: that of the most calls."""
    return list({load_solver(path).num_rows: path for _, path in sorted(paths.items())}.values())
