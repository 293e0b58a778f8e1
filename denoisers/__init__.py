"""A network as (state, timestep, condition) -> output: protocol, guidance, DiT, diffusers adapters."""

from denoisers.conditions import (
    check_labels,
    class_labels,
    concatenate_conditions,
    condition_length,
    condition_to,
    index_condition,
    map_condition,
)
from denoisers.guidance import GuidedDenoiser, with_guidance, with_precision
from denoisers.load import load_denoiser
from denoisers.protocol import Denoiser

__all__ = [
    "Denoiser",
    "GuidedDenoiser",
    "check_labels",
    "class_labels",
    "concatenate_conditions",
    "condition_length",
    "condition_to",
    "index_condition",
    "load_denoiser",
    "map_condition",
    "with_guidance",
    "with_precision",
]
