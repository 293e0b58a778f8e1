"""Classifier-free guidance and reduced precision, each as a denoiser around another."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.protocol import DenoiserWrapper, drop_learned_variance
from solvers.conditions import concatenate_conditions

PRECISIONS = ("float32", "bf16")


class GuidedDenoiser(DenoiserWrapper):
    """Classifier-free guidance: uncond + guidance_scale (cond - uncond), both from one call of twice the batch.

    Guidance acts on the prediction alone: a learned variance is dropped first, in all channels (the public DiT sampling
    code guides three of four latent channels; the diffusers pipeline, and this class, all of them).

    Args:
        denoiser: the network, with `null_condition(condition)`.
        guidance_scale: 1 is the conditional output alone; use `with_guidance`, which then costs one evaluation.
    Raises:
        ValueError: a denoiser without a null condition, or a scale that is not finite.
    Source: arXiv 2207.12598, with guidance_scale = 1 + w of eq. 6.
    """

    def __init__(self, denoiser: nn.Module, guidance_scale: float) -> None:
        super().__init__(denoiser)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}: it must be a finite number, 1 for no guidance")
        if not callable(getattr(denoiser, "null_condition", None)):
            name = getattr(denoiser, "name", None) or type(denoiser).__name__
            raise ValueError(
                f"{name} has no null condition, so guidance_scale {guidance_scale} cannot be applied: "
                "use guidance_scale 1, or give the denoiser a method null_condition(condition)"
            )
        self.guidance_scale = float(guidance_scale)

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The guided output, (batch, *sample_shape); `condition` must be given."""
        if condition is None:
            raise ValueError("guidance needs a condition: pass labels or prompt embeddings, or use guidance_scale 1")
        both = concatenate_conditions([condition, self.denoiser.null_condition(condition)])
        doubled = timestep.repeat(2) if timestep.ndim else timestep
        output = drop_learned_variance(self.denoiser(torch.cat([x, x]), doubled, both, **options), x)
        conditional, unconditional = output.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_scale)


class AutocastDenoiser(DenoiserWrapper):
    """Runs the network under bf16 autocast; outputs have the dtype of the state, at least float32."""

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The output, (batch, *sample_shape)."""
        with torch.autocast(x.device.type, torch.bfloat16):
            output = self.denoiser(x.float(), timestep, condition, **options)
        return output.to(torch.promote_types(x.dtype, torch.float32))


def with_guidance(denoiser: nn.Module, guidance_scale: float = 1.0) -> nn.Module:
    """`denoiser` itself at scale 1, which costs one evaluation; else a GuidedDenoiser.

    A guidance-distilled network, which has `set_guidance(scale)`, is told the scale instead: one evaluation at any.
    One that is guided already stays as it is.

    Raises:
        ValueError: a denoiser that is guided already, with another scale.
    """
    set_guidance = getattr(denoiser, "set_guidance", None)
    if set_guidance is not None:
        set_guidance(guidance_scale)
        return denoiser
    known = float(getattr(denoiser, "guidance_scale", 1.0))
    if known not in (1.0, guidance_scale) and guidance_scale != 1:
        raise ValueError(f"the denoiser has guidance_scale {known}, asked for is {guidance_scale}: give the same")
    return denoiser if guidance_scale in (1, known) else GuidedDenoiser(denoiser, guidance_scale)


def with_precision(denoiser: nn.Module, precision: str = "float32") -> nn.Module:
    """`denoiser` itself in float32; with `bf16` under autocast.

    Raises:
        ValueError: any other precision.
    """
    wrappers: dict[str, Callable[[nn.Module], nn.Module]] = {"float32": lambda inner: inner, "bf16": AutocastDenoiser}
    if precision not in wrappers:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    return wrappers[precision](denoiser)
