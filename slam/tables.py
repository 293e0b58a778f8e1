"""Few-step sampling of a student as a solver table: multistep consistency sampling."""

import torch
from torch import Tensor

from slam.lines import Points, consistency_weights, teacher_points
from solvers import NoiseSchedule, SolverTable


def student_table(schedule: NoiseSchedule, num_steps: int, num_points: int = 50) -> SolverTable:
    """Predict the data, add noise again, and so on, from pure noise to the image.

        state[i+1] = alpha[i+1] f(state[i], t[i]) + sigma[i+1] noise[i],    state[N] = f(state[N-1], t[N-1])

    f = c_skip x + c_out data is linear in state and output, so it folds into the coefficients. The timesteps are those
    of `num_steps` of the teacher's points, chosen as diffusers' LCMScheduler does.

    Args:
        schedule: of the student.
        num_steps: network evaluations, 1 <= num_steps <= num_points.
        num_points: points of the teacher the student was distilled from.
    Raises:
        ValueError: num_steps out of range.
    """
    if not 1 <= num_steps <= num_points:
        raise ValueError(
            f"a student of {num_points} teacher points is sampled in 1 to {num_points} steps, not {num_steps}"
        )
    points = _chosen(teacher_points(schedule, num_points), num_steps)
    on_state, on_output = consistency_weights(schedule, points.start, points.alpha_start, points.sigma_start)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    alpha, sigma = torch.cat([points.alpha_start, one]), torch.cat([points.sigma_start, zero])
    return SolverTable(
        timesteps=points.start,
        alpha=alpha,
        sigma=sigma,
        state_coef=torch.diag(alpha[1:] * on_state),
        output_coef=torch.diag(alpha[1:] * on_output),
        noise_coef=torch.diag(sigma[1:]),
        start_scale=1.0,
        prediction_type=schedule.prediction_type,
    )


def _chosen(points: Points, num_steps: int) -> Points:
    """Evenly spread points, from the noise on."""
    last = len(points.start) - 1
    index: Tensor = last - torch.arange(num_steps) * len(points.start) // num_steps
    return points[index]
