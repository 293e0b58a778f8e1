"""The encoders of a Stable Diffusion folder: pictures and prompts as its latent network takes them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn

from denoisers.decoding import to_latents
from denoisers.diffusers_base import Size, Source
from denoisers.diffusers_load import locate, read_config, text_pipeline
from denoisers.diffusers_models import vae_scales
from denoisers.load import describe
from denoisers.prompts import encode_prompts
from solvers.conditions import map_condition
from solvers.identity import weight_hash

KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


class Encoders(nn.Module):
    """Frozen float32 encoders of a pipeline; run them under autocast for speed.

    Args:
        pipe: the pipeline, with autoencoder and text encoders; its network may be absent.
        size: of latents and pictures.
        name: what manifests record.
        options: of the pipeline's `encode_prompt`, such as clip_skip.
    Raises:
        ValueError: a pipeline of another kind.
    """

    def __init__(self, pipe: Any, size: Size, name: str | None = None, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        if type(pipe).__name__ not in KINDS:
            raise ValueError(f"{type(pipe).__name__} cannot be encoded for: use a folder of {' or '.join(KINDS)}")
        self.size, self.name, self.options = size, name, options or {}
        self.__dict__["pipe"] = pipe
        parts = pipe.components.items()
        self.parts: Any = nn.ModuleDict({name: part for name, part in parts if isinstance(part, nn.Module)})
        self.eval().requires_grad_(False)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one picture's latents."""
        return (self.parts["vae"].config.latent_channels, self.size.height, self.size.width)

    @property
    def hashes(self) -> dict[str, str]:
        """See `encoder_hashes`."""
        return {name: weight_hash(part) for name, part in self.parts.items()}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1], (batch, 3, height, width), to latents (batch, *sample_shape).

        The mean of the autoencoder's distribution, shifted and scaled as its network takes it.
        """
        autoencoder = self.parts["vae"]
        return to_latents(autoencoder.encode(images).latent_dist.mode(), autoencoder.config)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The condition of prompts, in the names of the network's arguments, without the null prompt."""
        condition = self._encode(prompts)
        return {key: value for key, value in condition.items() if key != "null"}

    def null_condition(self) -> dict[str, Tensor]:
        """The condition of the empty prompt, (1, ...); of XL as its pipeline has it."""
        return map_condition(lambda value: value.cpu(), self._encode([""])["null"])

    def _encode(self, prompts: list[str]) -> dict[str, Any]:
        stand_in: Any = self  # of its denoiser only the size is asked for
        return encode_prompts(self.pipe, prompts, denoiser=stand_in, batch_size=len(prompts), **self.options)


def load_encoders(path: str | Path) -> Encoders:
    """The encoders of a model, by the path that `load_denoiser` takes for its network.

    Raises:
        ValueError: no Stable Diffusion folder there.
    """
    described = describe(path)
    root, component = locate(described["path"])
    config: Any = read_config(UNet2DModel, root, component)
    pipe = _pipeline(root, described.get("variant"))
    scale, own = vae_scales(getattr(pipe, "vae", None))["vae_scale"], config["sample_size"]
    height, width = own if isinstance(own, (list, tuple)) else (own, own)
    size = Size(_latents(described, "height", scale, height), _latents(described, "width", scale, width), scale)
    return Encoders(pipe, size, Path(root).name, described.get("encode"))


def encoder_hashes(source: Source) -> dict[str, str]:
    """Weight hash of each encoder of the folder that a denoiser was loaded from, by its name there.

    Taken of float32 values, so it does not depend on the dtype they are used in, but on the variant of the files.
    Empty where that folder has no autoencoder.
    """
    if read_config(AutoencoderKL, source.root, "vae", required=False) is None:
        return {}
    parts = _pipeline(source.root, source.variant).components.items()
    return {name: weight_hash(part) for name, part in parts if isinstance(part, nn.Module)}


def _pipeline(root: str, variant: str | None) -> Any:
    try:
        return text_pipeline(root, ("vae",), variant=variant, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the encoders of {root} cannot be loaded ({reason}): download the whole folder") from error


def _latents(described: dict[str, Any], key: str, scale: int, default: int) -> int:
    return default if described.get(key) is None else described[key] // scale
