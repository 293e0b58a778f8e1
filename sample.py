"""Run, compare, evaluate, inspect and export solver tables.

    python sample.py generate --denoiser checkpoints/cifar10-dit --solver unipc:8 --output samples
    python sample.py compare  --denoiser checkpoints/cifar10-dit --solvers ddim:8 unipc:8 --output report
    python sample.py evaluate --samples samples
    python sample.py inspect  checkpoints/solvers/cifar10-dit/calls/solver-search-8.json [MORE ...]
    python sample.py export   checkpoints/solvers/cifar10-dit/calls/solver-search-8.json --to diffusers --output DIR

A solver is an artifact's path, `wandb:entity/project/name:alias` for one that lies in W&B, or `name:steps` for a
tabulated diffusers scheduler, with a distilled model's own steps `name@[1000,937.5,625]` or `name@sigma[1,0.94,0.63]`;
in a comparison, SOLVER+parataa is it in parallel rounds.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from evaluation.args import CompareArgs, EvaluateArgs
from training.arguments import OneLineErrors, guarded
from training.signals import stop

BLOCK = 128  # samples kept at a time: what an interruption can cost
POSITIONAL = ("inspect", "export")  # solvers follow
LISTS = ("--solvers", "--labels", "--metrics")  # values follow with spaces between them


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse's parser with one-line errors."""


def generate(
    solver: str,
    denoiser: str | None = None,
    output: str = "runs/samples",
    num_samples: int = 64,
    seed: int = 0,
    labels: list[int] | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    precision: Literal["float32", "bf16"] = "float32",
    sampler: Literal["sequential", "parataa"] = "sequential",
    preview: bool = False,
    format: Literal["npz", "adm", "png", "webdataset"] = "npz",
    trust: bool = False,
) -> None:
    """Sample images with one solver: the samples, grid.png and manifest.json; goes on where it was broken off.

    Several processes: `torchrun --nproc_per_node N sample.py generate ...`.

    Args:
        solver: an artifact's path, name:steps or name@[timesteps].
        denoiser: checkpoint folder; an artifact with a student of its own needs none.
        output: folder to write.
        num_samples: number of images.
        seed: seed of the first image; image k has seed + k.
        labels: class labels, used in turn; default seed % number of classes.
        guidance_scale: uncond + guidance_scale (cond - uncond); default: the artifact's, else 1 (none).
        batch_size: images per network call.
        precision: of the network; states stay in float32.
        sampler: sequential, or parataa (parallel rounds).
        preview: with parataa, write the images after each round.
        format: npz (float32, as the model makes them), adm (uint8 pictures, arr_0), a folder of png, or webdataset.
        trust: a `denoiser.yaml` may name a class of your own; without, a file never chooses code.
    """
    from denoisers import network_calls
    from denoisers.generate import as_images
    from evaluation.outputs import SampleFolder
    from evaluation.pictures import save_grid
    from solvers.files import claimed

    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples is {num_samples} and batch_size {batch_size}: give at least 1 of each")
    if preview and sampler != "parataa":
        raise ValueError("preview shows the rounds of --sampler parataa: the sequential sampler has none")
    model, table = _load(solver, denoiser, guidance_scale, precision, trust)
    _check_labels(model, labels)
    folder, seeds = Path(output), range(seed, seed + num_samples)
    key = _key(table, model, seed, labels, precision, sampler)
    target = SampleFolder(folder, format, model, seeds, key, max(batch_size, BLOCK))
    stop.kept = target.kept
    with claimed(folder) if _is_first_process() else nullcontext():
        begin = time.perf_counter()
        with _sampler(sampler, folder / "preview" if preview else None) as (chosen, record, share):
            _make(target, table, labels, batch_size, chosen, share)
        if not _is_first_process():
            return
        save_grid(as_images(model, target.first(64)), folder / "grid.png")
        path, seconds = target.finish(), time.perf_counter() - begin
        manifest = {
            "solver": solver,
            "nfe": network_calls(table, model),
            "rows": table.num_rows,
            "seeds": list(seeds),
            "seconds": seconds,
            "denoiser": denoiser,
            "labels": labels,
            "guidance_scale": getattr(model, "guidance_scale", 1.0),
            "precision": precision,
            "sampler": sampler,
            "format": format,
            **record,
        }
        _write_json(folder / "manifest.json", manifest)
        cost = f"{network_calls(table, model)} network calls each in {table.num_rows} rows"
        print(f"{num_samples} images, {cost}, {seconds:.1f} s -> {path}")


