"""Teacher trajectories of any diffusers pipeline, recorded while it generates from a list of prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.manifest import describe_teacher
from data.shards import Trajectories
from data.trajectories import FIRST_SEED, TrajectoryCache
from data.trajectory_writer import TrajectoryWriter
from denoisers.labels import class_labels
from denoisers.pipeline import PipelineDenoiser
from solvers.nodes import Nodes

PLAIN = (str, int, float, bool, type(None))


def record_trajectories(
    pipe: Any,
    prompts: Sequence[Any],
    folder: str | Path,
    num_inference_steps: int,
    *,
    num_trajectories: int | None = None,
    first_seed: int = FIRST_SEED,
    batch_size: int = 1,
    shard_size: int = 8,
    dtype: torch.dtype = torch.float32,
    prompt_argument: str = "prompt",
    progress: bool = True,
    **call: Any,
) -> TrajectoryCache:
    """Run a pipeline with its own scheduler and keep every state and output in a trajectory cache.

    The pipeline needs no adapter: whatever it does between network and scheduler, guidance included, is in the outputs
    its scheduler receives. Seed s gets prompt s % len(prompts); the cache's condition is the index of the prompt, which
    `denoisers.pipeline.PipelineDenoiser` with the same prompts understands. An interrupted recording goes on.

    Args:
        pipe: a diffusers pipeline with a deterministic, linear scheduler.
        prompts: at least one.
        folder: created if missing.
        num_inference_steps: of the teacher.
        num_trajectories: default: one per prompt.
        first_seed: seeds are first_seed, first_seed + 1, ...
        batch_size: prompts in one call of the pipeline.
        shard_size: trajectories in a file.
        dtype: of the stored states and outputs.
        prompt_argument: the argument of the pipeline's call that takes the prompts (DiT: class_labels).
        progress: show a progress bar.
        call: further arguments of every call, such as guidance_scale, height, num_frames.
    Returns:
        The cache, for `olss`.
    Raises:
        ValueError: arguments the pipeline does not take, a scheduler that is not linear, a pipeline that does not make
            whole runs, or a folder of other trajectories.
    """
    denoiser = PipelineDenoiser(pipe, prompts, prompt_argument=prompt_argument, batch_size=batch_size, **call)
    seeds = range(first_seed, first_seed + (num_trajectories or len(prompts)))
    writer = TrajectoryWriter(folder, describe_recording(denoiser, num_inference_steps, dtype), seeds, shard_size)
    with writer:
        for shard in tqdm(writer.prepare(), desc="recording", unit="shard", disable=not progress):
            writer.write(shard, record_seeds(denoiser, num_inference_steps, writer.shard_seeds(shard), dtype))
    return TrajectoryCache(folder)


def describe_recording(denoiser: PipelineDenoiser, num_inference_steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """What makes recordings comparable: see `describe_teacher`; also the prompts and the arguments of the calls."""
    teacher = describe_teacher(denoiser, denoiser.table(num_inference_steps), dtype)
    plain = {key: value for key, value in denoiser.call.items() if isinstance(value, PLAIN)}
    pipeline = {"num_inference_steps": num_inference_steps, "prompts": denoiser.prompts, "call": plain}
    return teacher | {"pipeline": pipeline}


def record_seeds(
    denoiser: PipelineDenoiser, num_inference_steps: int, seeds: Sequence[int], dtype: torch.dtype = torch.float32
) -> Trajectories:
    """Trajectories of some seeds, on the CPU, in calls of the denoiser's batch size."""
    parts = [seeds[start : start + denoiser.batch_size] for start in range(0, len(seeds), denoiser.batch_size)]
    recorded, nodes = [], Nodes.of(denoiser.table(num_inference_steps))
    for part in parts:
        condition = class_labels(denoiser, part)
        states, outputs = denoiser.record(num_inference_steps, part, condition)
        states, outputs = states.to("cpu", dtype), outputs.to("cpu", dtype)
        recorded.append(Trajectories(states, outputs, condition, tuple(part), nodes))
    return Trajectories.join(recorded)
