"""The two predictions that SLAM compares, for a batch: on the line, and at the teacher's next point."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from slam.lines import Points, consistency_weights, ddim_weights, line_call, line_node, line_weights, weighted
from solvers.schedule import NoiseSchedule

Pair = tuple[Tensor, Tensor]
WEIGHTINGS = ("uniform", "snr")


@dataclass(frozen=True)
class Weights:
    """What a batch of sub-paths needs, one number per sample: timesteps, gamma, and pairs of weights.

    `forward` of (data, noise) in x_s; `step` of (x_s, teacher's output) in x_e; `line` of (x_s, x_e) in x_g, scaled as
    the student is asked; `student` of (that, output) in f_g; `target` of (x_e, output) in f_e; `loss` of f_g - f_e.
    `told` is the student's timestep.
    """

    start: Tensor
    end: Tensor
    told: Tensor
    gamma: Tensor
    loss: Tensor
    forward: Pair
    step: Pair
    line: Pair
    student: Pair
    target: Pair

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        points: Points,
        gamma: Tensor,
        noise_level: str = "paper",
        weighting: str = "uniform",
        line_timestep: str = "start",
    ) -> "Weights":
        """Weights of sub-paths (batch,) at gamma (batch,), float64.

        Args:
            schedule: of the networks.
            points: the sub-paths.
            gamma: in [0, 1].
            noise_level: see `line_node`.
            weighting: of the difference before the loss: `uniform`: 1; `snr`: min(1, alpha_s / sigma_s), so that data
                read off a noise prediction at alpha_s near 0, with errors of 1 / alpha_s, do not outweigh all others.
            line_timestep: see `line_call`.
        """
        node = line_node(schedule.kind, points, gamma, noise_level)
        told, scale = line_call(schedule, points, node, line_timestep)
        on_start, on_end = line_weights(schedule.kind, points, gamma)
        return cls(
            points.start,
            points.end,
            told,
            gamma,
            _loss_weight(weighting, points),
            forward=(points.alpha_start, points.sigma_start),
            step=ddim_weights(schedule.prediction_type, points),
            line=(on_start / scale, on_end / scale),
            student=consistency_weights(schedule, told, node[0] / scale, node[1] / scale),
            target=consistency_weights(schedule, points.end, points.alpha_end, points.sigma_end),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> "Weights":
        """The same on a device, in one transfer."""
        rows = [getattr(self, field.name) for field in fields(self)]
        flat = [value for row in rows for value in (row if isinstance(row, tuple) else (row,))]
        moved: Iterator[Any] = iter(torch.stack(flat).to(dtype).to(device, non_blocking=True).unbind())
        found: list[Any] = [(next(moved), next(moved)) if isinstance(row, tuple) else next(moved) for row in rows]
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
        end = weighted(weights.step, state, teacher(state, weights.start, condition))
        aim = weighted(weights.target, end, target(end, weights.end, condition))
    point = weighted(weights.line, state, end)
    options = {"gamma": weights.gamma} if told else {}
    return weighted(weights.student, point, student(point, weights.told, condition, **options)), aim
