"""diffusers networks as denoisers: one small class per model family, told apart by the network's class."""

from typing import Any

import torch
from torch import Tensor, nn

from denoisers.diffusers_base import NETWORKS, DiffusersDenoiser, check_components
from denoisers.prompt_transformer import PromptTransformer
from denoisers.prompt_unet import PromptUNet


class PixelUNet(DiffusersDenoiser):
    """`UNet2DModel`, unconditional or with class labels; it has no null class."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None when unconditional."""
        return self.network.config.num_class_embeds

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        return self.network(x, timestep, class_labels=condition, return_dict=False)[0]


class ClassTransformer(DiffusersDenoiser):
    """`DiTTransformer2DModel`: class labels, the null class after the last."""

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class."""
        return self.network.config.num_embeds_ada_norm

    def null_condition(self, condition: Tensor) -> Tensor:
        """The null class for every sample."""
        return torch.full_like(condition, self.num_classes)

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        if condition is None:
            condition = torch.full((len(x),), self.num_classes, device=x.device)
        return self.network(x, timestep=timestep, class_labels=condition, return_dict=False)[0]


class PixArt(PromptTransformer):
    """`PixArtTransformer2DModel`; the 1024 pixel model is also told resolution and aspect ratio."""

    def evaluate(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        hidden, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"]
        added = {key: condition.get(key) for key in ("resolution", "aspect_ratio")}
        arguments = {"encoder_attention_mask": mask, "added_cond_kwargs": added, "return_dict": False}
        return self.network(x, hidden, timestep, **arguments)[0]


class SD3(PromptTransformer):
    """`SD3Transformer2DModel`."""

    @property
    def image_tokens(self) -> int:  # type: ignore[override]
        """Tokens of one image, which dynamic shift depends on."""
        patch = self.network.config.patch_size
        return (self.size.height // patch) * (self.size.width // patch)

    def evaluate(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.network(hidden_states=x, timestep=timestep, **condition, return_dict=False)[0]


class PackedTransformer(PromptTransformer):
    """A transformer whose states are packed, (tokens, 4 * latent channels), as in its pipeline.

    Like the pipeline it rounds timesteps to the network's dtype before it divides by 1000: bf16 is told 612 for 610.17.
    """

    default_size = 128

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(tokens, channels): 2x2 latents make one token."""
        return (self.image_tokens, self.network.config.in_channels)

    @property
    def image_tokens(self) -> int:  # type: ignore[override]
        """Tokens of one image, which dynamic shift depends on."""
        return (self.size.height // 2) * (self.size.width // 2)

    def latents(self, states: Tensor) -> Tensor:
        """Packed states, a token holding (channel, row, column) of 2x2 latents, as (batch, channels, height, width)."""
        rows, columns = self.size.height // 2, self.size.width // 2
        grid = states.reshape(len(states), rows, columns, -1, 2, 2)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(states), -1, 2 * rows, 2 * columns)

    def states(self, latents: Tensor) -> Tensor:
        """Inverse of `latents`."""
        rows, columns = self.size.height // 2, self.size.width // 2
        grid = latents.reshape(len(latents), -1, rows, 2, columns, 2)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), rows * columns, -1)


