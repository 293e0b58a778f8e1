"""What `sample` costs besides the network, against diffusers' own loop with the same solver, in one run.

Both loops drive the same network in turns, whose calls are timed from inside. Of each call, and of each gap between two
calls (with what comes before the first and after the last), the median of all repetitions counts, so that other work on
the machine disturbs neither; overhead is the sum of the gaps over that of the calls. One thread. The last line is one
JSON object: overhead, diffusers_overhead, both for DPM-Solver++ 2M.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers

from solvers import sample, tabulate

SHAPE = (3, 32, 32)


class TimedNetwork(nn.Module):
    """A small convolutional network that notes when each call begins and ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )
        self.times: list[float] = []

    def forward(self, x: Tensor, timestep: Tensor, condition: object = None) -> Tensor:
        self.times.append(time.perf_counter())
        output = self.layers(x * (1 + timestep / 1e4))
        self.times.append(time.perf_counter())
        return output


def diffusers_loop(scheduler, network: TimedNetwork, noise: Tensor, steps: int) -> Tensor:
    """What a pipeline does between its network calls."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, timestep), timestep), timestep, x).prev_sample
    return x


def intervals(network: TimedNetwork, run: Callable[[], Tensor]) -> Tensor:
    """Seconds of one run, (2 * calls + 1,): gap, call, gap, ..., call, gap."""
    network.times = []
    start = time.perf_counter()
    run()
    return torch.tensor([start, *network.times, time.perf_counter()], dtype=torch.float64).diff()


def compare(scheduler, network: TimedNetwork, batch: int, steps: int, repetitions: int) -> tuple[float, float, float]:
    """Overheads (ours, diffusers') of one solver and the network's seconds a call, after both runs have agreed."""
    noise = torch.randn(batch, *SHAPE)
    table = tabulate(scheduler, steps)
    runs = (lambda: sample(network, table, noise), lambda: diffusers_loop(scheduler, network, noise, steps))
    ours, theirs = (run() for run in runs)
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < 1e-3:
        raise RuntimeError(f"the two loops differ by {error:.1g}: this is no comparison")
    measured = [[intervals(network, run) for run in runs] for _ in range(repetitions)]
    medians = [torch.stack(values).median(0).values for values in zip(*measured)]
    overheads = [float(median[::2].sum() / median[1::2].sum()) for median in medians]
    return overheads[0], overheads[1], float(medians[0][1::2].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = TimedNetwork(arguments.width).eval()
    figures = {}
    with torch.no_grad():
        for name in ("UniPCMultistep", "DPMSolverMultistep"):
            scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing="trailing")
            ours, theirs, call = compare(scheduler, network, arguments.batch, arguments.steps, arguments.repetitions)
            print(f"{name}: sample {ours:.2%}, diffusers {theirs:.2%}, network {1e3 * call:.1f} ms a call")
            figures = {"overhead": round(ours, 5), "diffusers_overhead": round(theirs, 5)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
