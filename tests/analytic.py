"""Exact denoisers: the network a perfect training would give, for data whose distribution is known."""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers import NoiseSchedule
from solvers.prediction import per_sample, to_output


def gaussian_denoiser(schedule: NoiseSchedule, mean: float = 0.3, std: float = 0.6) -> Callable:
    """Data N(mean, std^2) per element: linear in x."""

    def data(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return _denoiser(schedule, data)


def two_point_denoiser(schedule: NoiseSchedule, value: float = 1.0) -> Callable:
    """Data +value or -value per element with equal chance: tanh in x."""

    def data(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return value * torch.tanh(value * alpha * x / sigma**2)

    return _denoiser(schedule, data)


def gaussian_solution(
    schedule: NoiseSchedule, state: Tensor, start: Tensor, end: Tensor, mean: float = 0.3, std: float = 0.6
) -> Tensor:
    """Exact probability-flow solution from timestep `start` to `end` for N(mean, std^2) data."""
    (a0, s0), (a1, s1) = schedule.alpha_sigma(start), schedule.alpha_sigma(end)
    scale = ((a1**2 * std**2 + s1**2) / (a0**2 * std**2 + s0**2)).sqrt()
    return a1 * mean + scale * (state - a0 * mean)


def _denoiser(schedule: NoiseSchedule, data: Callable) -> Callable:
    def denoiser(x: Tensor, timestep: Tensor, condition: object = None) -> Tensor:
        alpha, sigma = (per_sample(value, x) for value in schedule.alpha_sigma(timestep))
        predicted = data(x, alpha, sigma)
        noise = (x - alpha * predicted) / sigma
        return to_output(schedule.prediction_type, predicted, noise, alpha, sigma)

    denoiser.schedule = schedule
    return denoiser
