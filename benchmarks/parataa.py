"""Rounds of the parallel sampler against sequential sampling, plain iteration, the published method and ParaDiGMS.

    python benchmarks/parataa.py --denoiser checkpoints/cifar10-dit --output runs/benchmarks/parataa

The error after a round is |parallel - sequential| / |sequential| over all seeds together. In a narrow window rounds and
evaluations are those of the loosest tolerance whose error is small enough. The last line is JSON.
"""

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers import class_labels, load_denoiser
from parataa import parallel_sample
from solvers import SolverTable, sample, sample_trace, start_noise
from solvers.files import atomic_write
from solvers.named import named_solver
from training.arguments import guarded

THRESHOLDS = (1e-1, 1e-2, 1e-3)
PLAIN: dict[str, Any] = {"memory": 1, "data_std": None}
METHODS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fixed point (order 1)": PLAIN | {"order": 1},
    "plain, order 20": PLAIN | {"order": 20},
    "Picard (order N)": PLAIN,
    "Picard with data_std": {"memory": 1},
    "ParaTAA as published, order N": {"data_std": None, "safeguard": math.inf},
    "ParaTAA as published, order 20": {"data_std": None, "safeguard": math.inf, "order": 20},
    "defaults, order 20": {"order": 20},
    "defaults, memory 2": {"memory": 2},
    "defaults, memory 5": {"memory": 5},
    "defaults, data_std 1": {"data_std": 1.0},
    "defaults, lambda 0.1": {"regularization": 0.1},
    "defaults, no safeguard": {"safeguard": math.inf},
}
SOLVERS = ("ddim:25", "ddim:50", "ddpm:100")
TOLERANCES = (1.0, 0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0007, 0.0005)


def main(arguments: list[str] | None = None) -> None:
    """Run what the options ask for, print every curve and the summary."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*did not converge")
    denoiser = _load(options.denoiser, options)
    report: dict[str, Any] = {"device": _device_name(options.device), "steps": options.steps, "curves": {}}
    report |= {"denoiser": options.denoiser, "seeds": options.seeds, "baseline_seeds": options.baseline_seeds}
    _main_curves(report, denoiser, options)
    report["narrow"] = _narrow_windows(denoiser, options)
    if not options.quick:
        _other_tables(report, denoiser, options)
        report["warm_start"] = _warm_starts(denoiser, options)
    report["wall_clock"] = _wall_clock(report, denoiser, options)
    _write(report, Path(options.output))
    print(json.dumps(_summary(report, options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="checkpoints/cifar10-dit")
    parser.add_argument("--flow", default="checkpoints/cifar10-sit", help="flow model; skipped when it is not there")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=64, help="of the defaults and the best plain iteration")
    parser.add_argument("--baseline_seeds", type=int, default=8, help="of everything else")
    parser.add_argument("--samples", type=int, default=8, help="seeds per call; bounds memory, changes no result")
    parser.add_argument("--windows", type=int, nargs="*", default=[10, 20, 50], help="narrow windows")
    parser.add_argument("--rounds", type=int, default=25, help="rounds after which a run is given up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="defaults, fixed point and Picard alone")
    parser.add_argument("--output", default="runs/benchmarks/parataa")
    return parser


def _load(path: str, options: argparse.Namespace, guidance_scale: float = 1.0) -> nn.Module:
    return load_denoiser(path, guidance_scale, options.precision, options.device)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _main_curves(report: dict[str, Any], denoiser: nn.Module, options: argparse.Namespace) -> None:
    table = named_solver(f"ddim:{options.steps}", denoiser.schedule)
    names = ["defaults", "fixed point (order 1)", "Picard (order N)"] if options.quick else list(METHODS)
    for name in names:
        full = name in ("defaults", "plain, order 20")
        settings = {
            key: min(value, table.num_rows) if key in ("order", "window") else value
            for key, value in METHODS[name].items()
        }
        seeds = options.seeds if full else options.baseline_seeds
        _record(report, f"ddim:{options.steps}, {name}", curve(denoiser, table, seeds, options, **settings))


def _narrow_windows(denoiser: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds and evaluations of a sample to each threshold."""
    table = named_solver(f"ddim:{options.steps}", denoiser.schedule)
    seeds = list(range(options.baseline_seeds))
    noise, labels = (
        start_noise(seeds, denoiser.sample_shape).to(options.device),
        _labels(denoiser, seeds, options.device),
    )
    with torch.no_grad():
        reference = sample(denoiser, table, noise, labels)
    methods = {"defaults": _parallel, "as published": _published, "ParaDiGMS": paradigms}
    found: dict[str, Any] = {}
    for window in (width for width in options.windows if width <= table.num_rows):
        for name, method in methods.items():
            runs = []
            for tolerance in TOLERANCES:
                images, rounds, evaluations = method(denoiser, table, noise, labels, window, tolerance)
                error = float((images - reference).norm() / reference.norm())
                runs.append({"tolerance": tolerance, "rounds": rounds, "evaluations": evaluations, "error": error})
                if error <= THRESHOLDS[-1]:
                    break
            best = [next((run for run in runs if run["error"] <= limit), None) for limit in THRESHOLDS]
            shown = ["-" if run is None else f"{run['rounds']} ({run['evaluations']:.0f})" for run in best]
            print(
                f"window {window}, {name}: {' / '.join(shown)} rounds (evaluations) to 1e-1 / 1e-2 / 1e-3", flush=True
            )
            found[f"window {window}, {name}"] = runs
    return found


