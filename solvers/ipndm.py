"""iPNDM: Adams-Bashforth steps on the network's own output, as a table."""

import torch
from torch import Tensor

from solvers.prediction import data_weights, noise_weights
from solvers.schedule import NoiseSchedule
from solvers.table import SolverTable

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)  # weights of the outputs i, i-1, ... for orders 1 to 4


def ipndm(schedule: NoiseSchedule, timesteps: Tensor, order: int = 4) -> SolverTable:
    """iPNDM down to the image (alpha 1, sigma 0), with warm-up orders 1, 2, ... up to `order`.

        VP:    x' = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) sum_k w_k noise[i-k]
        flow:  x' = x + (sigma' - sigma) sum_k w_k velocity[i-k]

    with the Adams-Bashforth weights w. Other prediction types are turned into noise (VP) or velocity (flow) at their
    own node. Order 1 is DDIM and Euler's method respectively.

    Args:
        schedule: where the timesteps lie.
        timesteps: (N,), falling, inside the schedule's range.
        order: highest order, 1 to 4.
    Raises:
        ValueError: order outside 1 to 4, timesteps that do not fall, or a first node without data (alpha = 0) of a VP
            schedule, where alpha'/alpha does not exist.
    Source: arXiv 2204.13902, eq. 14; arXiv 2202.09778 for the warm-up.
    """
    timesteps = torch.as_tensor(timesteps, dtype=torch.float64)
    if not 1 <= order <= len(ADAMS_BASHFORTH):
        raise ValueError(f"order is {order}: iPNDM has orders 1 to {len(ADAMS_BASHFORTH)}")
    if timesteps.ndim != 1 or len(timesteps) < 1 or not bool((timesteps.diff() < 0).all()):
        raise ValueError(f"timesteps are {timesteps.tolist()}: needed is a list of at least one that falls")
    alpha, sigma = (torch.cat([node, end]) for node, end in zip(schedule.alpha_sigma(timesteps), _IMAGE))
    is_flow = schedule.kind == "flow"
    if not is_flow and bool((alpha < 1e-12).any()):
        raise ValueError("iPNDM cannot start at alpha = 0 of a VP schedule: use dpmpp or ddim there")
    ratio = torch.ones_like(sigma[1:]) if is_flow else alpha[1:] / alpha[:-1]
    step = sigma[1:] - sigma[:-1] * ratio
    on_state, on_output = _derivative_weights(schedule, alpha[:-1], sigma[:-1])
    weights = step[:, None] * _multistep(len(timesteps), order) + 0.0  # no negative zeros
    return SolverTable(
        timesteps=timesteps,
        alpha=alpha,
        sigma=sigma,
        state_coef=torch.diag(ratio) + weights * on_state,
        output_coef=weights * on_output,
        noise_coef=torch.zeros_like(weights),
        start_scale=1.0,
        prediction_type=schedule.prediction_type,
    )


_IMAGE = torch.tensor([[1.0], [0.0]], dtype=torch.float64)


def _derivative_weights(schedule: NoiseSchedule, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (on the state, on the output) of what is integrated: the noise, or noise - data for a flow."""
    on_state, on_output = noise_weights(schedule.prediction_type, alpha, sigma)
    if schedule.kind != "flow":
        return on_state, on_output
    data_state, data_output = data_weights(schedule.prediction_type, alpha, sigma)
    return on_state - data_state, on_output - data_output


def _multistep(n: int, order: int) -> Tensor:
    """(N, N) Adams-Bashforth weights of output j in row i."""
    weights = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for k, weight in enumerate(ADAMS_BASHFORTH[min(i + 1, order) - 1]):
            weights[i, i - k] = weight
    return weights
