"""Small problems the tests of the parallel sampler share."""

import torch
from torch import Tensor

from solvers import NoiseSchedule, SolverTable
from solvers.prediction import output_weights, per_sample

SHAPE = (2, 3, 3)


def mixing_denoiser(schedule: NoiseSchedule):
    """A smooth denoiser whose elements act on each other, with a condition.

    Close to sigma = 0 its noise is damped: float32 rounding divided by sigma would hide what is compared.
    """
    matrix = torch.linalg.qr(torch.randn(18, 18, generator=torch.Generator().manual_seed(1)).double())[0]

    def denoiser(x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        alpha, sigma = (per_sample(value, x) for value in schedule.alpha_sigma(timestep))
        mixed = (x.flatten(1) @ matrix.to(x)).reshape(x.shape)
        data = torch.tanh(alpha * mixed / (alpha**2 + sigma**2))
        if condition is not None:
            data = data + 0.1 * per_sample(condition.to(x), x)
        noise = (x - alpha * data) / sigma.clamp_min(0.1)
        on_data, on_noise = output_weights(schedule.prediction_type, alpha, sigma)
        return on_data * data + on_noise * noise

    denoiser.schedule = schedule
    return denoiser


def euler_table(schedule: NoiseSchedule, rows: int, noisy: float = 0.0) -> SolverTable:
    """First-order exponential integrator for epsilon outputs, built by hand; `noisy` > 0 adds fresh noise."""
    timesteps = torch.linspace(schedule.t_max, schedule.t_min, rows + 1, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(timesteps)
    fresh = noisy * sigma[1:]
    kept = (sigma[1:] ** 2 - fresh**2).sqrt()
    ratio = alpha[1:] / alpha[:-1]
    blocks = (torch.diag(values) for values in (ratio, kept - sigma[:-1] * ratio, fresh))
    return SolverTable(timesteps[:-1], alpha, sigma, *blocks, 1.0, "epsilon")


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference over root mean square."""
    return float((found - expected).norm() / expected.norm())
