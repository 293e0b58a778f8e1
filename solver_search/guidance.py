"""Guidance of one scale, or of a range that one table is searched for."""

from typing import Any

import torch
from torch import Tensor, nn

from denoisers import concatenate_conditions, with_guidance
from denoisers.protocol import DenoiserWrapper, drop_learned_variance


class VariableGuidance(DenoiserWrapper):
    """Classifier-free guidance whose scale is part of the condition: {"condition": ..., "guidance_scale": (batch,)}."""

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """uncond + guidance_scale (cond - uncond), from one call of twice the batch."""
        inner, scale = condition["condition"], condition["guidance_scale"].to(x)
        both = concatenate_conditions([inner, self.denoiser.null_condition(inner)])
        doubled = timestep.repeat(2) if timestep.ndim else timestep
        output = drop_learned_variance(self.denoiser(torch.cat([x, x]), doubled, both, **options), x)
        conditional, unconditional = output.chunk(2)
        return torch.lerp(unconditional, conditional, scale.reshape(-1, *[1] * (x.ndim - 1)))


def with_scale(network: nn.Module, condition: Any, scale: Tensor | None) -> Any:
    """A condition as the network takes it: with the (batch,) scales where they vary."""
    if not isinstance(network, VariableGuidance):
        return condition
    return {"condition": condition, "guidance_scale": scale}


def guided(network: nn.Module, guidance_scale: float | list[float]) -> nn.Module:
    """A network with guidance of a scale, or of any scale where a range is given.

    Raises:
        ValueError: a range and a network without a null condition; a network with another scale of its own.
    """
    if isinstance(guidance_scale, list | tuple):
        if not callable(getattr(network, "null_condition", None)):
            raise ValueError("a range of guidance scales needs a denoiser with a null condition: give one number")
        return VariableGuidance(network)
    known = float(getattr(network, "guidance_scale", 1.0))
    if known not in (1.0, guidance_scale):
        raise ValueError(f"the denoiser has guidance_scale {known}, the search {guidance_scale}: give the same")
    return network if known != 1.0 else with_guidance(network, guidance_scale)


def guidance_range(guidance_scale: float | list[float]) -> tuple[float, float]:
    """(lowest, highest)."""
    if isinstance(guidance_scale, list | tuple):
        return float(guidance_scale[0]), float(guidance_scale[1])
    return float(guidance_scale), float(guidance_scale)
