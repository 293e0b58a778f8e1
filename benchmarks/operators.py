"""What weights that are matrices of bands cost the sampler, beside weights that are numbers.

UniPC of 8 rows with its numbers, and the same numbers as matrices of four bands: processor time beyond that of the
network calls as a share of theirs (`overhead_scalar`, `overhead_operators`; 16 images), and the bytes of tensors held
at most as a ratio (`memory_operators`; 64 images). The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers import class_labels, load_denoiser
from solvers import Bands, SolverTable, named_solver, sample, start_noise
from training.arguments import guarded


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


def main() -> None:
    """Measure both tables on one network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--denoiser", default="checkpoints/cifar10-sit")
    network = load_denoiser(parser.parse_args().denoiser)
    plain = named_solver("unipc:8", network.schedule)
    bands = embedded(plain, network.sample_shape[0])
    memory = [peak_memory(table, network) for table in (plain, bands)]
    results = {
        "overhead_scalar": round(overhead(plain, network), 4),
        "overhead_operators": round(overhead(bands, network), 4),
        "memory_operators": round(memory[1] / memory[0], 3),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    guarded(main)
