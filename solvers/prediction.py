"""What a network output means at a node (alpha, sigma), where x = alpha * data + sigma * noise.

Every prediction type is linear in the state x and the output o, so one pair of weights says all:

    data  = weight_x * x + weight_o * o        (data_weights)
    noise = weight_x * x + weight_o * o        (noise_weights)

| type              | output                       | also called                |
|-------------------|------------------------------|----------------------------|
| `epsilon`         | noise                        | noise prediction           |
| `sample`          | data                         | x0 or data prediction      |
| `v_prediction`    | alpha * noise - sigma * data | velocity of a VP schedule  |
| `flow_prediction` | noise - data                 | rectified-flow velocity    |
"""

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def check_prediction_type(prediction_type: str) -> str:
    """Return `prediction_type`, or raise ValueError when it is not one of PREDICTION_TYPES."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")
    return prediction_type


def data_weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (on the state, on the output) of the predicted data at a node.

    Args:
        prediction_type: one of PREDICTION_TYPES.
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
    if prediction_type == "v_prediction":
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power
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
    if prediction_type == "v_prediction":
        power = alpha**2 + sigma**2
        return sigma / power, alpha / power
    return 1 / (alpha + sigma), alpha / (alpha + sigma)


def output_weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (on the data, on the noise) of the output a perfect network gives at a node."""
    check_prediction_type(prediction_type)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "v_prediction": (-sigma, alpha),
        "flow_prediction": (-one, one),
    }[prediction_type]


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
