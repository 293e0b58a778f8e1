"""The numbers that define a noise schedule: which there are, their ranges, and the betas they stand for."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_MOST_TIMESTEPS, _LARGEST = 1_000_000, 1e12
_COMMON = {"rescale_betas_zero_snr", "snr_shift_scale"}
_REQUIRED = {
    "continuous_vp": {"beta_min", "beta_max", "timestep_scale"},
    "flow": {"shift", "timestep_scale"},
    "edm": {"sigma_min", "sigma_max", "sigma_data", "rho"},
    "trained_betas": {"trained_betas"},
    "linear": {"beta_schedule", "num_train_timesteps", "beta_start", "beta_end"},
    "scaled_linear": {"beta_schedule", "num_train_timesteps", "beta_start", "beta_end"},
    "squaredcos_cap_v2": {"beta_schedule", "num_train_timesteps"},
}
_OPTIONAL = {"flow": {"shift_terminal", "step_shifts"}, "continuous_vp": set(), "edm": set()}


def check_parameters(kind: str, parameters: Mapping[str, Any]) -> None:
    """Make sure that the parameters of a `NoiseSchedule` are those of its kind, each of its type and range.

    Raises:
        ValueError: names the first that is missing, unknown or out of range.
    """
    form = kind if kind != "discrete_vp" else _discrete_form(parameters)
    missing = sorted(_REQUIRED[form] - parameters.keys())
    unknown = sorted(parameters.keys() - _REQUIRED[form] - _OPTIONAL.get(form, _COMMON))
    if missing or unknown:
        raise ValueError(
            f"a {form} schedule has the parameters {', '.join(sorted(_REQUIRED[form]))}: "
            f"missing {', '.join(missing) or 'none'}, unknown {', '.join(unknown) or 'none'}"
        )
    for name, value in parameters.items():
        _check_value(name, value)


def training_betas(parameters: Mapping[str, Any]) -> Tensor:
    """Betas of a discrete schedule, float64, (num_train_timesteps,); a scaled signal-to-noise ratio is in them.

        bar -> bar / (s + (1 - s) bar),  s = snr_shift_scale, bar the cumulative product of 1 - beta (CogVideoX)

    Raises:
        ValueError: fewer than two, or one outside (0, 1].
    """
    betas = _plain_betas(parameters)
    if len(betas) < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError("betas must be at least two numbers in (0, 1]")
    scale = parameters.get("snr_shift_scale", 1.0)
    if scale == 1:
        return betas
    bar = (1 - betas).cumprod(0)
    bar = bar / (scale + (1 - scale) * bar)
    return 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])


def stretched(sigma: Tensor, terminal: float | None) -> Tensor:
    """Noise levels, from 1 down, stretched so that the last is `terminal`, as diffusers does; None leaves them."""
    if terminal is None or len(sigma) == 1:
        return sigma
    return 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[-1])


def _discrete_form(parameters: Mapping[str, Any]) -> str:
    if "trained_betas" in parameters:
        return "trained_betas"
    if parameters.get("beta_schedule") not in BETA_SCHEDULES:
        raise ValueError(
            f"beta schedule {parameters.get('beta_schedule')!r} is unknown: known are {', '.join(BETA_SCHEDULES)}; "
            "give NoiseSchedule.from_betas the betas of any other"
        )
    return parameters["beta_schedule"]


def _check_value(name: str, value: Any) -> None:
    if name == "beta_schedule":
        return
    if name == "rescale_betas_zero_snr":
        fits, allowed = isinstance(value, bool), "true or false"
    elif name in ("trained_betas", "step_shifts"):
        fits, allowed = isinstance(value, list) and all(map(_is_number, value)), "a list of numbers"
    elif name == "num_train_timesteps":
        fits, allowed = type(value) is int and 2 <= value <= _MOST_TIMESTEPS, f"from 2 to {_MOST_TIMESTEPS}"
    elif name == "shift_terminal":
        fits, allowed = _is_number(value) and 0 < value < 1, "between 0 and 1"
    else:
        fits, allowed = _is_number(value) and value > 0, f"a positive number up to {_LARGEST:g}"
    if not fits:
        raise ValueError(f"{name} is {str(value)[:60]}: it must be {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _plain_betas(parameters: Mapping[str, Any]) -> Tensor:
    if "trained_betas" in parameters:
        return torch.tensor(parameters["trained_betas"], dtype=torch.float64)
    steps = parameters["num_train_timesteps"]
    if parameters["beta_schedule"] == "squaredcos_cap_v2":
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)], dtype=torch.float64)
    start, end = parameters["beta_start"], parameters["beta_end"]
    if parameters["beta_schedule"] == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