def compare(**options) -> None:
    """Measure solvers side by side from the same noises: report.html, .md and .json, comparison.png; can be resumed."""
    from evaluation.compare import compare as run
    from parataa import parallel_sample

    run(CompareArgs(**options), {"parataa": parallel_sample})


def evaluate(**options) -> None:
    """Measure pictures that are there already: evaluation.json; goes on where it was broken off."""
    from evaluation.folder import evaluate as run

    run(EvaluateArgs(**options))


def inspect(solver: list[str], denoiser: str | None = None, output: str | None = None, trust: bool = False) -> None:
    """Print a solver's rows and diagnostics, and draw its coefficients and timesteps; of several, a table of all.

    Args:
        solver: an artifact's path, name:steps or name@[timesteps]; several of them, or the folders of several.
        denoiser: checkpoint folder whose noise schedule name:steps uses; default the linear VP schedule.
        output: PNG file of the drawing; default runs/inspect/<solver>.png.
        trust: a `denoiser.yaml` may name a class of your own; without, a file never chooses code.
    """
    from denoisers import load_denoiser
    from solvers import NoiseSchedule
    from solvers.artifact import load_folder
    from solvers.named import resolve_solver

    schedule = NoiseSchedule.linear() if denoiser is None else load_denoiser(denoiser, trust_remote_code=trust).schedule
    tables: dict[str, Any] = {}
    for name in solver:
        if Path(name).is_dir():
            tables |= {str(Path(name, file)): table for file, table in load_folder(name).items()}
        else:
            tables[name] = resolve_solver(name, schedule)
    if len(solver) == len(tables) == 1 and not Path(solver[0]).is_dir():
        _inspect_one(solver[0], tables[solver[0]], output)
    elif output is not None:
        raise ValueError(f"a drawing is of one solver, these are {len(tables)}: leave --output out")
    else:
        _print_summary(tables)


def _inspect_one(solver: str, table: Any, output: str | None) -> None:
    from evaluation.pictures import draw_table, save_figure

    _print_table(solver, table)
    path = Path(output or f"runs/inspect/{Path(solver).name.removesuffix('.json').replace(':', '-')}.png")
    original = table.info.get("fitted_on", {}).get("original_timesteps")
    save_figure(draw_table(table, solver, original), path)
    print(f"drawn: {path}")


def export(
    solver: list[str], to: Literal["diffusers", "comfyui", "numpy"] = "diffusers", output: str = "runs/export"
) -> None:
    """Write a solver for another program: diffusers, ComfyUI or plain NumPy.

    Args:
        solver: an artifact's path; several with different numbers of steps, or their folder (diffusers, ComfyUI).
        to: a diffusers scheduler folder, a ComfyUI custom-node folder, or one NumPy file.
        output: folder to write.
    """
    from solvers import export_solver

    print(f"written: {export_solver(solver, to, output)}")


AGAIN = "run the same command again to go on"  # after a signal
KEPT = {"compare": f"what was sampled stays; {AGAIN}", "evaluate": f"what was measured stays; {AGAIN}"}
COMMANDS = {"generate": generate, "compare": compare, "evaluate": evaluate, "inspect": inspect, "export": export}
OPTIONS = {compare: CompareArgs, evaluate: EvaluateArgs}  # of commands whose options are a class


