"""What SLAM minimises: how far two predictions are apart, on the line and at the teacher's next point."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from slam.lines import (
    LINE_TIMESTEPS,
    NOISE_LEVELS,
    TEACHER_STEPS,
    Points,
    consistency_weights,
    ddim_weights,
    heun_weights,
    huber,
    l2,
    line_call,
    line_node,
    line_weights,
    weighted,
)
from solvers.schedule import NoiseSchedule
from training.arguments import check_choice

Pair = tuple[Tensor, Tensor]
METHODS = ("slam", "consistency")
WEIGHTINGS = ("uniform", "snr")
LOSSES = ("huber", "l2")


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        method: `slam`, or `consistency`: gamma is 1 always, plain consistency distillation.
        teacher_points: steps of the teacher between noise and data.
        teacher_step: `ddim` (flow: Euler), or `heun`: second order, two evaluations of the teacher.
        noise_level: sigma on the line, `paper` or `shared`, see `slam.lines.line_node`.
        line_timestep: what the student is told on the line, `start` or `node`, see `slam.lines.line_call`.
        weighting: of the difference before the loss: `uniform`: 1; `snr`: min(1, alpha_s / sigma_s), so that data read
            off a noise prediction at alpha_s near 0, with errors of 1 / alpha_s, do not outweigh all others.
        loss: `huber` or `l2`.
        huber_c: where the Huber loss turns from quadratic to linear.
        target_decay: of the target, an exponential moving average of the student.
    Raises:
        ValueError: an option out of its range.
    Source: arXiv 2404.13903: target decay 0.95, Huber with c = 0.001 on Stable Diffusion.
    """

    method: str = "slam"
    teacher_points: int = 50
    teacher_step: str = "ddim"
    noise_level: str = "paper"
    line_timestep: str = "start"
    weighting: str = "uniform"
    loss: str = "huber"
    huber_c: float = 0.001
    target_decay: float = 0.95

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("teacher_step", self.teacher_step, TEACHER_STEPS)
        check_choice("noise_level", self.noise_level, NOISE_LEVELS)
        check_choice("line_timestep", self.line_timestep, LINE_TIMESTEPS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("loss", self.loss, LOSSES)
        if self.huber_c <= 0:
            raise ValueError(f"huber_c {self.huber_c} must be positive")
        if not 0 <= self.target_decay < 1:
            raise ValueError(f"target_decay {self.target_decay} must lie in [0, 1)")

    @property
    def tells_gamma(self) -> bool:
        """Whether the student is told gamma; not for plain consistency distillation, where it is 1."""
        return self.method == "slam"

    @property
    def teacher_evaluations(self) -> int:
        """Of a step of the teacher."""
        return 2 if self.teacher_step == "heun" else 1

    def of(self, difference: Tensor) -> Tensor:
        """The loss of weighted differences."""
        return huber(difference, self.huber_c) if self.loss == "huber" else l2(difference)


@dataclass(frozen=True)
class Weights:
    """What a batch of sub-paths needs, one number per sample: timesteps, gamma, and pairs of weights.

    `forward` of (data, noise) in x_s; `step` of (x_s, teacher's output) in x_e; `heun` of (x_e, teacher's output there,
    x_s, teacher's output there) in the second-order x_e, empty where the step is DDIM's; `line` of (x_s, x_e) in x_g,
    scaled as the student is asked; `student` of (that, output) in f_g; `target` of (x_e, output) in f_e; `loss` of
    f_g - f_e. `told` is the student's timestep.
    """

    start: Tensor
    end: Tensor
    told: Tensor
    gamma: Tensor
    loss: Tensor
    forward: Pair
    step: Pair
    heun: tuple[Tensor, ...]
    line: Pair
    student: Pair
    target: Pair

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        points: Points,
        gamma: Tensor,
        objective: Objective = Objective(),
    ) -> "Weights":
        """Weights of sub-paths (batch,) at gamma (batch,) in [0, 1], float64."""
        node = line_node(schedule.kind, points, gamma, objective.noise_level)
        told, scale = line_call(schedule, points, node, objective.line_timestep)
        on_start, on_end = line_weights(schedule.kind, points, gamma)
        return cls(
            points.start,
            points.end,
            told,
            gamma,
            _loss_weight(objective.weighting, points),
            forward=(points.alpha_start, points.sigma_start),
            step=ddim_weights(schedule.prediction_type, points),
            heun=heun_weights(schedule.prediction_type, points) if objective.teacher_step == "heun" else (),
            line=(on_start / scale, on_end / scale),
            student=consistency_weights(schedule, told, node[0] / scale, node[1] / scale),
            target=consistency_weights(schedule, points.end, points.alpha_end, points.sigma_end),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> "Weights":
        """The same on a device, in one transfer."""
        rows = [getattr(self, field.name) for field in fields(self)]
        flat = [value for row in rows for value in (row if isinstance(row, tuple) else (row,))]
        moved: Iterator[Any] = iter(torch.stack(flat).to(dtype).to(device, non_blocking=True).unbind())
        found: list[Any] = [tuple(next(moved) for _ in row) if isinstance(row, tuple) else next(moved) for row in rows]
        return Weights(*found)


def _loss_weight(weighting: str, points: Points) -> Tensor:
    if weighting == "uniform":
        return torch.ones_like(points.start)
    return (points.alpha_start / points.sigma_start).clamp_max(1)


def predictions(
    student: Callable[..., Tensor],
    target: Callable[..., Tensor],
    teacher: Callable[..., Tensor],
    weights: Weights,
    data: Tensor,
    noise: Tensor,
    condition: Any,
    told: bool = True,
) -> Pair:
    """(f_g, f_e): the student's prediction on the line, and the target's at the teacher's next point, no gradient.

    Args:
        student: called with gamma where `told`.
        target: called without.
        teacher: guided.
        weights: of the batch, on the device.
        data, noise: (batch, *shape).
        condition: of all three.
        told: whether the student is told gamma; not for plain consistency distillation, where it is 1.
    """
    state = weighted(weights.forward, data, noise)
    with torch.no_grad():
        end = teacher_end(teacher, weights, state, condition)
        aim = weighted(weights.target, end, target(end, weights.end, condition))
    point = weighted(weights.line, state, end)
    options = {"gamma": weights.gamma} if told else {}
    return weighted(weights.student, point, student(point, weights.told, condition, **options)), aim


def teacher_end(teacher: Callable[..., Tensor], weights: Weights, state: Tensor, condition: Any = None) -> Tensor:
    """The teacher's next point x_e from x_s, (batch, *shape): by one evaluation, or by two."""
    output = teacher(state, weights.start, condition)
    end = weighted(weights.step, state, output)
    if not weights.heun:
        return end
    return weighted(weights.heun, end, teacher(end, weights.end, condition), state, output)
