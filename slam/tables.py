"""Few-step sampling of a student as a solver table: multistep consistency sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slam.lines import Points, consistency_weights, teacher_points
from solvers import NoiseSchedule, SolverTable


def student_table(
    schedule: NoiseSchedule, num_steps: int, num_points: int = 50, kept_noise: float | Sequence[float] = 0.0
) -> SolverTable:
    """Predict the data, add noise again, and so on, from pure noise to the image.

        f = f(state[i], t[i]),    implied = (state[i] - alpha[i] f) / sigma[i]
        state[i+1] = alpha[i+1] f + sigma[i+1] (kept implied + sqrt(1 - kept^2) noise[i]),    state[N] = f

    f = c_skip x + c_out data is linear in state and output, so all of it folds into the coefficients. The timesteps are
    those of `num_steps` of the teacher's points, chosen as diffusers' LCMScheduler does.

    Args:
        schedule: of the student.
        num_steps: network evaluations, 1 <= num_steps <= num_points.
        num_points: points of the teacher the student was distilled from.
        kept_noise: share in [0, 1] of each step's noise that is the one implied by its own prediction; one number, or
            one for each of the num_steps - 1 steps that end in noise. 0: all noise is fresh; 1: none is (DDIM).
    Raises:
        ValueError: num_steps or a share out of its range, or another number of shares.
    Source: arXiv 2404.13903 has 0. The gamma of trajectory consistency models (arXiv 2310.02279, 2402.19159) is the
        same choice, told as the level sigma_s that a step goes down to before noise is added:
        kept = (alpha[i+1] sigma_s) / (alpha_s sigma[i+1]).
    """
    if not 1 <= num_steps <= num_points:
        raise ValueError(
            f"a student of {num_points} teacher points is sampled in 1 to {num_points} steps, not {num_steps}"
        )
    points = _chosen(teacher_points(schedule, num_points), num_steps)
    on_state, on_output = consistency_weights(schedule, points.start, points.alpha_start, points.sigma_start)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    alpha, sigma = torch.cat([points.alpha_start, one]), torch.cat([points.sigma_start, zero])
    kept = torch.cat([_shares(kept_noise, num_steps - 1), zero])
    implied = sigma[1:] * kept / sigma[:-1]
    on_data = alpha[1:] - implied * alpha[:-1]
    return SolverTable(
        timesteps=points.start,
        alpha=alpha,
        sigma=sigma,
        state_coef=torch.diag(on_data * on_state + implied),
        output_coef=torch.diag(on_data * on_output),
        noise_coef=torch.diag(sigma[1:] * (1 - kept**2).sqrt()),
        start_scale=1.0,
        prediction_type=schedule.prediction_type,
    )


def _chosen(points: Points, num_steps: int) -> Points:
    """Evenly spread points, from the noise on."""
    last = len(points.start) - 1
    index: Tensor = last - torch.arange(num_steps) * len(points.start) // num_steps
    return points[index]


def _shares(kept_noise: float | Sequence[float], count: int) -> Tensor:
    found = torch.as_tensor(kept_noise, dtype=torch.float64)
    if found.ndim and len(found) != count:
        raise ValueError(f"kept_noise has {len(found)} shares for {count} steps that end in noise: give one of each")
    if bool(((found < 0) | (found > 1)).any()):
        raise ValueError(f"kept_noise {kept_noise} must lie in [0, 1]")
    return found.expand(count)
