"""Students of SLAM: networks that are also told where on a line between two teacher points their state lies."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from denoisers.protocol import Denoiser


@runtime_checkable
class Student(Denoiser, Protocol):
    """A trainable denoiser that also takes gamma.

    A denoiser offers students by a method `with_gamma()`, which returns one: float32 copies of its weights, all
    trainable, in training mode, and an embedding of gamma that starts at zero, so that the student starts with the
    denoiser's outputs at every gamma. gamma = 1 is "as the teacher": leaving gamma out means 1, so a student is an
    ordinary denoiser wherever it is sampled. Weights of the same names are the same: with LoRA the denoiser's own stand
    in for the copies.

    | attribute | meaning |
    |---|---|
    | `gamma_embedding` | the added module, a part of the student; trained in full also where the rest has LoRA |
    | `blocks` | modules that FSDP shards one by one, none shared; the rest is one more shard |
    | `gradient_checkpointing` | settable; recompute blocks in the backward pass |
    """

    gamma_embedding: nn.Module
    blocks: nn.ModuleList | list[nn.Module]
    gradient_checkpointing: bool

    def __call__(self, x: Tensor, timestep: Tensor, condition: Any = None, gamma: Tensor | None = None) -> Tensor:
        """The output at a state.

        Args:
            x, timestep, condition: see `Denoiser`.
            gamma: (batch,) float in [0, 1]; None: 1 for every sample.
        Returns:
            (batch, *sample_shape), of the schedule's prediction type.
        """
        ...

    def save(self, folder: str | Path, training: dict[str, Any], weights: Mapping[str, Tensor]) -> tuple[Path, str]:
        """Write a folder that `load_denoiser` loads as a denoiser, each file whole or not at all.

        Args:
            folder: created if missing; its student is replaced.
            training: JSON types that say how it was trained, kept as they are where the format has a place.
            weights: what to save, by the names and with the shapes of the student's `state_dict()`, on the CPU. (Not
                the student's own values: those may be sharded, hold LoRA, or be averaged.)
        Returns:
            The weights file directly inside `folder`, and the `weight_hash` that the loaded denoiser will have.
        """
        ...


def with_gamma(denoiser: nn.Module) -> Any:
    """A `Student` with the denoiser's weights; guidance and precision wrappers around the network are left behind.

    Raises:
        ValueError: a denoiser that offers no student.
    """
    make = getattr(denoiser, "with_gamma", None)
    if not callable(make):
        name = getattr(denoiser, "name", None) or type(denoiser).__name__
        raise ValueError(
            f"{name} cannot be distilled, because its network takes no gamma: use a DiT or SiT checkpoint, a diffusers "
            "model with prompts (denoisers/diffusers_models.py), or give the denoiser a method with_gamma (see "
            "denoisers/gamma.py)"
        )
    return make()


class GammaEmbedder(nn.Module):
    """Sines of 1 - gamma, then an MLP without biases: zero at gamma = 1, whatever the weights."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        first = nn.Linear(num_frequencies, hidden_size, bias=False)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size, bias=False))

    def forward(self, gamma: Tensor) -> Tensor:
        """Gammas (batch,) in [0, 1] -> (batch, hidden)."""
        sines = sinusoids(100 * (1 - gamma), self.num_frequencies)[:, self.num_frequencies :]
        return self.mlp(sines.to(self.mlp[0].weight.dtype))


def sinusoids(timestep: Tensor, num_frequencies: int, max_period: float = 10000.0) -> Tensor:
    """(cos, sin) of timestep * max_period^(-i / num_frequencies): (batch,) -> (batch, 2 * num_frequencies).

    Computed in float32 (float64 for float64 timesteps) whatever the autocast: at timestep 999 bf16 has steps of 4.
    """
    timestep = timestep if timestep.dtype == torch.float64 else timestep.float()
    exponent = torch.arange(num_frequencies, device=timestep.device, dtype=timestep.dtype) / num_frequencies
    angle = timestep[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
