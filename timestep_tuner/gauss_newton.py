"""Gauss-Newton for the ratios: every row's loss is a sum of squares that depends on one number."""

from dataclasses import dataclass

import torch
from torch import Tensor

from timestep_tuner.objective import Objective, Rows

WIDTH = 0.03  # of the central differences, in units of the ratio: well above the rounding of bfloat16 outputs
LIMIT = 0.1  # largest step of a ratio
MEMORY = 0.5  # weight of the earlier steps' curvature


@dataclass(frozen=True)
class Slopes:
    """Residuals r of each row around its ratio, and their slopes r' in it: sums over elements and samples, (rows,).

    `middle` is the ratio where r is taken: between the two tried, which is not quite the current one at a bound.
    """

    middle: Tensor
    square: Tensor
    gradient: Tensor
    curvature: Tensor


@torch.no_grad()
def slopes(objective: Objective, rows: Rows, ratio: Tensor) -> Slopes:
    """By central differences: two more evaluations of a row instead of a backward pass, and no graph in memory.

    The mean of the two sides stands for r: rounding noise of one side would otherwise be in r and in r' and point
    the step away from where the network was asked.

    Args:
        objective: of the rows.
        rows: with a history of their own where the table has one (`Objective.rows_on_data` with timesteps).
        ratio: (size,) float64 on the CPU.
    """
    low, high = (objective.ratios.project(ratio + step) for step in (-WIDTH, WIDTH))
    ends = [objective.residuals(rows, objective.ratios.timesteps(at)).flatten(1).double().cpu() for at in (low, high)]
    apart = (high - low)[rows.index]
    slope = (ends[1] - ends[0]) / apart[:, None].clamp_min(1e-9)
    value = (ends[0] + ends[1]) / 2
    sums = [value.square(), value * slope, slope.square()]
    return Slopes((low + high)[rows.index] / 2, *(term.sum(1) for term in sums))


def towards(found: Slopes, samples: float, past: Tensor) -> tuple[Tensor, Tensor]:
    """The ratios where the linearised residuals are smallest, at most `LIMIT` away, and the new `past`.

    Args:
        found: sums over all processes.
        samples: how many were summed over.
        past: curvature and samples of the steps so far, the later ones weighing more, (rows, 2); of none: zeros. One
            batch's curvature alone would make small batches take too large steps.
    """
    past = MEMORY * past + torch.stack([found.curvature, torch.full_like(found.curvature, samples)], dim=1)
    curvature = past[:, 0] / past[:, 1]
    step = -found.gradient / samples / curvature
    return found.middle + torch.where(curvature == 0, 0.0, step).clamp(-LIMIT, LIMIT), past
