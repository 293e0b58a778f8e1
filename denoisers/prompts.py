"""Prompts as conditions: one function per model family, in the names of the network's own arguments."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from denoisers.diffusers_base import DiffusersDenoiser
from denoisers.diffusers_models import from_pipeline
from solvers.conditions import concatenate_conditions
from solvers.text import read_text

Encode = Callable[..., dict[str, Any]]


def encode_prompts(
    pipe: Any,
    prompts: Sequence[str],
    negative_prompt: str | None = None,
    denoiser: DiffusersDenoiser | None = None,
    batch_size: int = 16,
    **options: Any,
) -> dict[str, Any]:
    """The condition of a list of prompts, for the denoiser of the same pipeline.

    Args:
        pipe: a diffusers pipeline of a family with prompts; its network may be absent.
        prompts: at least one.
        negative_prompt: the prompt guidance moves away from; None is the pipeline's own default.
        denoiser: the one the condition is for, whose image size SDXL and PixArt are told; None takes the pipeline's.
        batch_size: prompts encoded at once.
        options: further arguments of the pipeline's `encode_prompt`, such as max_sequence_length.
    Returns:
        {argument of the network: (len(prompts), ...), "null": {the same of the negative prompt}}.
    Raises:
        ValueError: no prompts, or a pipeline of an unknown family.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}: give a list of at least one prompt")
    encode = _ENCODERS.get(type(pipe).__name__)
    if encode is None:
        raise ValueError(
            f"the prompts of {type(pipe).__name__} cannot be encoded here, only those of "
            f"{', '.join(_ENCODERS)}: record any other pipeline with data.record_trajectories"
        )
    denoiser = denoiser or from_pipeline(pipe)
    parts = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    with torch.no_grad():
        return concatenate_conditions([encode(pipe, denoiser, part, negative_prompt, **options) for part in parts])


def takes_prompts(pipe: Any) -> bool:
    """Whether `encode_prompts` knows a pipeline."""
    return type(pipe).__name__ in _ENCODERS


def read_prompts(prompts: Sequence[str] | str | Path) -> list[str]:
    """A list of prompts as it is, or the lines of a text file.

    Raises:
        ValueError: a file that is missing or has no lines.
    """
    if not isinstance(prompts, (str, Path)):
        return list(prompts)
    if not Path(prompts).is_file():
        raise ValueError(f"{prompts} does not exist: give a text file with one prompt a line, or a list of prompts")
    lines = [line.strip() for line in read_text(prompts).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{prompts} has no prompts: write one a line")
    return lines


def _stable_diffusion(pipe, denoiser, prompts, negative, **options) -> dict[str, Any]:
    hidden, null = pipe.encode_prompt(prompts, pipe._execution_device, 1, True, _each(negative, prompts), **options)
    return {"encoder_hidden_states": hidden, "null": {"encoder_hidden_states": null}}


def _stable_diffusion_xl(pipe, denoiser, prompts, negative, **options) -> dict[str, Any]:
    hidden, null, pooled, null_pooled = pipe.encode_prompt(prompts, negative_prompt=_each(negative, prompts), **options)
    height, width = denoiser.size.pixels
    time_ids = hidden.new_tensor([[height, width, 0, 0, height, width]]).expand(len(prompts), 6)
    return {
        "encoder_hidden_states": hidden,
        "text_embeds": pooled,
        "time_ids": time_ids,
        "null": {"encoder_hidden_states": null, "text_embeds": null_pooled, "time_ids": time_ids},
    }


def _pixart(pipe, denoiser, prompts, negative, **options) -> dict[str, Any]:
    hidden, mask, null, null_mask = pipe.encode_prompt(prompts, negative_prompt=negative or "", **options)
    added = _pixart_size(denoiser, hidden)
    return {
        "encoder_hidden_states": hidden,
        "encoder_attention_mask": mask,
        **added,
        "null": {"encoder_hidden_states": null, "encoder_attention_mask": null_mask, **added},
    }


def _pixart_size(denoiser, hidden) -> dict[str, Any]:
    """Only the model of 128x128 latents is told its resolution and aspect ratio."""
    if denoiser.network.config.sample_size != 128:
        return {}
    height, width = denoiser.size.pixels
    resolution = hidden.new_tensor([[height, width]]).expand(len(hidden), 2)
    return {"resolution": resolution, "aspect_ratio": hidden.new_tensor([[height / width]]).expand(len(hidden), 1)}


def _sd3(pipe, denoiser, prompts, negative, **options) -> dict[str, Any]:
    negative = _each(negative, prompts)
    hidden, null, pooled, null_pooled = pipe.encode_prompt(prompts, None, None, negative_prompt=negative, **options)
    return {
        "encoder_hidden_states": hidden,
        "pooled_projections": pooled,
        "null": {"encoder_hidden_states": null, "pooled_projections": null_pooled},
    }


def _flux(pipe, denoiser, prompts, negative, **options) -> dict[str, Any]:
    """Without a negative prompt there is no null condition: guidance-distilled networks need none."""
    hidden, pooled, _ = pipe.encode_prompt(prompts, None, **options)
    condition: dict[str, Any] = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    if negative is not None:
        condition["null"] = _flux(pipe, denoiser, _each(negative, prompts), None, **options)
    return condition


_ENCODERS: dict[str, Encode] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
}


def _each(negative: str | None, prompts: list[str]) -> list[str] | None:
    return None if negative is None else [negative] * len(prompts)
