"""The encoders of a pipeline's folder: pictures and prompts as its network takes them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.decoding import to_latents
from denoisers.diffusers_base import DiffusersDenoiser
from denoisers.diffusers_load import locate, outline, text_pipeline
from denoisers.diffusers_models import from_network, vae_scales
from denoisers.encoder_files import encoder_hashes
from denoisers.load import describe
from denoisers.prompts import RETURNED, encode_prompts, takes_prompts
from solvers.conditions import map_condition


class Encoders(nn.Module):
    """Frozen encoders of a pipeline; run them under autocast for speed.

    Args:
        pipe: the pipeline, with autoencoder and text encoders; its network may be absent.
        denoiser: of its network, whose weights are not needed: it says what states look like.
        negative_prompt: the prompt guidance moves away from; None: the pipeline's own, else the empty one.
        options: of the pipeline's `encode_prompt`, such as clip_skip.
        hashes: see `encoder_hashes`.
    Raises:
        ValueError: prompts that cannot be encoded, no autoencoder, or a network of more than one frame.
    """

    def __init__(
        self,
        pipe: Any,
        denoiser: DiffusersDenoiser,
        negative_prompt: str | None = None,
        options: dict[str, Any] | None = None,
        hashes: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if not takes_prompts(pipe) or pipe.vae is None:
            raise ValueError(
                f"{type(pipe).__name__} cannot be encoded for: use a folder of {', '.join(RETURNED)}, with its vae"
            )
        if denoiser.frames != 1:
            raise ValueError(
                f"pictures are videos of one frame, the model's have {denoiser.frames} latent ones: write "
                "num_frames: 1 in its denoiser.yaml, or record videos of its own with data.record_trajectories"
            )
        self.negative_prompt, self.options, self.hashes = negative_prompt, options or {}, hashes or {}
        self.__dict__ |= {"pipe": pipe, "denoiser": denoiser}
        parts = pipe.components.items()
        self.parts: Any = nn.ModuleDict({name: part for name, part in parts if isinstance(part, nn.Module)})
        self.eval().requires_grad_(False)

    @property
    def name(self) -> str | None:
        """What manifests record."""
        return self.denoiser.name

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one picture's latents."""
        return self.denoiser.sample_shape

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.denoiser.size.pixels

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1], (batch, 3, height, width), to latents (batch, *sample_shape).

        The mean of the autoencoder's distribution, shifted, scaled and packed as its network takes it. An autoencoder
        of videos gets a picture as a video of one frame.
        """
        autoencoder = self.parts["vae"]
        encoded = autoencoder.encode(images[:, :, None] if is_of_videos(autoencoder) else images)
        return self.denoiser.states(to_latents(encoded.latent_dist.mode(), autoencoder.config))

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The condition of prompts, in the names of the network's arguments, without the null prompt."""
        return self._encode(prompts, with_null=False)

    def null_condition(self) -> dict[str, Tensor]:
        """The condition of the negative prompt, (1, ...)."""
        condition = self._encode([""], negative_prompt=self.negative_prompt)
        if "null" not in condition:
            condition = self._encode([""], negative_prompt="")
        return map_condition(lambda value: value.cpu(), condition["null"])

    def _encode(self, prompts: list[str], **options: Any) -> dict[str, Any]:
        return encode_prompts(
            self.pipe, prompts, denoiser=self.denoiser, batch_size=len(prompts), **options, **self.options
        )


def is_of_videos(autoencoder: nn.Module) -> bool:
    """Whether an autoencoder takes (batch, 3, frames, height, width)."""
    return any(isinstance(part, nn.Conv3d) for part in autoencoder.modules())


def load_encoders(path: str | Path, text_dtype: torch.dtype = torch.float32) -> Encoders:
    """The encoders of a model, by the path that `load_denoiser` takes for its network, which is not loaded.

    Args:
        path: of the model.
        text_dtype: of the weights of text encoders; those of the autoencoder are float32.
    Raises:
        ValueError: no folder of a known pipeline there.
    """
    described = describe(path)
    root, component = locate(described["path"])
    variant = described.get("variant")
    try:
        pipe = text_pipeline(root, ("vae",), variant=variant, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the encoders of {root} cannot be loaded ({reason}): download the whole folder") from error
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to(text_dtype)
    given = {name: described[name] for name in ("height", "width", "num_frames") if name in described}
    given |= {"name": Path(root).name, **vae_scales(pipe.vae)}
    denoiser = from_network(outline(root, component), pipe.scheduler, **given)
    return Encoders(
        pipe, denoiser, described.get("negative_prompt"), described.get("encode"), encoder_hashes(root, variant)
    )