class Flux(PackedTransformer):
    """`FluxTransformer2DModel`.

    A guidance-distilled network is told the scale: `guidance_scale` then costs one evaluation and needs no null prompt.
    """

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, gamma: Tensor | None = None) -> Tensor:
        """The network's output at a state, (batch, *sample_shape); gamma (batch,) is for students."""
        condition, scale = self.scale_of(condition)
        self._check_condition(condition)
        if self.is_told_guidance:
            guidance = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
            condition = condition | {"guidance": guidance.expand(len(x))}
        return super().forward(x, timestep, condition, gamma)

    def evaluate(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        text = condition["encoder_hidden_states"]
        return self.network(
            hidden_states=x,
            timestep=timestep.to(x.dtype) / 1000,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=self._image_positions(x),
            **condition,
            return_dict=False,
        )[0]

    def _image_positions(self, x: Tensor) -> Tensor:
        """(tokens, 3): zero, row, column."""
        rows, columns = (torch.arange(side // 2, device=x.device) for side in (self.size.height, self.size.width))
        grid = torch.cartesian_prod(rows, columns)
        return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1).to(x.dtype)


class QwenImage(PackedTransformer):
    """`QwenImageTransformer2DModel`; its pipeline keeps each token's norm under guidance."""

    @property
    def output_channels(self) -> int:
        """Those of a token."""
        return self.network.config.patch_size**2 * self.network.config.out_channels

    def evaluate(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        shape = (1, self.size.height // 2, self.size.width // 2)
        arguments = {"img_shapes": [[shape]] * len(x), **condition, "return_dict": False}
        return self.network(hidden_states=x, timestep=timestep.to(x.dtype) / 1000, **arguments)[0]

    def rescale_guided(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Guided outputs at the norm that each token's conditional one has."""
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def latents(self, states: Tensor) -> Tensor:
        """As videos of one frame, which its autoencoder takes."""
        return super().latents(states).unsqueeze(2)

    def states(self, latents: Tensor) -> Tensor:
        """Inverse of `latents`."""
        return super().states(latents.squeeze(2))

    def _decode(self, autoencoder: nn.Module, states: Tensor) -> Tensor:
        return super()._decode(autoencoder, states)[:, :, 0]


class Wan(PromptTransformer):
    """`WanTransformer3DModel`: videos, (channels, frames, height, width)."""

    default_size, default_frames = (60, 104), 81

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one state."""
        return (self.network.config.in_channels, self.frames, self.size.height, self.size.width)

    def evaluate(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.network(hidden_states=x, timestep=timestep, **condition, return_dict=False)[0]


FAMILIES: dict[str, type[DiffusersDenoiser]] = {
    "UNet2DModel": PixelUNet,
    "UNet2DConditionModel": PromptUNet,
    "DiTTransformer2DModel": ClassTransformer,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "QwenImageTransformer2DModel": QwenImage,
    "WanTransformer3DModel": Wan,
}


def from_network(network: nn.Module, scheduler: Any, **options: Any) -> DiffusersDenoiser:
    """The denoiser of a diffusers network; `options` are those of DiffusersDenoiser.

    Raises:
        ValueError: a network of an unknown family.
    """
    name = type(getattr(network, "_orig_mod", network)).__name__  # of a compiled network what was compiled
    family = FAMILIES.get(name)
    if family is None:
        raise ValueError(
            f"{name} is of no known family ({', '.join(FAMILIES)}): record its pipeline with "
            "data.record_trajectories, or wrap the network as docs/your_own_model.md shows"
        )
    return family(network, scheduler, **options)


def from_pipeline(
    pipe: Any, height: int | None = None, width: int | None = None, num_frames: int | None = None
) -> DiffusersDenoiser:
    """The denoiser inside a pipeline in memory, for images of `height` x `width` pixels; see DiffusersDenoiser.

    The pipeline's network is shared, put into evaluation mode and frozen, as pipelines use it.

    Raises:
        ValueError: a network of an unknown family, or a pipeline with further networks.
    """
    check_components(type(pipe).__name__, [name for name, part in pipe.components.items() if part is not None])
    components = (getattr(pipe, name, None) for name in NETWORKS)
    network = next((component for component in components if component is not None), None)
    options = {"height": height, "width": width, "num_frames": num_frames, **vae_scales(getattr(pipe, "vae", None))}
    return from_network(network, pipe.scheduler, **options, name=type(pipe).__name__).eval().requires_grad_(False)


def vae_scales(vae: Any) -> dict[str, int]:
    """Pixels per latent of an autoencoder or its config, along one side, and frames; 1 without one."""
    config = getattr(vae, "config", vae)
    if config is None:
        return {"vae_scale": 1}
    if "temperal_downsample" not in config:
        return {"vae_scale": 2 ** (len(config["block_out_channels"]) - 1)}
    halved = config["temperal_downsample"]  # every side once for each, frames where it is true
    sides = config.get("scale_factor_spatial") or 2 ** len(halved)
    return {"vae_scale": sides, "frame_scale": config.get("scale_factor_temporal") or 2 ** sum(halved)}
