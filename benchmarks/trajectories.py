"""Trajectory generation against the network's own throughput: what sampling, storing and checksums cost.

The network is the DiT of configs/base/cifar10_dit.yaml with random weights; its calls are timed from inside. On a CPU,
times are processor seconds on one thread, and those of the writing thread count as part of the whole, so that other
work on the machine does not disturb them; on a GPU they are wall-clock seconds. The last line is one JSON object:
throughput_fraction, the network's share of the whole.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.trajectories import FIRST_SEED, generate_trajectories
from denoisers.dit import DiT
from solvers import NoiseSchedule
from solvers.named import named_solver


class TimedDiT(DiT):
    """Adds up how long its calls take."""

    name, weight_hash, seconds = "random", "random", 0.0

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        start = now(x.device.type, time.thread_time)
        output = super().forward(x, timestep, condition)
        self.seconds += now(x.device.type, time.thread_time) - start
        return output


def now(device: str, cpu_clock: Callable[[], float] = time.process_time) -> float:
    """Seconds: on a CPU those of the thread or the process, else wall-clock."""
    if device == "cpu":
        return cpu_clock()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Generate some shards into a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = TimedDiT(NoiseSchedule.linear()).to(options.device).eval().requires_grad_(False)
    table = named_solver(f"ddim:{options.steps}", denoiser.schedule)
    seeds = range(FIRST_SEED, FIRST_SEED + options.shards * options.shard_size)
    with tempfile.TemporaryDirectory() as folder:
        start = now(options.device)
        generate_trajectories(denoiser, table, seeds, folder, shard_size=options.shard_size, device=options.device)
        whole = now(options.device) - start
    rate = options.steps * len(seeds)
    print(f"network {rate / denoiser.seconds:.0f} evaluations/s, with generation {rate / whole:.0f}")
    print(json.dumps({"throughput_fraction": round(denoiser.seconds / whole, 4)}))


if __name__ == "__main__":
    main()
