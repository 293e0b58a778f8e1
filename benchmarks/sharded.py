"""SLAM's step sharded over two processes against one process, and weights in memory with and without a shared teacher.

Both processes have one thread. In turns the first makes a step alone, on networks of its own, while the second waits,
and both make a step of FSDP2 on a batch each; medians count. The last line is one JSON object:

    speedup_processor   2 * processor time alone / processor time of a process sharded: what two free cores would gain
    speedup_wall        2 * time alone / time sharded: the same with waiting, and with whatever else the machine does
    communicates        processor time sharded that is not that of a step alone, as a share of it
    lora_memory         bytes of all weights with lora_rank, over those with a teacher of its own; bfloat16 teacher
"""

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers.diffusers_models import from_network
from slam.lines import teacher_points
from slam.networks import follow, make_student, make_target, make_teacher, shard
from slam.objective import Objective, Weights, predictions

PIXELS, TEXT = 256, 32


def network(width: int, depth: int) -> Any:
    """A random Wan transformer of pictures, of one frame."""
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 64, "num_attention_heads": width // 64, "ffn_dim": 4 * width, "num_layers": depth}
    wan = diffusers.WanTransformer3DModel(**sizes, text_dim=width, freq_dim=64)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return from_network(wan, scheduler, height=PIXELS, width=PIXELS, num_frames=1)


class Step:
    """A step of SLAM on networks of its own.

    Args:
        options: width, depth and batch.
        mesh: to shard over; None for a process alone.
    """

    def __init__(self, options: argparse.Namespace, mesh: Any = None) -> None:
        teacher = network(options.width, options.depth)
        self.student = make_student(teacher, None, False, told=True)
        self.target, self.teacher = make_target(self.student), make_teacher(teacher, 1.0, None)
        for one in (self.student, self.target, self.teacher) if mesh is not None else ():
            shard(one, mesh)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), fused=True)
        points = teacher_points(teacher.schedule, 50)[torch.arange(options.batch) % 50]
        self.weights = Weights.of(teacher.schedule, points, torch.rand(options.batch, dtype=torch.float64))
        self.weights = self.weights.to(torch.device("cpu"), torch.float32)
        self.data = torch.randn(2, options.batch, *teacher.sample_shape)
        self.condition = {"encoder_hidden_states": torch.randn(options.batch, TEXT, options.width)}

    def __call__(self) -> tuple[float, float]:
        """Processor time and time that it takes."""
        began = time.process_time(), time.perf_counter()
        networks = self.student, self.target, self.teacher
        found, aim = predictions(*networks, self.weights, *self.data, self.condition)
        Objective().of(found - aim).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        follow(self.target, self.student, 0.95)
        return time.process_time() - began[0], time.perf_counter() - began[1]


def rank(number: int, port: int, options: argparse.Namespace) -> None:
    """One of two processes; the first prints."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo")
    alone = Step(options) if number == 0 else None
    sharded = Step(options, init_device_mesh("cpu", (2,)))
    times: dict[str, list[Any]] = {"alone": [], "sharded": []}
    for _ in range(options.rounds + 1):
        torch.distributed.barrier()
        times["alone"].append(alone() if alone else (0.0, 0.0))
        torch.distributed.barrier()
        times["sharded"].append(sharded())
    if number == 0:
        print(json.dumps(figures(times) | {"lora_memory": lora_memory(options)}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def figures(times: dict[str, list[Any]]) -> dict[str, float]:
    """Ratios of medians, the first round left out."""
    (alone, alone_wall), (sharded, wall) = (
        (median(value) for value in zip(*times[name][1:])) for name in ("alone", "sharded")
    )
    return {
        "speedup_processor": round(2 * alone / sharded, 3),
        "speedup_wall": round(2 * alone_wall / wall, 3),
        "communicates": round(1 - alone / sharded, 3),
    }


def lora_memory(options: argparse.Namespace, lora_rank: int = 16) -> float:
    """Bytes of shared weights over those of a teacher beside its student."""
    sizes = []
    for shared in (True, False):
        teacher = network(options.width, options.depth).to(torch.bfloat16)
        student = make_student(teacher, lora_rank, False, told=True, shared=shared)
        sizes.append(weight_bytes(teacher, student, make_target(student)))
    return round(sizes[0] / sizes[1], 3)


def weight_bytes(*networks: nn.Module) -> int:
    """Of all weights, each counted once."""
    found = {value.data_ptr(): value.nbytes for one in networks for value in one.parameters()}
    return sum(found.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="samples of 256 tokens for each process")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(rank, (port, options), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
