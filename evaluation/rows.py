"""From the stored blocks of a comparison to the rows of its report."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from denoisers import network_calls
from evaluation.bootstrap import resamplings, rmse_interval
from evaluation.contenders import Contender
from evaluation.distances import error_figures, psnr
from evaluation.metrics import Measure
from evaluation.parts import Parts
from solvers import SolverTable


def make_row(
    contender: Contender,
    values: Mapping[str, Parts],
    totals: Mapping[str, float],
    measure: Measure,
    repeats: int,
    is_reference: bool = False,
) -> dict[str, Any]:
    """One row of report.json.

    Args:
        contender: the solver.
        values: `squared_errors` (n,) and what the measure makes of the images.
        totals: of all images: `seconds`, and of a parallel sampler `rounds` and `evaluations`.
        measure: what to measure.
        repeats: resamplings for intervals, 0 for none.
        is_reference: whether errors are measured against this one.
    """
    info, squared = contender.table.info, values["squared_errors"].whole()
    count = len(squared)
    fitted = info.get("fitted_on") or {}
    return {
        "solver": contender.name,
        "method": info.get("method", "baseline"),
        "nfe": network_calls(contender.table, contender.denoiser),
        "rows": contender.table.num_rows,
        "guidance": contender.guidance_scale,
        "num_images": count,
        **_errors(squared, repeats),
        "fd": None,
        **measure.figures(values, repeats),
        "end_noise_level": contender.end_noise_level,
        "rounds": _per_image(totals, "rounds", contender, count),
        "evaluations": _per_image(totals, "evaluations", contender, count),
        "seconds": totals["seconds"] / count,
        "fitting_seconds": fitted.get("seconds"),
        "unused_evaluations": len(contender.table.unused_evaluations()),
        "stochastic": contender.table.is_stochastic,
        "is_reference": is_reference,
    }


def _per_image(totals: Mapping[str, float], name: str, contender: Contender, count: int) -> float:
    """Of a sequential sampler: a round for each row; of every sampler network calls, two where guidance is inside."""
    table, denoiser = contender.table, contender.denoiser
    if name not in totals:
        return float(table.num_rows if name == "rounds" else network_calls(table, denoiser))
    each = network_calls(table, denoiser) / table.nfe if name == "evaluations" else 1
    return each * totals[name] / count


def _errors(squared: Tensor, repeats: int) -> dict[str, Any]:
    found = error_figures(squared)
    low, high = rmse_interval(squared, resamplings(len(squared), repeats)) if repeats else (None, None)
    decibels = psnr(found["rmse"])
    return found | {"rmse_low": low, "rmse_high": high, "psnr": decibels if math.isfinite(decibels) else None}


def trajectory_error(table: SolverTable, states: Tensor, reference: SolverTable, target: Tensor) -> Tensor:
    """Distance of each state from the reference's trajectory at the same noise level, (N+1,) float64.

    States are scaled to x / sqrt(alpha^2 + sigma^2); between its nodes the reference is interpolated linearly in the
    angle atan2(sigma, alpha); the distance is the root mean square over images and pixels.

    Args:
        table: the solver.
        states: (N+1, k, *shape).
        reference: the reference solver.
        target: (M+1, k', *shape); the first min(k, k') images are used.
    """
    count = min(states.shape[1], target.shape[1])
    states, target = _scaled(table, states[:, :count]), _scaled(reference, target[:, :count])
    angles, own = _angle(reference), _angle(table)
    order = angles.argsort()
    angles, target = angles[order], target[order]
    upper = torch.searchsorted(angles, own).clamp(1, len(angles) - 1)
    span = (angles[upper] - angles[upper - 1]).clamp_min(1e-300)
    weight = ((own - angles[upper - 1]) / span).clamp(0, 1)
    between = torch.stack([target[u - 1].lerp(target[u], w) for u, w in zip(upper.tolist(), weight)])
    return (states - between).square().flatten(1).mean(1).sqrt()


def _scaled(table: SolverTable, states: Tensor) -> Tensor:
    norm = (table.alpha**2 + table.sigma**2).sqrt().detach()
    return states.double() / norm.view(-1, *[1] * (states.ndim - 1))


def _angle(table: SolverTable) -> Tensor:
    return torch.atan2(table.sigma.detach(), table.alpha.detach())
