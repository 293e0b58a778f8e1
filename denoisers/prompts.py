"""Prompts as conditions, by a pipeline's own `encode_prompt`, in the names of the network's arguments."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor
from torch.nn.functional import pad

from denoisers.diffusers_base import DiffusersDenoiser
from denoisers.diffusers_models import from_pipeline
from solvers.conditions import concatenate_conditions
from solvers.text import read_text, split_lines

HIDDEN, NULL = "encoder_hidden_states", "null/"
MASK, PIXART_MASK, POOLED = "encoder_hidden_states_mask", "encoder_attention_mask", "pooled_projections"
PIXART = (HIDDEN, PIXART_MASK, NULL + HIDDEN, NULL + PIXART_MASK)
HANDED_ON = ("max_sequence_length", "clean_caption")
RETURNED: dict[str, tuple[str | None, ...]] = {  # by a pipeline's `encode_prompt`, as arguments of its network
    "StableDiffusionPipeline": (HIDDEN, NULL + HIDDEN),
    "StableDiffusionXLPipeline": (HIDDEN, NULL + HIDDEN, "text_embeds", NULL + "text_embeds"),
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "StableDiffusion3Pipeline": (HIDDEN, NULL + HIDDEN, POOLED, NULL + POOLED),
    "FluxPipeline": (HIDDEN, POOLED, None),
    "WanPipeline": (HIDDEN, NULL + HIDDEN),
    "QwenImagePipeline": (HIDDEN, MASK),
}


def encode_prompts(
    pipe: Any,
    prompts: Sequence[str],
    negative_prompt: str | None = None,
    denoiser: DiffusersDenoiser | None = None,
    batch_size: int = 16,
    with_null: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The condition of a list of prompts, for the denoiser of the same pipeline.

    Args:
        pipe: a diffusers pipeline of a family with prompts; its network may be absent.
        prompts: at least one.
        negative_prompt: the prompt guidance moves away from; None is the pipeline's own default, which may be none.
        denoiser: the one the condition is for, whose image size SDXL and PixArt are told; None takes the pipeline's.
        batch_size: prompts encoded at once.
        with_null: also encode the negative prompt.
        options: further arguments of the pipeline's `encode_prompt`, such as max_sequence_length.
    Returns:
        {argument of the network: (len(prompts), ...), "null": {the same of the negative prompt}}.
    Raises:
        ValueError: no prompts, or a pipeline of an unknown family.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}: give a list of at least one prompt")
    if not takes_prompts(pipe):
        raise ValueError(
            f"the prompts of {type(pipe).__name__} cannot be encoded here, only those of "
            f"{', '.join(RETURNED)}: record any other pipeline with data.record_trajectories"
        )
    denoiser, options = denoiser or from_pipeline(pipe), call_defaults(pipe) | options
    parts = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    with torch.no_grad():
        return concatenate_conditions(
            [_encode(pipe, denoiser, part, _each(negative_prompt, part), with_null, options) for part in parts]
        )


def takes_prompts(pipe: Any) -> bool:
    """Whether `encode_prompts` knows a pipeline."""
    return type(pipe).__name__ in RETURNED


def call_defaults(pipe: Any) -> dict[str, Any]:
    """What a call of the pipeline hands `encode_prompt`, which may have another default (Wan, Qwen-Image, PixArt).

    Captions are cleaned (PixArt) only where the packages for it are installed, as in the pipeline.
    """
    called, known = (inspect.signature(one).parameters for one in (type(pipe).__call__, pipe.encode_prompt))
    found = {name: called[name].default for name in HANDED_ON if name in called and name in known}
    if "clean_caption" in found:
        found["clean_caption"] &= is_bs4_available() and is_ftfy_available()
    return found


def read_prompts(prompts: Sequence[str] | str | Path) -> list[str]:
    """A list of prompts as it is, or the lines of a text file.

    Raises:
        ValueError: a file that is missing or has no lines.
    """
    if not isinstance(prompts, (str, Path)):
        return list(prompts)
    if not Path(prompts).is_file():
        raise ValueError(f"{prompts} does not exist: give a text file with one prompt a line, or a list of prompts")
    lines = [line.strip() for line in split_lines(read_text(prompts)) if line.strip()]
    if not lines:
        raise ValueError(f"{prompts} has no prompts: write one a line")
    return lines


def _encode(
    pipe: Any, denoiser: Any, prompts: list[str], negative: list[str] | None, with_null: bool, options: Any
) -> dict[str, Any]:
    """The condition of some prompts; a negative one that `encode_prompt` does not return is encoded by itself."""
    kind = type(pipe).__name__
    returned = dict(zip(RETURNED[kind], _returned(pipe, prompts, negative, with_null, options)))
    condition = {name: value for name, value in returned.items() if name and not name.startswith(NULL)}
    condition |= _TOLD.get(kind, _nothing)(denoiser, condition[HIDDEN])
    if MASK in condition:
        condition |= _of_full_length(condition, options["max_sequence_length"])
    null = {name.removeprefix(NULL): value for name, value in returned.items() if name and name.startswith(NULL)}
    if with_null and null:
        condition["null"] = condition | null
    elif with_null and negative is not None:
        condition["null"] = _encode(pipe, denoiser, negative, None, False, options)
    return condition


def _returned(
    pipe: Any, prompts: list[str], negative: list[str] | None, with_null: bool, options: Mapping[str, Any]
) -> Sequence[Any]:
    """The pipeline's own `encode_prompt`, given what it takes of these."""
    known = inspect.signature(pipe.encode_prompt).parameters
    if negative is None and "negative_prompt" in known and known["negative_prompt"].default == "":
        negative = [""] * len(prompts)
    arguments = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, "device": pipe._execution_device}
    arguments |= {"do_classifier_free_guidance": with_null, "negative_prompt": negative}
    given = {name: value for name, value in arguments.items() if name in known}
    return pipe.encode_prompt(prompts, **given | dict(options))


