"""Sub-paths between neighbouring teacher points: where their points lie, and what the consistency function is there.

Every quantity is one number per sample; states are combined with them by `weighted`. Derivations: slam/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.prediction import data_weights, noise_weights, per_sample
from solvers.schedule import NoiseSchedule

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
NOISE_LEVELS = ("paper", "shared")
LINE_TIMESTEPS = ("start", "node")
TEACHER_STEPS = ("ddim", "heun")


@dataclass(frozen=True)
class Points:
    """The ends of sub-paths: timesteps and nodes, each float64 of the same shape; `start` has more noise than `end`."""

    start: Tensor
    end: Tensor
    alpha_start: Tensor
    sigma_start: Tensor
    alpha_end: Tensor
    sigma_end: Tensor

    def __getitem__(self, index: Tensor) -> "Points":
        """Those of `index`, with repetition."""
        return Points(*(value[index] for value in vars(self).values()))


def teacher_points(schedule: NoiseSchedule, num_points: int = 50) -> Points:
    """All sub-paths of a teacher of `num_points` steps, from the data to the noise, (num_points,).

    Discrete VP (T timesteps): starts k n - 1 for n = 1, 2, ... with k = T // num_points, each ending at start - k or 0.
    Flow: sigma = n / num_points, moved by the schedule's shift; continuous VP: time = n / num_points; both end at the
    start before, the first at 0.

    Raises:
        ValueError: num_points outside 1 to the number of timesteps; epsilon outputs at a start without data; EDM, whose
            consistency function is another.
    Source: arXiv 2404.13903, section 4; the timesteps are those of arXiv 2310.04378.
    """
    if schedule.kind == "edm":
        raise ValueError("SLAM has no lines for EDM schedules: distil a VP or flow model")
    most = int(schedule.t_max) + 1 if schedule.kind == "discrete_vp" else 1000
    if not 1 <= num_points <= most:
        raise ValueError(f"teacher_points is {num_points}: this schedule has room for 1 to {most}")
    count = torch.arange(1, num_points + 1, dtype=torch.float64)
    if schedule.kind == "discrete_vp":
        skip = most // num_points
        start = skip * count - 1
        end = (start - skip).clamp_min(0)
    else:
        time = torch.cat([count.new_zeros(1), count / num_points])
        shift = schedule.parameters.get("shift", 1.0)
        time = shift * time / (1 + (shift - 1) * time)
        start, end = schedule.t_max * time[1:], schedule.t_max * time[:-1]
    points = Points(start, end, *schedule.alpha_sigma(start), *schedule.alpha_sigma(end))
    if schedule.prediction_type == "epsilon" and points.alpha_start[-1] < 1e-8:
        raise ValueError(
            "epsilon outputs at alpha = 0 (zero terminal signal-to-noise ratio) say nothing about the data: use a "
            "teacher with v_prediction"
        )
    return points


def ddim_weights(prediction_type: str, points: Points) -> tuple[Tensor, Tensor]:
    """Weights (on x_s, on the teacher's output) of x_e = alpha_e data + sigma_e noise, both read off at the start.

    For a flow this is Euler's step.
    """
    node = points.alpha_start, points.sigma_start
    data, noise = data_weights(prediction_type, *node), noise_weights(prediction_type, *node)
    on_state, on_output = (points.alpha_end * d + points.sigma_end * n for d, n in zip(data, noise))
    return on_state, on_output


def heun_weights(prediction_type: str, points: Points) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (on x_e, on the output there, on x_s, on the output there) of the second-order step through DDIM's x_e.

        x_e + (alpha_e - alpha_s sigma_e / sigma_s) (data_e - data_s) / 2

    The step of `ddim_weights` with the mean of the data read off at its two ends. At a noiseless end both are the same.

    Source: DPM-Solver++(2S) with its middle point at the end (arXiv 2211.01095); consistency distillation with Heun's
        steps: arXiv 2303.01469.
    """
    half = (points.alpha_end - points.alpha_start * points.sigma_end / points.sigma_start) / 2
    end = data_weights(prediction_type, points.alpha_end, points.sigma_end)
    start = data_weights(prediction_type, points.alpha_start, points.sigma_start)
    return 1 + half * end[0], half * end[1], -half * start[0], -half * start[1]


def line_weights(kind: str, points: Points, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (on x_s, on x_e) of the point gamma of the line.

        VP:    x_g = gamma x_s + (1 - gamma) r x_e,  r = alpha_s / alpha_e (the drift removed)
        flow:  x_g = gamma x_s + (1 - gamma) x_e

    Source: arXiv 2404.13903, eq. 10; the flow form is this project's.
    """
    if kind == "flow":
        return gamma, 1 - gamma
    return gamma, (1 - gamma) * points.alpha_start / points.alpha_end


def line_node(kind: str, points: Points, gamma: Tensor, noise_level: str = "paper") -> tuple[Tensor, Tensor]:
    """Node (alpha, sigma) of the point gamma of the line.

        VP:    alpha_s,  sigma_g^2 = (r sigma_e)^2 + gamma^2 (sigma_s^2 - (r sigma_e)^2)     (`paper`)
                         sigma_g = gamma sigma_s + (1 - gamma) r sigma_e                     (`shared`)
        flow:  1 - t_g, t_g with t_g = gamma s + (1 - gamma) e, for either

    Args:
        kind: of the schedule.
        points: ends of the lines, (batch,).
        gamma: (batch,) in [0, 1].
        noise_level: `paper`: x_s and x_e are coupled by the forward process; `shared`: they have the same noise, as
            under the deterministic step of a perfect teacher.
    """
    if kind == "flow":
        sigma = gamma * points.sigma_start + (1 - gamma) * points.sigma_end
        return 1 - sigma, sigma
    end = points.alpha_start / points.alpha_end * points.sigma_end
    if noise_level == "shared":
        return points.alpha_start, gamma * points.sigma_start + (1 - gamma) * end
    power = end**2 + gamma**2 * (points.sigma_start**2 - end**2)
    return points.alpha_start, power.sqrt()


def line_call(
    schedule: NoiseSchedule, points: Points, node: tuple[Tensor, Tensor], line_timestep: str = "start"
) -> tuple[Tensor, Tensor]:
    """How the student is asked on the line: its timestep, and what its state is divided by, each (batch,).

    Args:
        schedule: of the networks.
        points: ends of the lines.
        node: of the points on them, (batch,), see `line_node`.
        line_timestep: `start`: that of the start for all of the line, the state as it is (the paper's); `node`: that
            of the point's own signal-to-noise ratio, the state scaled onto the schedule, so that the student starts
            with right answers on the whole line.
    """
    if line_timestep == "start":
        return points.start, torch.ones_like(points.start)
    scale = node[0] + node[1] if schedule.kind == "flow" else torch.hypot(*node)
    return schedule.timestep(*node), scale


def boundary(schedule: NoiseSchedule, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of f = c_skip x + c_out data, so that f is the identity at timestep 0.

        VP:    c_skip = s^2 / ((10 t)^2 + s^2),  c_out = 10 t / sqrt((10 t)^2 + s^2),  s = 0.5, t in 0 .. 999
        flow:  0, 1: the data prediction x - t v is the identity at t = 0 already

    Source: arXiv 2310.04378, appendix; diffusers' LCMScheduler.
    """
    if schedule.kind == "flow":
        return torch.zeros_like(timestep), torch.ones_like(timestep)
    scaled = TIMESTEP_SCALING * timestep
    power = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / power, scaled / power.sqrt()


def consistency_weights(
    schedule: NoiseSchedule, timestep: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights (on the state, on the output) of the consistency function f = c_skip(t) x + c_out(t) data.

    Args:
        schedule: its prediction type says what an output is.
        timestep: (batch,), what the network is told; c_skip and c_out depend on it.
        alpha, sigma: (batch,), the node of the state, from which the data are read off.
    """
    c_skip, c_out = boundary(schedule, timestep)
    on_state, on_output = data_weights(schedule.prediction_type, alpha, sigma)
    return c_skip + c_out * on_state, c_out * on_output


def weighted(weights: Sequence[Tensor], *values: Tensor) -> Tensor:
    """weights[0] values[0] + weights[1] values[1] + ..., one weight per sample, in the dtype of the first value."""
    parts = [per_sample(weight, values[0]) * value for weight, value in zip(weights, values, strict=True)]
    return sum(parts[1:], parts[0])


def huber(difference: Tensor, c: float) -> Tensor:
    """Mean of sqrt(difference^2 + c^2) - c."""
    return ((difference**2 + c**2).sqrt() - c).mean()


def l2(difference: Tensor) -> Tensor:
    """Mean of difference^2."""
    return (difference**2).mean()