def _parallel(
    denoiser: nn.Module, table: SolverTable, noise: Tensor, labels: Any, window: int, tolerance: float, **settings: Any
) -> tuple[Tensor, int, float]:
    """Images, rounds of the slowest sample, and evaluations of each."""
    options = {"window": window, "tolerance": tolerance} | settings
    images, stats = parallel_sample(denoiser, table, noise, labels, **options)
    return images, stats.rounds, stats.evaluations / len(noise)


def _published(*arguments: Any) -> tuple[Tensor, int, float]:
    return _parallel(*arguments, data_std=None, safeguard=math.inf)


@torch.no_grad()
def paradigms(
    denoiser: nn.Module, table: SolverTable, noise: Tensor, labels: Any, window: int, tolerance: float
) -> tuple[Tensor, int, float]:
    """ParaDiGMS on a table whose rows use their own state and output alone: as `_parallel`.

    Picard iteration on the moves of a step; the window slides past the rows whose states moved by at most `tolerance`
    times the noise of an ancestral step, and past the first that moved farther.

    Source: arXiv 2305.16317, algorithm 1, with a tolerance that is not squared.
    """
    scale = ancestral_noise(table).to(noise)
    on_state, on_output = (
        coef.diagonal().to(noise)[:, None, None, None] for coef in (table.state_coef, table.output_coef)
    )
    images, rounds, evaluations = [], [], 0
    for index, first in enumerate(noise * table.start_scale):
        states, begin, count = first.expand(table.num_rows + 1, *first.shape).clone(), 0, 0
        while begin < table.num_rows:
            end = min(begin + window, table.num_rows)
            rows, timesteps = slice(begin, end), table.timesteps[begin:end].to(noise)
            condition = None if labels is None else labels[index].expand(end - begin)
            outputs = denoiser(states[rows], timesteps, condition)
            moves = on_state[rows] * states[rows] + on_output[rows] * outputs - states[rows]
            new = states[begin] + moves.cumsum(0)
            moved = (new - states[begin + 1 : end + 1]).flatten(1).square().mean(1).sqrt()
            states[begin + 1 : end + 1] = new
            count, evaluations = count + 1, evaluations + end - begin
            begin += min(int((moved <= tolerance * scale[rows]).long().cumprod(0).sum()) + 1, end - begin)
            states[end + 1 : begin + window + 1] = states[end].clone()
        images.append(states[-1])
        rounds.append(count)
    return torch.stack(images), max(rounds), evaluations / len(noise)


