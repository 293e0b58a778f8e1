"""A network as (state, timestep, condition) -> output: protocol, guidance, DiT, diffusers adapters."""

from denoisers.evaluations import Counted, Evaluations
from denoisers.guidance import GuidedDenoiser, with_guidance, with_precision, with_scale
from denoisers.labels import check_labels, class_labels
from denoisers.load import load_denoiser
from denoisers.protocol import Denoiser
from solvers.conditions import concatenate_conditions, condition_length, condition_to, index_condition, map_condition

__all__ = [
    "Counted",
    "Denoiser",
    "Evaluations",
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
    "with_scale",
]
