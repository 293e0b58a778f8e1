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
    scale, rows = options.guidance_scale, load_solver(best).num_rows
    prompt = "".join("**prompt, " if isinstance(one, Mapping) else f"{one!r}, " for one in (options.prompts or ())[:1])
    if not prompt and type(subject.pipe).__name__ == "DiTPipeline":
        prompt = "class_labels=[0], "
    given = "" if scale is None else f", guidance_scale={scale:g}"
    more = "".join(f", {name}={value!r}" for name, value in options.call.items())
    call = f"result = pipe({prompt}num_inference_steps={rows}{given}{more})  # {_steps(paths)}"
    if options.save_pipeline is not None:
        saved = f'pipe = DiffusionPipeline.from_pretrained("{options.save_pipeline}", trust_remote_code=True)'
        return ["from diffusers import DiffusionPipeline", saved, call]
    use = f'from solvers import accelerate_pipeline; accelerate_pipeline(pipe, "{scheduler}")'
    return [*subject.load.split("; "), use, call]


def write_scheduler(subject: Subject, paths: Mapping[int, Path], folder: Path) -> Path | None:
    """A diffusers scheduler with all step counts; None for models that are no pipeline."""
    if subject.pipe is None:
        return None
    from solvers import TableScheduler

    TableScheduler.for_pipeline([*by_rows(paths).values()], subject.pipe).save_pretrained(folder)
    return folder


def accelerated(subject: Subject, paths: Mapping[int, Path]) -> Any:
    """A copy of the pipeline that shares its parts and runs the solvers."""
    from solvers import accelerate_pipeline

    pipe = copy.copy(subject.pipe)
    accelerate_pipeline(pipe, [*by_rows(paths).values()])
    return pipe


def _steps(paths: Mapping[int, Path]) -> str:
    """What num_inference_steps stands for."""
    calls = {path: calls for calls, path in paths.items()}
    return "steps: " + ", ".join(f"{rows} for {calls[path]} calls" for rows, path in by_rows(paths).items())


def by_rows(paths: Mapping[int, Path]) -> dict[int, Path]:
    """One solver for each number of rows, ascending: that of the most calls."""
    return {load_solver(path).num_rows: path for _, path in sorted(paths.items())}