def _of_full_length(condition: dict[str, Any], length: int) -> dict[str, Tensor]:
    """Embeddings that are as long as the longest prompt beside them, padded to the longest there may be."""
    hidden, mask = condition[HIDDEN], condition[MASK]
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device) if mask is None else mask
    missing = length - hidden.shape[1]
    return {HIDDEN: pad(hidden, (0, 0, 0, missing)), MASK: pad(mask, (0, missing))}


def _nothing(denoiser: Any, hidden: Tensor) -> dict[str, Tensor]:
    return {}


def _stable_diffusion_xl_size(denoiser: Any, hidden: Tensor) -> dict[str, Tensor]:
    height, width = denoiser.size.pixels
    return {"time_ids": hidden.new_tensor([[height, width, 0, 0, height, width]]).expand(len(hidden), 6)}


def _pixart_size(denoiser: Any, hidden: Tensor) -> dict[str, Tensor]:
    """Only the model of 128x128 latents is told its resolution and aspect ratio."""
    if denoiser.network.config.sample_size != 128:
        return {}
    height, width = denoiser.size.pixels
    resolution = hidden.new_tensor([[height, width]]).expand(len(hidden), 2)
    return {"resolution": resolution, "aspect_ratio": hidden.new_tensor([[height / width]]).expand(len(hidden), 1)}


# What the network is told beside the prompt: (denoiser, embeddings) -> further parts of a condition.
_TOLD: dict[str, Callable[[Any, Tensor], dict[str, Tensor]]] = {
    "StableDiffusionXLPipeline": _stable_diffusion_xl_size,
    "PixArtAlphaPipeline": _pixart_size,
    "PixArtSigmaPipeline": _pixart_size,
}


def _each(negative: str | None, prompts: list[str]) -> list[str] | None:
    return None if negative is None else [negative] * len(prompts)
