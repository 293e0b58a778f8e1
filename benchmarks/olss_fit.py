"""OLSS's streaming fit against the direct way, on the same trajectories and with the same path search.

Direct: the trajectories stacked in memory, `torch.linalg.lstsq` on all their rows for every candidate step of the
paper's greedy search, and for the rows of the path it finds. Streaming: one triangular factor, then tiny solves on its
columns. 64 trajectories of 100 DDIM steps, 3x32x32, of the exact denoiser of 32 smooth random images.

Times are processor seconds of one thread, so that other work on the machine does not disturb them. Peak memory is that
of a fresh process that fits 64 or 256 trajectories in batches of 16, beyond what it held before. The last line is one
JSON object: speedup (end to end, the factor included), search_speedup (once the factor exists), max_coef_diff,
peak_mb_64, peak_mb_256.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import Trajectories
from data.trajectories import run_teacher
from olss.path import greedy_path
from olss.plan import CallPlan
from olss.run import fit_on_teacher, teacher_columns
from solvers import NoiseSchedule
from solvers.named import named_solver

STEPS, SHAPE, BISECTIONS = 100, (3, 32, 32), 40
TEACHER = named_solver(f"ddim:{STEPS}", NoiseSchedule.linear())


class ExactDenoiser:
    """Noise prediction for data that is one of a few smooth images: a softmax over them."""

    def __init__(self, num_images: int = 32) -> None:
        self.schedule, self.sample_shape = NoiseSchedule.linear(), SHAPE
        coarse = torch.randn(num_images, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        self.images = torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bicubic").clamp(-1, 1).flatten(1)

    def __call__(self, x: Tensor, timestep: Tensor, condition: None = None) -> Tensor:
        alpha, sigma = (value.float() for value in self.schedule.alpha_sigma(timestep))
        flat = x.flatten(1)
        scores = alpha / sigma**2 * (flat @ self.images.T - alpha / 2 * self.images.pow(2).sum(1))
        return ((flat - alpha * scores.softmax(1) @ self.images) / sigma).view_as(x)


def batches(count: int, size: int = 16) -> Iterator[Trajectories]:
    """Trajectories of seeds 0 to count - 1."""
    denoiser = ExactDenoiser()
    for start in range(0, count, size):
        yield run_teacher(denoiser, TEACHER, range(start, min(start + size, count)))


class Direct:
    """Least squares on all rows, for every candidate anew."""

    def __init__(self, trajectories: Trajectories) -> None:
        states, outputs = trajectories.states.unbind(1), trajectories.outputs.unbind(1)
        columns = [states[0], *outputs, *states[1:]]
        self.columns = torch.stack([column.reshape(-1).double() for column in columns])
        self.calls = 0

    def solve(self, basis: list[int], target: int) -> tuple[Tensor, float]:
        """(coefficients, root-mean-square error)."""
        self.calls += 1
        matrix, wanted = self.columns[basis].T, self.columns[target][:, None]
        found = torch.linalg.lstsq(matrix, wanted, rcond=1e-14, driver="gelsd").solution
        return found[:, 0], float((matrix @ found - wanted).pow(2).mean().sqrt())

    def error(self, path: list[int], end: int) -> float:
        """Error of the step from path[-1] to `end`: the current state and all outputs so far."""
        state = 0 if path[-1] == 0 else STEPS + path[-1]
        return self.solve([state, *(1 + i for i in path)], STEPS + end)[1]

    def walk(self, bound: float, nfe: int) -> list[int] | None:
        """The greedy path under a bound, or None when it takes more than `nfe` steps."""
        path = [0]
        while True:
            low, high = path[-1] + 1, STEPS
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.error(path, middle) <= bound else (low, middle - 1)
            if low == STEPS:
                return path
            if len(path) == nfe:
                return None
            path.append(low)

    def path(self, nfe: int) -> list[int]:
        """The path of the smallest bound that `nfe` steps meet, by bisection of its logarithm."""
        low, high = math.log(1e-16), math.log(max(self.error([0], end) for end in range(1, STEPS + 1))) + 1
        found = [0]
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            path = self.walk(math.exp(middle), nfe)
            low, high, found = (middle, high, found) if path is None else (low, middle, path)
        return found

    def rows(self, path: list[int]) -> list[Tensor]:
        """Coefficients of the path's rows: start and outputs so far."""
        ends = [*path[1:], STEPS]
        return [self.solve([0, *(1 + j for j in path[: i + 1])], STEPS + end)[0] for i, end in enumerate(ends)]


def compare(nfe: int, count: int) -> dict[str, float]:
    """Both ways on the same trajectories, timed."""
    trajectories = Trajectories.join(list(batches(count)))
    parts = [trajectories[start : start + 16] for start in range(0, count, 16)]
    times = [time.process_time()]
    columns = teacher_columns(TEACHER, parts)
    times.append(time.process_time())
    path = greedy_path(columns.factors[0], TEACHER, nfe)
    fit = fit_on_teacher(columns, TEACHER, CallPlan(tuple(path)))
    times.append(time.process_time())
    direct = Direct(trajectories)
    direct_path = direct.path(nfe)
    rows = direct.rows(direct_path)
    times.append(time.process_time())
    if path != direct_path:
        raise SystemExit(f"the paths differ: streaming {path}, direct {direct_path}")
    factoring, searching, directly = (end - start for start, end in pairwise(times))
    print(f"path {path}, condition numbers up to {max(fit.conditions):.1e}")
    print(f"streaming: factor {factoring:.2f} s, search and solve {searching * 1e3:.0f} ms")
    print(f"direct: {direct.calls} solves of {trajectories.states[:, 0].numel()} rows, {directly:.2f} s")
    differences = [float((a - b).abs().max()) for a, b in zip(fit.weights, rows)]
    return {
        "speedup": round(directly / (factoring + searching), 1),
        "search_speedup": round(directly / searching, 1),
        "max_coef_diff": max(differences),
    }


def peak_mb(count: int, nfe: int) -> float:
    """Peak memory of a streaming fit in a process of its own, in MB beyond the memory before it."""
    command = [sys.executable, __file__, "--peak", str(count), "--nfe", str(nfe)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def fit_and_report_peak(count: int, nfe: int) -> None:
    """Print by how many MB the peak of this process rises."""
    next(batches(1))
    before = peak_kb()
    columns = teacher_columns(TEACHER, batches(count))
    fit_on_teacher(columns, TEACHER, CallPlan(tuple(greedy_path(columns.factors[0], TEACHER, nfe))))
    print((peak_kb() - before) / 1024)


def peak_kb() -> int:
    """Peak memory of this process (ru_maxrss would begin with that of its parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Run the comparison, then the two memory measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nfe", type=int, default=8)
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--peak", type=int, help="only fit this many trajectories and print the peak memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        fit_and_report_peak(options.peak, options.nfe)
        return
    figures = compare(options.nfe, options.trajectories)
    figures |= {f"peak_mb_{count}": round(peak_mb(count, options.nfe), 1) for count in (64, 256)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