def _load(solver: str, denoiser: str | None, guidance_scale: float | None, precision: str, trust: bool):
    """The table and the model it runs on, checked against each other; what comes with an artifact is never trusted."""
    from denoisers import load_denoiser
    from solvers import load_solver, named_solver, student_path

    if Path(solver).suffix != ".json":
        scale = 1.0 if guidance_scale is None else guidance_scale
        model = load_denoiser(_given(denoiser), scale, precision, trust_remote_code=trust)
        return model, named_solver(solver, model.schedule)
    table = load_solver(solver)
    student = student_path(table)
    scale = _guidance(table.info["guidance_scale"]) if guidance_scale is None else guidance_scale
    folder = _given(denoiser) if student is None else str(student.parent)
    model = load_denoiser(folder, scale, precision, trust_remote_code=trust and student is None)
    return model, load_solver(solver, model)


def _given(denoiser: str | None) -> str:
    if denoiser is None:
        raise ValueError("give the model's folder with --denoiser: this solver has no student of its own")
    return denoiser


def _guidance(fitted: float | list[float]) -> float:
    if isinstance(fitted, list):
        raise ValueError(f"the solver was fitted for guidance scales {fitted}: choose one with --guidance_scale")
    return fitted


def _check_labels(model, labels: list[int] | None) -> None:
    """Before any work; see `denoisers.generate.generate`."""
    from denoisers.labels import check_labels

    if labels is not None and not len(check_labels(model, labels)):
        raise ValueError("labels is an empty list: give at least one, or leave it out")


def _key(table, model, *others: Any) -> str:
    """Hash of all that samples depend on but their number."""
    from hashlib import sha256

    from evaluation.contenders import Contender

    return sha256(f"{Contender('', table, model).key} {others}".encode()).hexdigest()[:16]


def _make(target, table, labels, batch_size: int, sampler: Callable, share: Callable) -> None:
    """The missing blocks of this process's share, checked and kept one by one."""
    from denoisers.generate import check_finite, generate
    from solvers.progress import progress_bar

    todo = target.missing(share(target.blocks))
    with progress_bar(desc="sampling", unit="row", total=sum(map(len, todo)) * table.num_rows) as bar:

        def counted(*args: Any, callback: Callable, **options: Any) -> Any:
            def step(row: int, state: Any) -> None:
                bar.update(len(state))
                callback(row, state)

            return sampler(*args, callback=step, **options)

        for block in todo:
            seeds = target.seeds[block.start : block.stop]
            turned = labels and [labels[index % len(labels)] for index in block]
            options = {"batch_size": batch_size, "labels": turned, "sampler": counted}
            samples = generate(target.denoiser, table, seeds, **options)
            check_finite(samples, seeds)
            target.keep(block, samples)


