"""What a comparison costs beyond its network evaluations.

    python benchmarks/compare.py --denoiser checkpoints/cifar10-dit

Compares six solvers on 512 images each with all metrics, the reference's images and the data's statistics cached, and
then calls the bare network as often, in batches of the same size. Both are measured in processor time of this process,
which other programs on the machine disturb less than seconds. The last line is JSON: overhead (0.1 is 10 %).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers import class_labels, load_denoiser
from evaluation.args import CompareArgs
from evaluation.compare import compare
from solvers import start_noise
from training.arguments import guarded

SOLVERS = {"discrete_vp": ("ddim", "dpmpp", "unipc"), "flow": ("euler", "dpmpp", "unipc")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--denoiser", default="checkpoints/cifar10-dit")
    parser.add_argument("--reference", help="default: 100 steps of DDIM, or of Euler for a flow model")
    parser.add_argument("--nfe", type=int, nargs=2, default=[5, 10])
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--cache", default="runs/cache/reference")
    options = parser.parse_args()
    denoiser = load_denoiser(options.denoiser, precision=options.precision)
    names = SOLVERS[denoiser.schedule.kind]
    compared = [f"{name}:{nfe}" for name in names for nfe in options.nfe]
    with tempfile.TemporaryDirectory() as folder:
        args = CompareArgs(
            options.denoiser,
            compared,
            options.reference,
            output=f"{folder}/second",
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            precision=options.precision,
            cache=options.cache,
        )
        compare(replace(args, solvers=compared[:1], output=f"{folder}/first"))  # fills the cache
        whole = spent(lambda: compare(args))
    evaluations = len(names) * sum(options.nfe) * options.num_samples
    bare = spent(lambda: network_alone(denoiser, evaluations, options.batch_size))
    print(f"comparison {whole:.1f} s, network alone {bare:.1f} s of processor time, {evaluations} evaluations")
    print(json.dumps({"overhead": round(whole / bare - 1, 4), "precision": options.precision}))


def spent(work: Callable[[], object]) -> float:
    """Processor time of this process, seconds."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


@torch.inference_mode()
def network_alone(denoiser: torch.nn.Module, evaluations: int, batch_size: int) -> None:
    """Call the network so many times on the same batch."""
    seeds = list(range(batch_size))
    noise, condition = start_noise(seeds, denoiser.sample_shape), class_labels(denoiser, seeds)
    timestep = torch.full((batch_size,), 500.0)
    for _ in range(evaluations // batch_size):
        denoiser(noise, timestep, condition)


if __name__ == "__main__":
    guarded(main)
