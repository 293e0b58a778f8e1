"""What all diffusers networks have in common as denoisers: schedule, size, dtype, decoding."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.decoding import decode
from solvers.calls import drop_learned_variance
from solvers.conditions import map_condition
from solvers.identity import Guidance, guidance_range, weight_hash
from solvers.schedule import NoiseSchedule

NETWORKS = ("transformer", "unet")  # components of pipelines
BESIDE = (  # beginnings of the names of components without which outputs are the same
    *("vae", "vqvae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor", "image_processor"),
    *("safety_checker", "scheduler"),
)


def read_schedule(scheduler: Any, image_tokens: int | None = None, mu: float | None = None) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler; dynamic shift is resolved for one number of image tokens.

        shift = exp(mu) (exponential) or mu (linear),  mu on the line through (base_image_seq_len, base_shift) and
        (max_image_seq_len, max_shift) at `image_tokens`

    Args:
        scheduler: a scheduler or its config.
        image_tokens: what pipelines call image_seq_len.
        mu: where it is known instead of the number of tokens.
    Raises:
        ValueError: a beta schedule NoiseSchedule does not know.
    """
    config = dict(getattr(scheduler, "config", scheduler))
    schedule = NoiseSchedule.from_scheduler(scheduler)
    if not config.get("use_dynamic_shifting") or (image_tokens is None and mu is None):
        return schedule
    mu = _shift_exponent(config, image_tokens) if mu is None else mu
    shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return replace(schedule, parameters=schedule.parameters | {"shift": shift})


def _shift_exponent(config: dict[str, Any], image_tokens: int) -> float:
    """mu, rounded as the pipelines round it, so that fingerprints agree."""
    tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (shifts[1] - shifts[0]) / (tokens[1] - tokens[0])
    return image_tokens * slope + (shifts[0] - slope * tokens[0])


def check_components(name: str, components: Iterable[str]) -> None:
    """Refuse a pipeline in which more than one network makes outputs, such as a control network.

    Args:
        name: what it is called.
        components: names of all that it has.
    Raises:
        ValueError: a network beside the transformer or U-Net; it is named.
    """
    if more := [part for part in components if part not in NETWORKS and not part.startswith(BESIDE)]:
        raise ValueError(
            f"{name} has a {more[0]}, without which its outputs are others: use the whole pipeline, by "
            "`family: pipeline` in a denoiser.yaml, or data.record_trajectories"
        )


@dataclass(frozen=True)
class Size:
    """Height and width of a state (latents, or pixels where there is no autoencoder), and pixels per latent side."""

    height: int
    width: int
    vae_scale: int

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.height * self.vae_scale, self.width * self.vae_scale


