"""diffusers folders (and hub names) as denoisers."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import nn

from denoisers.diffusers_base import NETWORKS, DiffusersDenoiser, Source, check_components
from denoisers.diffusers_models import FAMILIES, from_network, vae_scales
from denoisers.pipeline import PipelineDenoiser
from denoisers.prompts import encode_prompts, read_prompts
from solvers.conditions import condition_to

DTYPES = ("float32", "bfloat16", "float16")
LEGACY = ("Transformer2DModel",)  # the class the first DiT and PixArt folders name


def load_diffusers(
    path: str | Path,
    prompts: Sequence[str] | str | Path | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    dtype: str = "float32",
    variant: str | None = None,
    encode: dict[str, Any] | None = None,
    decoder: bool = False,
    tiling: bool = False,
    device: str | torch.device = "cpu",
) -> DiffusersDenoiser:
    """Load the network and schedule of a diffusers folder; text encoders do not stay in memory.

    Args:
        path: a pipeline folder (model_index.json), a model folder inside one or with its scheduler's config beside its
            own, or the hub name of a pipeline.
        prompts: a list, or a text file of one prompt a line: encoded once and kept as `denoiser.conditions`, from which
            seeds choose; None leaves prompts to the caller (`encode_prompts`).
        negative_prompt: the prompt guidance moves away from; None is the pipeline's own default.
        height: of the image in pixels; None takes the network's own size.
        width: likewise.
        num_frames: of a video; None takes the pipeline's own number.
        dtype: of the weights, by torch's name: float32, bfloat16 or float16.
        variant: of the weight files, such as fp16.
        encode: further arguments of the pipeline's `encode_prompt`, such as max_sequence_length.
        decoder: also load the autoencoder, for `denoiser.decode(states) -> images`.
        tiling: decode large images tile by tile, with little memory and faint seams.
        device: where prompts are encoded and images decoded; the network stays on the CPU.
    Raises:
        ValueError: an unknown family or dtype, missing files, or a hub name that cannot be reached.
    """
    _check_dtype(dtype)
    root, component = locate(path)
    weights = {"torch_dtype": getattr(torch, dtype), "variant": variant}
    network = _load_network(root, component, weights)
    vae = read_config(AutoencoderKL, root, "vae", required=False)
    scheduler = read_config(DDIMScheduler, root, "scheduler")
    name = Path(str(path)).name
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    denoiser = from_network(network, scheduler, **sizes, **vae_scales(vae), name=name)
    options: dict[str, Any] = {**sizes, "dtype": dtype, "encode": encode}
    options |= {"decoder": decoder, "tiling": tiling}
    if prompts is not None:
        prompts = read_prompts(prompts)
        options |= {"prompts": prompts, "negative_prompt": negative_prompt}
        pipe = text_pipeline(root, **weights).to(device)
        conditions = encode_prompts(pipe, prompts, negative_prompt, denoiser, **(encode or {}))
        denoiser.conditions = condition_to(conditions, "cpu")
    denoiser.source = Source(root, variant, {key: value for key, value in options.items() if value})
    if decoder:
        kind = AutoencoderKL if vae is None else getattr(diffusers, vae["_class_name"])
        autoencoder = kind.from_pretrained(root, subfolder="vae", **weights).to(device)
        if tiling:
            autoencoder.enable_tiling()
        denoiser.set_decoder(autoencoder)
    return denoiser


def load_pipeline(
    path: str | Path,
    prompts: Sequence[Any] | str | Path,
    dtype: str = "float32",
    variant: str | None = None,
    prompt_argument: str = "prompt",
    batch_size: int = 1,
    call: dict[str, Any] | None = None,
) -> PipelineDenoiser:
    """Load any diffusers pipeline, whole, as a denoiser; see PipelineDenoiser.

    Args:
        path: a pipeline folder or hub name.
        prompts: a list, or a text file of one prompt a line.
        dtype: of the weights, by torch's name: float32, bfloat16 or float16.
        variant: of the weight files, such as fp16.
        prompt_argument: the argument of the pipeline's call that takes the prompts.
        batch_size: prompts in one call.
        call: further arguments of every call.
    Raises:
        ValueError: no pipeline there, or arguments it does not take.
    """
    _check_dtype(dtype)
    locate(path, any_network=True)
    pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=getattr(torch, dtype), variant=variant)
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(type(pipe).__call__).parameters
    call = {key: value for key, value in (call or {}).items() if key in known or key != "guidance_scale"}
    prompts = read_prompts(prompts)
    return PipelineDenoiser(pipe, prompts, prompt_argument=prompt_argument, batch_size=batch_size, **call)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")


def locate(path: str | Path, any_network: bool = False) -> tuple[str, str | None]:
    """(root, component): where the pipeline lies, and the network's folder in it; None when it lies in the root."""
    folder = Path(path)
    if not any_network and (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        beside = (folder.parent / "scheduler" / "scheduler_config.json").is_file()
        return (str(folder.parent), folder.name) if beside else (str(folder), None)
    try:
        index = DiffusionPipeline.load_config(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is neither a folder here nor a pipeline on the hub that can be reached: check the spelling, or "
            "download it first"
        ) from error
    component = next((name for name in NETWORKS if index.get(name)), None)
    if not any_network:
        check_components(str(path), [name for name, value in index.items() if isinstance(value, list) and value[0]])
    if component is None and not any_network:
        raise ValueError(f"{path} is a {index.get('_class_name')} without transformer or unet: wrap its network")
    return str(path), component


def _load_network(root: str, component: str | None, weights: dict[str, Any]) -> nn.Module:
    kind, subfolder = _network_class(root, component)
    location = {} if subfolder is None else {"subfolder": subfolder}
    return kind.from_pretrained(root, **location, **weights)


def outline(root: str, component: str | None) -> nn.Module:
    """The network of a folder without its weights."""
    kind, subfolder = _network_class(root, component)
    with torch.device("meta"):
        return kind.from_config(read_config(UNet2DModel, root, subfolder))


def _network_class(root: str, component: str | None) -> tuple[Any, str | None]:
    """(class, subfolder) of a folder's network."""
    subfolder = component if component and read_config(UNet2DModel, root, component, required=False) else None
    class_name = read_config(UNet2DModel, root, subfolder)["_class_name"]
    if class_name not in (*FAMILIES, *LEGACY):
        raise ValueError(
            f"{root} holds a {class_name}: known families are {', '.join(FAMILIES)}; record any other pipeline with "
            "data.record_trajectories"
        )
    return getattr(diffusers, class_name), subfolder


def read_config(kind: Any, root: str, subfolder: str | None, required: bool = True) -> dict[str, Any] | None:
    """A component's config, from its subfolder or, as in the oldest repositories, from the root."""
    for location in ({"subfolder": subfolder}, {}) if subfolder else ({},):
        if not required and not location:
            break
        try:
            return kind.load_config(root, **location)
        except (OSError, ValueError):
            continue
    if required:
        raise ValueError(f"{root} has no {kind.config_name} (looked in {subfolder or 'the folder'} too): download it")
    return None


def text_pipeline(root: str, keep: Sequence[str] = (), **weights: Any) -> Any:
    """The pipeline with tokenizers and text encoders alone, and the components named in `keep`."""
    index = DiffusionPipeline.load_config(root)
    kept = ("tokenizer", "text_encoder", "scheduler", *keep)
    left_out = {name: None for name, value in index.items() if isinstance(value, list) and not name.startswith(kept)}
    return DiffusionPipeline.from_pretrained(root, **left_out, **weights)