def ancestral_noise(table: SolverTable) -> Tensor:
    """Standard deviation of the noise that an ancestral step would add at each row, (N,)."""
    alpha, sigma = table.alpha, table.sigma
    ratio = alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])
    return sigma[1:] * (1 - ratio**2).clamp_min(0).sqrt()


def _other_tables(report: dict[str, Any], denoiser: nn.Module, options: argparse.Namespace) -> None:
    cases = [(denoiser, solver) for solver in SOLVERS]
    if Path(options.flow).exists():
        cases.append((_load(options.flow, options), f"euler:{options.steps}"))
    for model, solver in cases:
        table = named_solver(solver, model.schedule)
        label = f"{solver} (flow)" if model is not denoiser else solver
        for name in ("defaults", "plain, order 20", "Picard (order N)", "ParaTAA as published, order N"):
            _record(report, f"{label}, {name}", curve(model, table, options.baseline_seeds, options, **METHODS[name]))


def _record(report: dict[str, Any], label: str, errors: list[float]) -> None:
    report["curves"][label] = errors
    shown = " ".join("-" if count is None else str(count) for count in rounds_to(errors))
    print(
        f"{label}: {shown} rounds to 1e-1 1e-2 1e-3; errors {' '.join(f'{error:.1e}' for error in errors)}", flush=True
    )


def curve(
    denoiser: nn.Module, table: SolverTable, num_seeds: int, options: argparse.Namespace, **settings: Any
) -> list[float]:
    """Relative error of the final states after each round, over all seeds, down to the smallest threshold."""
    parts = [range(first, min(first + options.samples, num_seeds)) for first in range(0, num_seeds, options.samples)]
    squares = torch.zeros(min(options.rounds, table.num_rows) + 1, dtype=torch.float64)
    for seeds in parts:
        squares += _squared_errors(denoiser, table, list(seeds), len(squares) - 1, options.device, settings)
    errors = (squares[1:] / squares[0]).sqrt().tolist()
    return errors[: (rounds_to(errors)[-1] or len(errors))]


def _squared_errors(
    denoiser: nn.Module, table: SolverTable, seeds: list[int], rounds: int, device: str, settings: dict[str, Any]
) -> Tensor:
    """|reference|^2, then |difference|^2 after each round."""
    noise, condition = start_noise(seeds, denoiser.sample_shape).to(device), _labels(denoiser, seeds, device)
    with torch.no_grad():
        reference = sample(denoiser, table, noise, condition, seeds=seeds)
    found = [reference.double().square().sum().item()]

    def measure(number: int, images: Tensor) -> None:
        found.append((images - reference).double().square().sum().item())

    fixed = {"tolerance": 1e-4, "max_rounds": rounds, "callback": measure, "seeds": seeds}
    parallel_sample(denoiser, table, noise, condition, **fixed, **settings)
    return torch.tensor(found + found[-1:] * (rounds + 1 - len(found)), dtype=torch.float64)


def _labels(denoiser: nn.Module, seeds: list[int], device: str) -> Tensor | None:
    labels = class_labels(denoiser, seeds)
    return None if labels is None else labels.to(device)


def rounds_to(errors: list[float]) -> list[int | None]:
    """First round from which on the error stays at or below each threshold; None if it does not."""
    counts = [next((r for r in range(len(errors)) if max(errors[r:]) <= limit), None) for limit in THRESHOLDS]
    return [None if count is None else count + 1 for count in counts]


