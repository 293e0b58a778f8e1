"""Recording pipelines, and pipelines as denoisers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data.recording import record_trajectories
from denoisers import with_guidance
from denoisers.diffusers_models import from_pipeline
from solvers import sample_trace
from tests.denoisers.test_adapters import condition_of
from tests.tiny_pipelines import KINDS, call_arguments, tiny_pipeline

PROMPTS = ["a cat", "dog", "tree"]
STEPS = 4


def call_of(kind: str, prompts: list[str], guidance_scale: float) -> tuple[list, dict[str, Any]]:
    """Prompts and the further arguments of a call."""
    arguments = call_arguments(kind, prompts, guidance_scale, STEPS)
    del arguments["num_inference_steps"]
    if kind == "dit":
        return arguments.pop("class_labels"), arguments | {"prompt_argument": "class_labels"}
    return arguments.pop("prompt"), arguments


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_trajectories_are_the_table_s_own(kind: str, tmp_path: Path) -> None:
    """Each recorded state follows from the recorded ones before by the table, and each output is the network's."""
    pipe = tiny_pipeline(kind)
    prompts, call = call_of(kind, PROMPTS, 3.0)
    cache = record_trajectories(pipe, prompts, tmp_path, STEPS, batch_size=2, shard_size=2, progress=False, **call)
    found = cache.load()
    assert found.states.shape[:2] == (3, cache.table.nfe + 1)
    denoiser = with_guidance(from_pipeline(pipe, 16, 16), 3.0)
    condition = condition_of(kind, pipe, [PROMPTS[i] for i in found.condition.tolist()])
    trace = sample_trace(denoiser, cache.table, found.states[:, 0] / cache.table.start_scale, condition)
    scale = float(found.states.abs().max())
    assert float((torch.stack(trace.states, 1) - found.states).abs().max()) < 1e-5 * scale
    assert float((torch.stack(trace.outputs, 1) - found.outputs).abs().max()) < 1e-4 * scale
    assert cache.schedule == denoiser.schedule
    assert cache.sample_shape == denoiser.sample_shape
    assert cache.manifest["teacher"]["guidance_scale"] == 3.0
    cache.check(denoiser)
