"""A network as (state, timestep, condition) -> output: protocol, guidance, DiT, diffusers adapters."""

from denoisers.evaluations import Counted, Evaluations, calls_per_row, network_calls, unguided
from denoisers.guidance import GuidedDenoiser, split_guidance, with_guidance, with_scale
from denoisers.labels import check_labels, class_labels
from denoisers.load import load_denoiser
from denoisers.precision import with_precision
from denoisers.protocol import Denoiser
from solvers.conditions import concatenate_conditions, condition_length, condition_to, index_condition, map_condition

__all__ = [
    "Counted",
    "Denoiser",
    "Evaluations",
    "GuidedDenoiser",
    "calls_per_row",
    "check_labels",
    "class_labels",
    "concatenate_conditions",
    "condition_length",
    "condition_to",
    "index_condition",
    "load_denoiser",
    "map_condition",
    "network_calls",
    "split_guidance",
    "unguided",
    "with_guidance",
    "with_precision",
    "with_scale",
]
