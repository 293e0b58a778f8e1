"""Adapters against the pipelines' own network calls and images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)

from denoisers import class_labels, load_denoiser, with_guidance
from denoisers.diffusers_models import from_network, from_pipeline, read_schedule
from denoisers.prompts import encode_prompts
from solvers import NoiseSchedule, sample, start_noise
from solvers.tabulate import tabulate
from tests.tiny_pipelines import LENGTH, call_arguments, tiny_pipeline, tiny_unet

PROMPTS = ["a cat", "dog"]
PROMPT_KINDS = ("sd", "sdxl", "pixart", "sd3", "flux")
STEPS = 4


def condition_of(kind: str, pipe: Any, prompts: list[str] = PROMPTS) -> Any:
    if kind == "dit":
        return torch.tensor(call_arguments(kind, prompts, 1.0, STEPS)["class_labels"])
    longer = {} if kind in ("sd", "sdxl") else {"max_sequence_length": LENGTH}
    return encode_prompts(pipe, prompts, denoiser=from_pipeline(pipe, 16, 16), **longer)


def table_of(kind: str, pipe: Any, denoiser: Any) -> Any:
    """The pipeline's own scheduler, tabulated with the arguments the pipeline gives it."""
    if kind != "flux":
        return tabulate(pipe.scheduler, STEPS)
    sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
    mu = float(np.log(denoiser.schedule.parameters["shift"]))
    return tabulate(pipe.scheduler, None, set_timesteps={"sigmas": sigmas, "mu": mu})


def recorded_calls(network: torch.nn.Module) -> list[tuple[tuple, dict, Any]]:
    calls: list = []
    network.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True)
    return calls


@pytest.mark.parametrize("kind", ["sd", "sdxl", "dit", "pixart", "sd3", "flux"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sample_equals_the_pipeline(kind: str, guidance_scale: float) -> None:
    """The whole run: conditions, guidance, timesteps and the learned variance as the pipeline handles them."""
    pipe = tiny_pipeline(kind)
    denoiser = with_guidance(from_pipeline(pipe, 16, 16), guidance_scale)
    noise = start_noise([3, 4], denoiser.sample_shape)
    arguments = call_arguments(kind, PROMPTS, guidance_scale, STEPS)
    if kind == "dit":  # takes no latents and draws them first
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(noise.shape, generator=generator)
        expected = pipe(**arguments, generator=torch.Generator().manual_seed(7)).images
    else:
        expected = pipe(**arguments, latents=noise).images
    result = sample(denoiser, table_of(kind, pipe, denoiser), noise, condition_of(kind, pipe))
    if kind == "dit":
        result = (pipe.vae.decode(result / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    scale = float(expected.abs().max())
    assert float((result - expected).abs().max()) < 1e-5 * scale
    assert denoiser.guidance_scale == guidance_scale if guidance_scale != 1 else True
