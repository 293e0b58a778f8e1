"""What a network output means at a node (alpha, sigma), where x = alpha * data + sigma * noise.

Every prediction type is linear in the state x and the output o, so one pair of weights says all:

    data  = weight_x * x + weight_o * o        (data_weights)
    noise = weight_x * x + weight_o * o        (noise_weights)

| type              | output                               | also called                          |
|-------------------|--------------------------------------|--------------------------------------|
| `epsilon`         | noise                                | noise prediction                     |
| `sample`          | data                                 | x0 or data prediction                |
| `v_prediction`    | alpha * noise - sigma * data         | velocity of a VP schedule            |
| `flow_prediction` | noise - data                         | rectified-flow velocity              |
| `edm:D`           | (sigma / D) * data - alpha D * noise | EDM's own output at sigma_data = D   |

`v_prediction` is the last at D = -1, and `edm:-0.5` what EDM schedulers call v_prediction at sigma_data = 0.5.
"""

import math

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
_EDM = "edm:"


def edm_prediction(scale: float) -> str:
    """The prediction type of EDM's network F, at nodes (c_in, s c_in) of `NoiseSchedule.edm`.

        data = c_skip (data + s noise) + c_out F,   c_skip = D^2 / (s^2 + D^2),  c_out = s D / sqrt(s^2 + D^2)

    Args:
        scale: D, the data's standard deviation sigma_data; negative for the output of the opposite sign.
    Returns:
        `edm:D`; `v_prediction`, which is the same, for D = -1.
    """
    return "v_prediction" if scale == -1 else f"{_EDM}{float(scale)!r}"


def velocity_scale(prediction_type: str) -> float | None:
    """D of `edm:D`, -1 for `v_prediction`, None for any other text."""
    if not isinstance(prediction_type, str):  # of a file that says anything
        return None
    if prediction_type == "v_prediction":
        return -1.0
    try:
        scale = float(prediction_type.removeprefix(_EDM)) if prediction_type.startswith(_EDM) else 0.0
    except ValueError:
        return None
    is_one = math.isfinite(scale) and scale != 0 and edm_prediction(scale) == prediction_type
    return scale if is_one else None


def check_prediction_type(prediction_type: str) -> str:
    """Return `prediction_type`, or raise ValueError when it is neither one of PREDICTION_TYPES nor `edm:D`."""
    is_text = isinstance(prediction_type, str)  # not so in a damaged artifact
    if not is_text or (prediction_type not in PREDICTION_TYPES and velocity_scale(prediction_type) is None):
        known = ", ".join(PREDICTION_TYPES)
        raise ValueError(f"unknown prediction type {prediction_type!r}: use one of {known}, or edm:0.5")
    return prediction_type


def data_weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (on the state, on the output) of the predicted data at a node.

    Args:
        prediction_type: one of PREDICTION_TYPES, or `edm:D`.
        alpha: data scale of the node, any shape.
        sigma: noise scale of the node, same shape.
    Returns:
        Two tensors of the shape of `alpha`.
    Raises:
        ValueError: an epsilon output at alpha = 0, which says nothing about the data.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        if bool((alpha == 0).any()):
            raise ValueError("an epsilon output at alpha = 0 does not determine the data: use v_prediction there")
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    scale = velocity_scale(prediction_type)
    if scale is not None:
        power = (alpha * scale) ** 2 + sigma**2
        return alpha * scale**2 / power, sigma * scale / power
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def noise_weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (on the state, on the output) of the predicted noise at a node; see `data_weights`.

    Raises:
        ValueError: a sample output at sigma = 0, which says nothing about the noise.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "sample":
        if bool((sigma == 0).any()):
            raise ValueError("a sample output at sigma = 0 does not determine the noise: stop one node earlier")
        return 1 / sigma, -alpha / sigma
    scale = velocity_scale(prediction_type)
    if scale is not None:
        power = (alpha * scale) ** 2 + sigma**2
        return sigma / power, -alpha * scale / power
    return 1 / (alpha + sigma), alpha / (alpha + sigma)


def output_weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (on the data, on the noise) of the output a perfect network gives at a node."""
    check_prediction_type(prediction_type)
    scale = velocity_scale(prediction_type)
    if scale is not None:
        return sigma / scale, -alpha * scale
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {"epsilon": (zero, one), "sample": (one, zero), "flow_prediction": (-one, one)}[prediction_type]


def to_data(prediction_type: str, state: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Predicted data, (batch, *shape); `alpha` and `sigma` are scalars or (batch,). Raises as `data_weights`."""
    return _combine(data_weights(prediction_type, alpha, sigma), state, output)


def to_noise(prediction_type: str, state: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Predicted noise, (batch, *shape); `alpha` and `sigma` are scalars or (batch,). Raises as `noise_weights`."""
    return _combine(noise_weights(prediction_type, alpha, sigma), state, output)


def to_output(prediction_type: str, data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The output of a perfect network, (batch, *shape): the regression target when training one."""
    return _combine(output_weights(prediction_type, alpha, sigma), data, noise)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """A scalar or (batch,) tensor shaped to broadcast over `like`, (batch, *shape), in its dtype and on its device."""
    value = value.to(like)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def _combine(weights: tuple[Tensor, Tensor], first: Tensor, second: Tensor) -> Tensor:
    return per_sample(weights[0], first) * first + per_sample(weights[1], second) * second
