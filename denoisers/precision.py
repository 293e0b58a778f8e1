"""Reduced precision: a denoiser under autocast, and whether a device has units for it."""

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.generate import device_of
from denoisers.protocol import DenoiserWrapper

PRECISIONS = ("float32", "bf16")


class AutocastDenoiser(DenoiserWrapper):
    """Runs the network under bf16 autocast; outputs have the dtype of the state, at least float32."""

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The output, (batch, *sample_shape)."""
        with torch.autocast(x.device.type, torch.bfloat16):
            output = self.denoiser(x.float(), timestep, condition, **options)
        return output.to(torch.promote_types(x.dtype, torch.float32))


def with_precision(denoiser: nn.Module, precision: str = "float32") -> nn.Module:
    """`denoiser` itself in float32; with `bf16` under autocast, and a warning where its device has no units for that.

    Raises:
        ValueError: any other precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return denoiser
    warn_of_emulated_bf16(device_of(denoiser))
    return AutocastDenoiser(denoiser)


@lru_cache
def has_bf16_units(device: str | torch.device) -> bool:
    """Whether a device computes in bf16 itself.

    Args:
        device: a CPU is asked for its instructions (AMX, AVX512 or Arm, with BF16), CUDA for its compute capability;
            other kinds are taken to have them.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return any("bf16" in name and value is True for name, value in torch.cpu.get_capabilities().items())
    return True


def warn_of_emulated_bf16(device: str | torch.device) -> None:
    """Say so where bf16 is emulated; measured on a CPU with AVX512 alone."""
    if not has_bf16_units(device):
        warnings.warn(  # the same text at the same place: Python shows it once
            f"this {torch.device(device).type} has no units for bf16 and emulates it: float32 is two to three times as "
            "fast here",
            stacklevel=3,
        )
