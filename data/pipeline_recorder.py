"""Teacher trajectories of any diffusers pipeline, recorded while it generates from a list of prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.manifest import describe_teacher
from data.pipeline_check import check_rows, check_run
from data.shards import Trajectories
from data.trajectories import FIRST_SEED, TrajectoryCache
from data.trajectory_writer import TrajectoryWriter
from denoisers.labels import class_labels
from denoisers.pipeline import PipelineDenoiser
from solvers.nodes import Nodes
from solvers.progress import progress_bar


def record_trajectories(
    pipe: Any,
    prompts: Sequence[Any] | None,
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
    its scheduler receives. Seed s gets prompt s % len(prompts); the cache's condition is index of the prompt and seed,
    which `denoisers.pipeline.PipelineDenoiser` with the same arguments understands. An interrupted recording goes on.
    Recordings are checked while they are made, see `data.pipeline_check`.

        cache = record_trajectories(pipe, ["a cat", "a dog"], folder, 50, num_trajectories=16, guidance_scale=7.5)
        found = cache.load()  # states (16, 51, ...), outputs (16, 50, ...), condition (16, 2), seeds
        cache.table, cache.identity  # the teacher's solver, and for whom a solver fitted on this is

    Args:
        pipe: a diffusers pipeline with a deterministic, linear scheduler.
        prompts: at least one; or mappings of arguments; None for a pipeline without: see `PipelineDenoiser`.
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
        ValueError: arguments the pipeline does not take, a scheduler that is not linear or draws noise, a pipeline that
            does not make whole runs or whose runs are no solver's, or a folder of other trajectories.
    """
    denoiser = PipelineDenoiser(pipe, prompts, prompt_argument=prompt_argument, batch_size=batch_size, **call)
    seeds = range(first_seed, first_seed + (num_trajectories or len(denoiser.entries)))
    writer = TrajectoryWriter(folder, describe_recording(denoiser, num_inference_steps, dtype), seeds, shard_size)
    with writer:
        for shard in progress_bar(writer.prepare(), "recording", "shard", show=progress):
            writer.write(shard, record_seeds(denoiser, num_inference_steps, writer.shard_seeds(shard), dtype))
    return TrajectoryCache(folder)


def describe_recording(denoiser: PipelineDenoiser, num_inference_steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """What makes recordings comparable: see `describe_teacher`; also the prompts and the arguments of the calls."""
    teacher = describe_teacher(denoiser, denoiser.table(num_inference_steps), dtype)
    teacher |= {"thresholding": denoiser.thresholding} if denoiser.thresholding else {}
    return teacher | {"pipeline": {"num_inference_steps": num_inference_steps, **denoiser.settings}}


def record_seeds(
    denoiser: PipelineDenoiser, num_inference_steps: int, seeds: Sequence[int], dtype: torch.dtype = torch.float32
) -> Trajectories:
    """Trajectories of some seeds, on the CPU, in calls of the denoiser's batch size; the first is checked by calls."""
    parts = [seeds[start : start + denoiser.batch_size] for start in range(0, len(seeds), denoiser.batch_size)]
    recorded, table = [], denoiser.table(num_inference_steps)
    for part in parts:
        condition = class_labels(denoiser, part)
        states, outputs = denoiser.record(num_inference_steps, condition)
        if recorded:
            check_rows(denoiser.name, table, states, outputs)
        else:
            check_run(denoiser, table, states, outputs, condition)
        states, outputs = states.to("cpu", dtype), outputs.to("cpu", dtype)
        recorded.append(Trajectories(states, outputs, condition, tuple(part), Nodes.of(table)))
    return Trajectories.join(recorded)
