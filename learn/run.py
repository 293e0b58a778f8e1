"""The run: say the cost, record the teacher, fit, choose on what was held out, report."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.trajectories import TrajectoryCache
from denoisers.precision import has_bf16_units
from learn.candidates import Candidate
from learn.cost import Cost, Progress, duration
from learn.fits import learned, refined
from learn.judge import Choice, Judge
from learn.models import open_subject
from learn.network import present_device
from learn.options import LearnOptions
from learn.record import record
from learn.report import sentence, write_report
from learn.result import Result, row_of, save_choices, write_rows
from learn.subject import Subject
from learn.usage import usage, write_scheduler
from solvers.files import atomic_write
from solvers.identity import own_hash

SETTINGS = "learn.json"


def learn(model: Any, prompts: Sequence[Any] | None = None, **options: Any) -> Result:
    """Learn a solver for each of several numbers of network calls.

    Args:
        model: a path or hub name for `load_denoiser`, `module:object` of your own code, or a denoiser in memory.
        prompts: of the trajectories, for models that take prompts.
        options: see `LearnOptions`, such as calls=[4, 8], guidance_scale=5.0, output="runs/mine".
    Returns:
        The solvers: `result.table(8)`, `result.report`.
    Raises:
        ValueError: a model that cannot be loaded, options that do not fit it, or a folder of another run.
    """
    chosen = _with_dtype(LearnOptions(prompts=prompts, **options))
    subject, folder = open_subject(model, chosen), Path(chosen.output)
    _check_calls(subject, chosen)
    _claim(folder / SETTINGS, subject, chosen)
    progress = Progress(subject, Cost.of(subject, chosen))
    counts = ", ".join(map(str, chosen.calls))
    print(f"{subject.name} at guidance {subject.guidance_scale:g}: solvers of {counts} network calls", end="")
    print(f"; teacher {subject.teacher_name}, {subject.teacher_calls} calls\ncost: {progress.cost}", flush=True)
    cache = record(subject, chosen, folder / "trajectories", progress)
    judge = Judge(subject, cache, chosen.batch_size)
    choices = [_choice(subject, cache, chosen, judge, calls) for calls in chosen.calls]
    return _finish(folder, subject, judge, choices, progress, chosen)


def _choice(subject: Subject, cache: TrajectoryCache, options: LearnOptions, judge: Judge, calls: int) -> Choice:
    """Everything that is tried for a number of calls, and what is best."""
    folder = Path(options.output) / "candidates"
    table = learned(subject, cache, options, calls, folder)
    found = [Candidate("olss", table, table.nfe)]
    if options.method == "auto" and subject.is_differentiable and not table.space.ops:
        found.append(Candidate("solver_search", refined(subject, cache, options, table, folder), table.nfe))
    choice = judge.choose(calls, found)
    print(sentence(row_of(choice), judge.yardstick_title), flush=True)
    return choice


def _finish(
    folder: Path, subject: Subject, judge: Judge, choices: list[Choice], progress: Progress, options: LearnOptions
) -> Result:
    """Artifacts, the report, and the last lines."""
    paths, rows = save_choices(subject, choices, folder), [row_of(choice) for choice in choices]
    scheduler = write_scheduler(subject, paths, folder / "scheduler")
    lines = usage(subject, paths, scheduler, options)
    expected = f"{progress.cost.calls:,} at most were expected"
    spent = f"{progress.calls:,} network calls in {duration(progress.seconds)}, {expected}"
    write_rows(folder, rows)
    write_report(folder, subject, judge, choices, rows, spent, lines)
    result = Result(folder, paths, rows, lines, subject)
    if options.save_pipeline is not None:
        result.pipeline.save_pretrained(options.save_pipeline)
    print(f"took {spent}\nsolvers: {folder}/solver-*.json   report: {result.report}\n")
    print(*(f"    {line}" for line in lines), sep="\n")
    return result


def _with_dtype(options: LearnOptions) -> LearnOptions:
    """`auto` as what it stands for on the device."""
    if options.dtype != "auto":
        return options
    return replace(options, dtype="bfloat16" if has_bf16_units(present_device(options.device)) else "float32")


def _check_calls(subject: Subject, options: LearnOptions) -> None:
    """ValueError for a number of calls that a solver cannot have, or that saves nothing."""
    least, most = subject.row_calls, subject.teacher_calls
    for calls in options.calls:
        if not least <= calls < most:
            raise ValueError(
                f"{calls} network calls were asked for: a solver here has at least {least}"
                f"{' (a guided row makes two)' if least > 1 else ''}, and fewer than the teacher's {most}"
            )


def _claim(path: Path, subject: Subject, options: LearnOptions) -> None:
    """Take the folder, or go on in it; ValueError where it holds another run."""
    settings = {
        "model": subject.name,
        "weight_hash": own_hash(subject.denoiser),
        "guidance_scale": subject.guidance_scale,
        "teacher": subject.teacher_name,
        "trajectories": options.trajectories,
        "prompts": None if options.prompts is None else [str(prompt) for prompt in options.prompts],
        "call": {name: repr(value) for name, value in options.call.items()},
        "dtype": options.dtype,
    }
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name, value in settings.items() if found.get(name) != value]
        if differ:
            listed = "; ".join(f"{name} was {found.get(name)}, now {settings[name]}" for name in differ)
            raise ValueError(f"{path.parent} holds another run ({listed}): choose another --output")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
