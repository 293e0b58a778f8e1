"""Classifier-free guidance, as a denoiser around another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.evaluations import calls_per_row
from denoisers.protocol import DenoiserWrapper
from solvers.calls import call_branches
from solvers.identity import Guidance, guidance_range, own_guidance
from solvers.table import SolverTable


class GuidedDenoiser(DenoiserWrapper):
    """Classifier-free guidance: uncond + guidance_scale (cond - uncond), both from one call of twice the batch.

    Guidance acts on the prediction alone: a learned variance is dropped first, in all channels (the public DiT sampling
    code guides three of four latent channels; the diffusers pipeline, and this class, all of them).

    Args:
        denoiser: the network, with `null_condition(condition)`.
        guidance_scale: 1 is the conditional output alone; use `with_guidance`, which then costs one evaluation. A range
            [lowest, highest] makes the scale a part of the condition, see `with_scale`.
    Raises:
        ValueError: a denoiser without a null condition, or a scale that is no finite number or range of them.
    Source: arXiv 2207.12598, with guidance_scale = 1 + w of eq. 6.
    """

    calls_per_evaluation = 2

    def __init__(self, denoiser: nn.Module, guidance_scale: Guidance) -> None:
        super().__init__(denoiser)
        low, high = guidance_range(guidance_scale)
        if not callable(getattr(denoiser, "null_condition", None)):
            name = getattr(denoiser, "name", None) or type(denoiser).__name__
            raise ValueError(
                f"{name} has no null condition, so guidance_scale {guidance_scale} cannot be applied: "
                "use guidance_scale 1, or give the denoiser a method null_condition(condition)"
            )
        self.guidance_scale: Guidance = (low, high) if isinstance(guidance_scale, Sequence) else low

    @property
    def unguided(self) -> nn.Module:
        """The network itself."""
        return self.denoiser

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The guided output, (batch, *sample_shape); `condition` must be given."""
        if condition is None:
            raise ValueError("guidance needs a condition: pass labels or prompt embeddings, or use guidance_scale 1")
        scale: Any = self.guidance_scale
        if isinstance(scale, tuple):
            condition, scale = condition["condition"], condition["guidance_scale"].to(x)
            scale = scale.reshape(-1, *[1] * (x.ndim - 1))
        both = [condition, self.denoiser.null_condition(condition)]
        conditional, unconditional = call_branches(self.denoiser, x, timestep, both, **options)
        guided = torch.lerp(unconditional, conditional, scale)
        rescale = getattr(self.denoiser, "rescale_guided", None)
        return rescale(guided, conditional) if rescale else guided


def with_guidance(denoiser: nn.Module, guidance_scale: Guidance = 1.0) -> nn.Module:
    """`denoiser` itself at the scale it has, which is 1 unless it is guided; else a GuidedDenoiser.

    A guidance-distilled network (`is_told_guidance`) is told the scale instead, in a denoiser of its own: one
    evaluation at any, or for a range at that of each sample.

    Raises:
        ValueError: a denoiser that is guided already, with another scale.
    """
    if getattr(denoiser, "is_told_guidance", False):
        return denoiser.told(guidance_scale)
    own = own_guidance(denoiser)
    if guidance_range(own) == guidance_range(guidance_scale):
        return denoiser
    if own != 1:
        raise ValueError(f"the denoiser has guidance_scale {own}, asked for is {guidance_scale}: give the same")
    return GuidedDenoiser(denoiser, guidance_scale)


def split_guidance(table: SolverTable, denoiser: nn.Module) -> SolverTable:
    """The table with guidance as weights, where the denoiser has one scale inside and is linear in the branches."""
    scale = own_guidance(denoiser)
    inside = calls_per_row(denoiser) > 1 and not isinstance(scale, Sequence)
    is_linear = not (getattr(denoiser, "needs_node", False) or hasattr(denoiser, "rescale_guided"))
    if not inside or table.has_branches or not is_linear:
        return table
    return table.guided(float(scale))


def with_scale(denoiser: nn.Module, condition: Any, guidance_scale: Tensor | None) -> Any:
    """A condition as the denoiser takes it: where its scale is a range, with the (batch,) scales of the samples."""
    if not isinstance(own_guidance(denoiser), tuple):
        return condition
    return {"condition": condition, "guidance_scale": guidance_scale}