def _warm_starts(denoiser: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds to the thresholds from the sequential trajectory of a neighbour, and from nothing."""
    table = named_solver(f"ddim:{options.steps}", denoiser.schedule)
    seeds = list(range(options.baseline_seeds))
    noise, labels = (
        start_noise(seeds, denoiser.sample_shape).to(options.device),
        _labels(denoiser, seeds, options.device),
    )
    weaker, guided = (_load(options.denoiser, options, scale) for scale in (1.5, 1.6))
    cases = {
        "guidance 1.5 -> 1.6": (weaker, labels, guided, labels),
        "next class": (weaker, labels, weaker, (labels + 1) % denoiser.num_classes),
    }
    found = {}
    for name, (model, condition, other, changed) in cases.items():
        with torch.no_grad():
            states = torch.stack(sample_trace(model, table, noise, condition).states)
            reference = sample(other, table, noise, changed)
        found[name] = {"neighbour": float((states[-1] - reference).norm() / reference.norm())}
        for start, warm in (("cold", None), ("warm", states)):
            errors: list[float] = []
            parallel_sample(
                other,
                table,
                noise,
                changed,
                warm_start=warm,
                callback=lambda _, images, to=reference, errors=errors: errors.append(
                    float((images - to).norm() / to.norm())
                ),
            )
            found[name][start] = {"rounds": rounds_to(errors), "until_settled": len(errors), "errors": errors}
        print(f"warm start, {name}: {found[name]}", flush=True)
    return found


def _wall_clock(report: dict[str, Any], denoiser: nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one sample, sequential and parallel to an error of 1e-2 and with the shipped stopping rule."""
    table = named_solver(f"ddim:{options.steps}", denoiser.schedule)
    noise, condition = (
        start_noise([0], denoiser.sample_shape).to(options.device),
        _labels(denoiser, [0], options.device),
    )
    rounds = rounds_to(report["curves"][f"ddim:{options.steps}, defaults"])[1] or options.rounds
    with torch.no_grad():
        return {
            "sequential": _seconds(lambda: sample(denoiser, table, noise, condition), options.device),
            "parallel_1e-2": _seconds(
                lambda: parallel_sample(denoiser, table, noise, condition, max_rounds=rounds), options.device
            ),
            "parallel": _seconds(lambda: parallel_sample(denoiser, table, noise, condition), options.device),
        }


def _seconds(function, device: str) -> float:
    """Best of three, after a first call that is not counted; on a CPU one call alone, where there is little to warm."""
    gpu = torch.device(device).type == "cuda"
    times = []
    for _ in range(4 if gpu else 1):
        begin = time.perf_counter()
        function()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:] or times)


def _summary(report: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    curves, prefix = report["curves"], f"ddim:{options.steps}, "
    plain = [
        rounds_to(curves[prefix + name])[1]
        for name in METHODS
        if METHODS[name].items() >= PLAIN.items() and prefix + name in curves
    ]
    summary = {
        f"rounds_{limit:.0e}".replace("e-0", "e-"): count
        for limit, count in zip(THRESHOLDS, rounds_to(curves[prefix + "defaults"]))
    }
    summary["fixed_point_rounds_1e-2"] = min((count for count in plain if count is not None), default=None)
    clock = report["wall_clock"]
    return summary | {"device": report["device"], "speedup": round(clock["sequential"] / clock["parallel_1e-2"], 3)}


def _write(report: dict[str, Any], folder: Path) -> None:
    """report.json, report.md and curves.png."""
    with atomic_write(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    lines = ["| solver, method | 1e-1 | 1e-2 | 1e-3 | error after each round |", "|---|---|---|---|---|"]
    for label, errors in report["curves"].items():
        counts = " | ".join(str(count or "-") for count in rounds_to(errors))
        lines.append(f"| {label} | {counts} | {' '.join(f'{error:.1e}' for error in errors)} |")
    with atomic_write(folder / "report.md") as path:
        path.write_text("\n".join(lines) + "\n")
    draw(report, folder / "curves.png")


def draw(report: dict[str, Any], path: Path) -> None:
    """Error after each round of the first table: the defaults and what they are compared with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    prefix = f"ddim:{report['steps']}, "
    for label, errors in report["curves"].items():
        name = label.removeprefix(prefix)
        if name != label and not name.startswith("defaults, "):
            wide = 3 if name == "defaults" else 1.5
            axes.semilogy(range(1, len(errors) + 1), errors, marker=".", linewidth=wide, label=name)
    axes.set(xlabel="rounds", ylabel="relative error of the final state", title=f"DDIM, {report['steps']} rows")
    figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    guarded(main)