@contextmanager
def _sampler(name: str, preview: Path | None) -> Iterator[tuple[Callable, dict, Callable]]:
    """A sampling function, what it adds to the manifest while it runs, and this process's share of the blocks."""
    from solvers import sample

    if name == "sequential":
        from evaluation.processes import barrier, processes

        with processes() as (rank, size):
            yield sample, {}, lambda blocks: blocks[rank::size]
            barrier()
        return
    from evaluation.pictures import save_grid
    from parataa import parallel_sample, processes

    record = {"rounds": [], "evaluations": 0, "converged": True}
    with processes() as group:

        def run(denoiser, table, noise, condition, *, seeds, callback):
            def show(done: int, images) -> None:
                callback(done, images)
                if preview is not None and _is_first_process():
                    save_grid(images, preview / f"batch-{len(record['rounds']):03d}-round-{done:03d}.png")

            images, stats = parallel_sample(denoiser, table, noise, condition, seeds=seeds, callback=show, group=group)
            record["rounds"].append(stats.rounds)
            record["evaluations"] += int(stats.evaluations)
            record["converged"] &= bool(stats.converged)
            return images

        yield run, record, lambda blocks: blocks


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _print_table(name: str, table) -> None:
    from rich.console import Console
    from rich.table import Table

    from evaluation.pictures import call_names

    view = Table("row", "timestep", "alpha", "sigma", "states", "outputs", "noise", title=name)
    scalars, rows = table.scalar_part(), [str(i) for i in range(table.num_rows)]
    blocks = ((scalars.state_coef, rows), (scalars.output_coef, call_names(table)), (scalars.noise_coef, rows))
    for i in range(table.num_rows):
        cells = [" ".join(f"{n}:{v:+.4g}" for n, v in zip(names, block[i].tolist()) if v) for block, names in blocks]
        nodes = (table.timesteps[i], table.alpha[i], table.sigma[i])
        view.add_row(str(i), *(f"{float(value):.5g}" for value in nodes), *cells)
    view.add_row("image", "", f"{float(table.alpha[-1]):.5g}", f"{float(table.sigma[-1]):.5g}")
    Console().print(view)
    print(f"evaluations (NFE)      {table.nfe}   rows {table.num_rows}   prediction type {table.prediction_type}")
    print(f"start scale            {table.start_scale:g}")
    print(f"consistency, worst     {table.consistency().worst:.3g}   (0: rows and nodes agree)")
    print(f"noise amplification    {table.noise_amplification():.4g}")
    print(f"unused evaluations     {table.unused_evaluations() or 'none'}")
    print(f"noise level rises at   {table.noise_level_rises() or 'no row'}")


def _print_summary(tables: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from evaluation.contenders import display_names

    errors = ("rmse", "median", "p99", "worst")
    title = "errors on the samples that each one's method held out"
    view = Table("solver", "method", "calls", "rows", "made for", "guidance", *errors, title=title)
    names = display_names(list(tables))
    for name, table in tables.items():
        info = table.info
        made_for = info.get("denoiser", {}).get("name") or "any"
        facts = (info.get("method", "name"), table.nfe, table.num_rows, made_for, info.get("guidance_scale", "any"))
        found = [info.get("validation", {}).get(error) for error in errors]
        view.add_row(names[name], *map(str, facts), *("" if one is None else f"{one:.4g}" for one in found))
    Console(width=None if sys.stdout.isatty() else 160).print(view)


def _write_json(path: Path, value: dict) -> None:
    from solvers.files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _lists_joined(args: Sequence[str]) -> list[str]:
    """`--solvers a b` as `--solvers ["a", "b"]`, which is how jsonargparse reads a list; `--trust` alone is true."""
    groups: list[list[str]] = []
    for word in args:
        if word.startswith("--") or word == "-h" or not groups:
            groups.append(["--trust=true" if word == "--trust" else word])
        else:
            groups[-1].append(word)
    return [word for group in groups for word in (_list_joined(group) if _is_list(group) else group)]


def _is_list(group: list[str]) -> bool:
    return group[0] in (*LISTS, *POSITIONAL) or (group[0].startswith("--") and len(group) > 2)


def _list_joined(group: list[str]) -> list[str]:
    name, *values = group
    if not values or values[0].startswith("["):
        return group
    return [name, "[" + ", ".join(value if _is_number(value) else json.dumps(value) for value in values) + "]"]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; errors a user can cause are one line and exit code 2."""
    guarded(_run, sys.argv[1:] if args is None else args)


def _run(args: Sequence[str]) -> None:
    from training.stored import local

    values = _parser().parse_args([local(word) for word in _lists_joined(args)])
    stop.kept = lambda: KEPT.get(values.command, "nothing was written")
    COMMANDS[values.command](**values[values.command].as_dict())


def _parser() -> Parser:
    title, _, solvers = (__doc__ or "").split("\n\n")
    parser = Parser(description=f"{title} {solvers}")
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        part = Parser(description=summary)
        if command in OPTIONS:
            part.add_class_arguments(OPTIONS[command], as_group=False)
        else:
            part.add_function_arguments(command, as_group=False, as_positional=name in POSITIONAL)
        subcommands.add_subcommand(name, part, help=summary)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
