"""Training throughput of SLAM against the bare cost of its networks, in one run.

After every training batch the same networks are run bare on a batch of the same size: student forward and backward,
teacher twice (conditional and unconditional, one call of twice the batch), target forward. Medians over the batches
count, so that other work on the machine disturbs neither; `--clock process` counts processor time, for a machine
that is busy (one thread only). The last line is one JSON object: throughput_fraction (bare time over training time),
images_per_second, peak_mb (of the process; on a GPU of its allocator).
"""

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.images import ImageArray
from data.loader import EpochBatchSampler, ResumableLoader
from slam.module import SLAM
from training.arguments import guarded
from training.network import AdamW


class Bare(lightning.Callback):
    """Times each training batch, and the networks alone in between.

    Args:
        module: whose networks are copied; training does not touch the copies.
        batch: (data, labels).
        clock: seconds.
    """

    def __init__(self, module: SLAM, batch: tuple[Tensor, Tensor], clock: Callable[[], float]) -> None:
        self.student = copy.deepcopy(module.student)
        self.target, self.teacher = copy.deepcopy(module.target), module.teacher
        self.batch, self.clock = batch, clock
        self.training: list[float] = []
        self.networks: list[float] = []
        self._since: float | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: SLAM, *_: Any) -> None:
        """A training batch has ended; run the networks alone; the next one begins."""
        now = self._now(pl_module)
        if self._since is not None:
            self.training.append(now - self._since)
        began = self._now(pl_module)
        with trainer.precision_plugin.forward_context():
            self._run(pl_module)
        self._since = self._now(pl_module)
        self.networks.append(self._since - began)

    def _run(self, module: SLAM) -> None:
        data, labels = (value.to(module.device) for value in self.batch)
        student, target = self.student.to(module.device), self.target.to(module.device)
        timestep = torch.full((len(data),), 500.0, device=module.device)
        with torch.no_grad():
            self.teacher(data, timestep, labels)
            target(data, timestep, labels)
        gamma = torch.rand_like(timestep)
        student(data, timestep, labels, gamma=gamma).float().square().mean().backward()
        for parameter in student.parameters():
            parameter.grad = None

    def _now(self, module: SLAM) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def loader(shape: tuple[int, ...], count: int, batch_size: int) -> ResumableLoader:
    """Random pictures of ten classes, in memory as training holds them."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return ResumableLoader(ImageArray(images, generator.integers(0, 10, count)), EpochBatchSampler(count, batch_size))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train and time."""
    module = SLAM(
        options.teacher,
        guidance_scale=options.guidance_scale,
        teacher_dtype="bfloat16" if "bf16" in options.precision else None,
        optimizer=AdamW(1e-5),
        sample_every=0,
    )
    source = loader(module.teacher.sample_shape, 4 * options.batch_size, options.batch_size)
    clock = time.process_time if options.clock == "process" else time.perf_counter
    bare = Bare(module, next(iter(loader(module.teacher.sample_shape, options.batch_size, options.batch_size))), clock)
    trainer = lightning.Trainer(
        max_steps=options.iterations,
        max_epochs=-1,
        precision=options.precision,
        gradient_clip_val=1.0,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[bare],
    )
    trainer.fit(module, source)
    training, networks = (float(np.median(values[options.warmup :])) for values in (bare.training, bare.networks))
    cuda = trainer.strategy.root_device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "throughput_fraction": round(networks / training, 4),
        "images_per_second": round(options.batch_size / training, 2),
        "peak_mb": round(peak),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="checkpoints/cifar10-dit")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="batches left out at the start")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    guarded(main)
