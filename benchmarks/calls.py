"""What solvers that make their own network calls reach, at equal calls, against the best learned ones that do not.

For every model, guidance scale and number of network calls the shipped artifacts are run from unseen seeds 0, 1, ...
and compared with the teacher from the same noises: root mean square, median, 99th percentile and worst image, and the
Frechet distance in the features of the model's own classifier. `before` is the best by RMSE of the artifacts that call
the network for the guided output of every row; `unipc` and `dpmpp` make as many calls. The last line is one JSON
object.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers import calls_per_row, class_labels, load_denoiser, network_calls
from denoisers.generate import generate
from evaluation.evaluate import Figures, shipped_measure
from evaluation.metrics import Measure
from solvers import Bands, SolverTable, load_solver, named_solver, sample, start_noise
from solvers.files import atomic_write
from training.arguments import guarded

SOLVERS = Path("checkpoints/solvers")
CLASSICAL = ("unipc", "dpmpp")
LINES = {"": "own calls", "_before": "learned, rows guided", "_unipc": "UniPC", "_dpmpp": "DPM-Solver++"}


@dataclass(frozen=True)
class Case:
    """One model at one guidance scale.

    Args:
        model: folder in checkpoints.
        guidance: scale.
        calls: numbers of network calls.
        teacher: solver whose images are the aim.
        folder: of the solvers that make their own calls, in checkpoints/solvers.
        before: folders of those that do not; of several the best counts.
    """

    model: str
    guidance: float
    calls: tuple[int, ...]
    teacher: str
    folder: str
    before: tuple[str, ...]


CASES = {
    "dit_1": Case("cifar10-dit", 1.0, (3, 4, 5), "ddim:100", "cifar10-dit/calls", ("cifar10-dit",)),
}


def found(folders: Sequence[str], denoiser: nn.Module, calls: int) -> list[SolverTable]:
    """The artifacts of some folders that cost so many network calls."""
    paths = [path for folder in folders for path in sorted((SOLVERS / folder).glob("*.json"))]
    tables = [load_solver(path, denoiser) for path in paths if not path.name.startswith("tuned")]
    return [table for table in tables if network_calls(table, denoiser) == calls]


def figures(images: Tensor, wanted: Tensor, measure: Measure) -> dict[str, float]:
    """How far images are from the teacher's, and from the data."""
    metric = Figures(measure)
    for part, target in zip(images.split(256), wanted.split(256)):
        metric.update(part, target)
    return {name: float(value) for name, value in metric.compute().items() if name != "psnr"}


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All counts of a case."""
    denoiser = load_denoiser(f"checkpoints/{case.model}", case.guidance, precision=options.precision)
    seeds, size = range(options.num_samples), options.batch_size
    measure = shipped_measure(denoiser, options.num_samples, ["rmse", "fd"])
    teacher = named_solver(case.teacher, denoiser.schedule)
    wanted = generate(denoiser, teacher, seeds, batch_size=size)
    counts: dict[str, Any] = {"teacher_fd": figures(wanted, wanted, measure)["fd"]}
    for calls in case.calls:
        runs = {"": found([case.folder], denoiser, calls), "_before": found(case.before, denoiser, calls)}
        for name in CLASSICAL:
            runs[f"_{name}"] = [named_solver(f"{name}:{calls // calls_per_row(denoiser)}", denoiser.schedule)]
        row: dict[str, float] = {}
        for suffix, tables in runs.items():
            tried = [figures(generate(denoiser, t, seeds, batch_size=size), wanted, measure) for t in tables]
            best = min(tried, key=lambda one: one["rmse"]) if tried else {}
            row |= {f"{name}{suffix}": round(value, 5) for name, value in best.items()}
        counts[str(calls)] = row
        print(f"{case.model}, guidance {case.guidance:g}, {calls} calls: {row}", flush=True)
    return counts


def overhead(table: SolverTable, denoiser: nn.Module, batch: int = 16, repeats: int = 5) -> float:
    """Processor time of sampling beyond that of its network calls, as a share of theirs: the least of some runs."""
    noise, labels = start_noise(range(batch), denoiser.sample_shape), class_labels(denoiser, range(batch))
    spent = 0.0

    class Timed(nn.Module):
        null_condition = staticmethod(denoiser.null_condition)

        def forward(self, *arguments: Any) -> Tensor:
            nonlocal spent
            begin = time.process_time()
            output = denoiser(*arguments)
            spent += time.process_time() - begin
            return output

    shares, timed = [], Timed()
    for _ in range(repeats):
        spent, begin = 0.0, time.process_time()
        with torch.no_grad():
            sample(timed, table, noise, labels)
        shares.append((time.process_time() - begin - spent) / spent)
    return min(shares)


def peak_memory(table: SolverTable, denoiser: nn.Module, batch: int = 64) -> int:
    """Bytes of tensors that sampling holds at most, the network's own included."""
    noise, labels = start_noise(range(batch), denoiser.sample_shape), class_labels(denoiser, range(batch))
    with torch.no_grad(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        sample(denoiser, table, noise, labels)
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(changes.cumsum(0).max())


def embedded(table: SolverTable, channels: int) -> SolverTable:
    """The same solver with its numbers as matrices of four bands."""
    space = Bands((0.06, 0.12, 0.25), channels)
    names = ("state_coef", "output_coef", "noise_coef")
    weights = {name: space.embed(getattr(table, name)) for name in names}
    return replace(table, space=space, **weights, state_support=None, output_support=None)


def draw(results: dict[str, Any], path: Path) -> None:
    """RMSE and Frechet distance of every case against network calls; the teacher's distance as a line."""
    from matplotlib.figure import Figure

    cases = [name for name in results if name in CASES]
    figure = Figure(figsize=(3.2 * len(cases), 6), layout="constrained")
    for axes, (what, label) in zip(figure.subplots(2, len(cases), squeeze=False), (("rmse", "RMSE"), ("fd", "FD"))):
        for axis, name in zip(axes, cases):
            counts = {int(key): row for key, row in results[name].items() if key.isdigit()}
            for suffix, line in LINES.items():
                points = [(calls, row[what + suffix]) for calls, row in counts.items() if what + suffix in row]
                axis.plot(*zip(*points), marker="o", label=line) if points else None
            if what == "fd":
                axis.axhline(results[name]["teacher_fd"], color="gray", linestyle=":", label="teacher")
            axis.set(title=name.replace("_", ", guidance "), xlabel="network calls", ylabel=label, ylim=(0, None))
            axis.set_xticks(list(counts), [str(calls) for calls in counts], minor=False)
    figure.axes[-len(cases)].legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    """Measure the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--num_samples", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--picture", type=Path, help="PNG of RMSE and FD against calls")
    options = parser.parse_args()
    results: dict[str, Any] = {name: measured(CASES[name], options) for name in options.cases}
    network = load_denoiser("checkpoints/cifar10-sit")
    plain = named_solver("unipc:8", network.schedule)
    results["overhead_scalar"] = round(overhead(plain, network), 4)
    results["overhead_operators"] = round(overhead(embedded(plain, 3), network), 4)
    memory = [peak_memory(table, network) for table in (plain, embedded(plain, 3))]
    results["memory_operators"] = round(memory[1] / memory[0], 3)
    if options.picture:
        draw(results, options.picture)
    print(json.dumps(results))


if __name__ == "__main__":
    guarded(main)