@dataclass(frozen=True)
class Source:
    """Where a denoiser was loaded from.

    Args:
        root: the pipeline's folder or hub name.
        variant: of its weight files.
        options: the other arguments of `load_diffusers`, JSON types.
    """

    root: str
    variant: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class DiffusersDenoiser(nn.Module):
    """A diffusers network as `denoiser(x, timestep, condition)`.

    Timesteps reach the network as float tensors, so fractional ones count (as Python numbers some networks truncate
    them); a learned variance is dropped; states are cast to the network's dtype and outputs back to the state's.

    Args:
        network: the diffusers model.
        scheduler: its scheduler, or the scheduler's config; see `read_schedule`.
        height: of the image in pixels; None takes the network's own sample size.
        width: likewise.
        vae_scale: pixels per latent along one side; 1 where there is no autoencoder.
        name: what artifacts record.
        num_frames: of a video; None takes the pipeline's own number.
        frame_scale: frames per latent after the first.
    Raises:
        ValueError: frames of a network of pictures, a network whose input is not the state alone, one without a sample
            size where none is given, or an unknown beta schedule.
    """

    network: Any
    upcasts_decoder = False  # whether its pipeline does
    guidance_scale: Guidance = 1.0  # that a distilled network is told
    default_size: int | tuple[int, int] | None = None
    default_frames: int | None = None  # of a network of videos
    image_tokens: int | None = None
    source: "Source | None" = None

    def __init__(
        self,
        network: nn.Module,
        scheduler: Any,
        height: int | None = None,
        width: int | None = None,
        vae_scale: int = 8,
        name: str | None = None,
        num_frames: int | None = None,
        frame_scale: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.name = network, name
        config = dict(getattr(scheduler, "config", scheduler))
        self.scheduler_config = {"_class_name": type(scheduler).__name__} | config
        own = self._own_size() if height is None or width is None else (0, 0)
        sides = (own[0] if height is None else height // vae_scale, own[1] if width is None else width // vae_scale)
        self.size = Size(*sides, vae_scale)
        if num_frames is not None and self.default_frames is None:
            raise ValueError(f"{type(network).__name__} makes pictures: leave num_frames {num_frames} out")
        self.frames = 1 + ((num_frames or self.default_frames or 1) - 1) // frame_scale
        self._check_channels()
        self.schedule = read_schedule(scheduler, self.image_tokens)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one state."""
        return (self.network.config.in_channels, self.size.height, self.size.width)

    @property
    def output_channels(self) -> int | None:
        """Channels of the network's output; None for those of its input."""
        return getattr(self.network.config, "out_channels", None)

    @property
    def is_told_guidance(self) -> bool:
        """Whether the network is distilled from a guided one, and told the scale."""
        config = self.network.config
        return bool(config.get("guidance_embeds") or config.get("time_cond_proj_dim"))

    def told(self, guidance_scale: Guidance) -> Any:
        """The same network, told a guidance scale, or each sample's of a range; this denoiser stays as it is."""
        other, (low, high) = copy.copy(self), guidance_range(guidance_scale)
        other.guidance_scale = (low, high) if isinstance(guidance_scale, Sequence) else low
        return other

    @property
    def weight_hash(self) -> str:
        """SHA-256 of the network's weights as they are now: adapters come and go."""
        return weight_hash(self.network)

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None) -> Tensor:
        """The network's output at a state, (batch, *sample_shape)."""
        dtype = self.network.dtype
        timestep = timestep.to(torch.promote_types(timestep.dtype, torch.float32)).expand(len(x))
        condition = map_condition(lambda value: value.to(dtype) if value.is_floating_point() else value, condition)
        return drop_learned_variance(self.evaluate(x.to(dtype), timestep, condition), x).to(x.dtype)

    def set_decoder(self, autoencoder: nn.Module) -> None:
        """Give the denoiser `decode(states) -> images`; the autoencoder is no part of its weights."""
        self.__dict__["decode"] = partial(self._decode, autoencoder.eval().requires_grad_(False))

    def _decode(self, autoencoder: nn.Module, states: Tensor) -> Tensor:
        """(batch, *sample_shape) -> (batch, 3, height, width) in [-1, 1]."""
        return decode(autoencoder, self.latents(states), self.upcasts_decoder)

    def latents(self, states: Tensor) -> Tensor:
        """States as (batch, channels, height, width)."""
        return states

    def states(self, latents: Tensor) -> Tensor:
        """Inverse of `latents`."""
        return latents

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        """The family's own call: x (batch, *sample_shape) in the network's dtype, timestep (batch,) float."""
        raise NotImplementedError

    def _own_size(self) -> tuple[int, int]:
        size: Any = getattr(self.network.config, "sample_size", None) or self.default_size
        if size is None:
            raise ValueError(f"{type(self.network).__name__} has no sample_size in its config: give height and width")
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def _check_channels(self) -> None:
        states = self.network.config.in_channels
        outputs = self.output_channels or states
        if outputs not in (states, 2 * states):
            raise ValueError(
                f"the network has {states} input and {outputs} output channels: it takes more than the state "
                "(inpainting, editing); record its pipeline with data.record_trajectories instead"
            )


class PromptDenoiser(DiffusersDenoiser):
    """A network conditioned on prompt embeddings: a dict of its own argument names, and those of the null prompt.

    The condition is made by `encode_prompts`: {"encoder_hidden_states": (batch, tokens, width), ..., "null": {...}};
    `conditions`, when set, are those of a list of prompts, from which seeds choose (see `class_labels`).
    """

    conditions: Any = None

    def null_condition(self, condition: dict[str, Any]) -> dict[str, Any]:
        """The embeddings of the null prompt.

        Raises:
            ValueError: a condition that was encoded without them.
        """
        self._check_condition(condition)
        if "null" not in condition:
            raise ValueError("the condition has no null prompt, which guidance needs: encode with a negative prompt")
        return condition["null"] | {"null": condition["null"]}

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None) -> Tensor:
        """The network's output at a state, (batch, *sample_shape)."""
        self._check_condition(condition)
        return super().forward(x, timestep, {key: value for key, value in condition.items() if key != "null"})

    def scale_of(self, condition: Any) -> tuple[Any, Any]:
        """The prompts of a condition, and the scale that the network is told; in a range each sample has its own."""
        if isinstance(self.guidance_scale, tuple):
            return condition["condition"], condition["guidance_scale"]
        return condition, self.guidance_scale

    def _check_condition(self, condition: Any) -> None:
        if not isinstance(condition, dict):
            raise ValueError(
                f"{type(self.network).__name__} needs prompt embeddings, found {type(condition).__name__}: "
                "pass encode_prompts(pipe, prompts), or load the model with prompts=[...]"
            )
