"""From the stored blocks of a comparison to the rows of its report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from denoisers import network_calls
from evaluation.args import Metric
from evaluation.bootstrap import frechet_interval, kernel_interval, resamplings, rmse_interval
from evaluation.contenders import Contender
from evaluation.distances import Gaussian, error_figures, inception_score, precision_recall, psnr, require_full_rank
from evaluation.extractors import Extractor
from evaluation.statistics import DataStatistics
from solvers import SolverTable

METRICS = get_args(Metric)


@dataclass(frozen=True)
class Measure:
    """What is measured, decided before anything is computed.

    Args:
        metrics: of METRICS.
        extractor: None when only rmse is measured.
        statistics: of the data; None when no metric needs them.
        notes: what was left out and why, for the report.
        asked: the metrics that were asked for; None: all that are possible.
    """

    metrics: tuple[str, ...]
    extractor: Extractor | None
    statistics: DataStatistics | None
    notes: tuple[str, ...] = ()
    asked: tuple[str, ...] | None = None


def choose_metrics(
    wanted: Sequence[str] | None,
    extractor: Extractor | None,
    statistics: DataStatistics | None,
    num_samples: int,
    shape: Sequence[int],
) -> Measure:
    """Decide what is measured.

    Args:
        wanted: metrics asked for; None: all that are possible, the others are noted.
        extractor: None when there is none.
        statistics: None when there are none.
        num_samples: images per solver.
        shape: of an image.
    Raises:
        ValueError: an unknown metric, or one that was asked for and is not possible.
    """
    unknown = set(wanted or ()) - set(METRICS)
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(sorted(unknown))}: use some of {', '.join(METRICS)}")
    chosen: list[str] = ["rmse"]
    left_out: dict[str, list[str]] = {}
    for metric in METRICS[1:] if wanted is None else [name for name in METRICS[1:] if name in wanted]:
        reason = _obstacle(metric, extractor, statistics, num_samples, tuple(shape))
        if reason is None:
            chosen.append(metric)
        elif wanted is not None:
            raise ValueError(f"{metric} was asked for: {reason}")
        else:
            left_out.setdefault(reason, []).append(metric)
    notes = [f"left out: {', '.join(metrics)}, because {reason}" for reason, metrics in left_out.items()]
    fits = extractor is not None and statistics is not None and extractor.fits(tuple(shape))
    may_grow = wanted is None and fits  # few images may become many, whose metrics need the features of all
    if chosen == ["rmse"] and not may_grow:
        extractor = statistics = None
    asked = None if wanted is None else tuple(chosen)
    return Measure(tuple(chosen), extractor, statistics, tuple(notes), asked)


def _obstacle(metric, extractor, statistics, num_samples, shape) -> str | None:
    if extractor is None:
        return "there is no extractor"
    if not extractor.fits(shape):
        wanted = extractor.image_shape or "(3, height, width)"
        latent = "" if shape[0] in (1, 3) else "; a latent model needs its decoder (decoder: true in denoiser.yaml)"
        return f"the extractor {extractor.identity['name']} takes images {wanted}, the model makes {shape}{latent}"
    if metric == "inception_score":
        return None if extractor.num_classes else f"the extractor {extractor.identity['name']} has no classes"
    if statistics is None:
        return "there are no data statistics (--statistics)"
    if min(num_samples, len(statistics.features)) < 4:
        return f"{num_samples} images, compared with {len(statistics.features)} of the data, are too few"
    if metric == "fd":
        return _rank_obstacle(num_samples, extractor.num_features, "images") or _rank_obstacle(
            statistics.gaussian.count, extractor.num_features, "images of the data"
        )
    return None


def _rank_obstacle(count: int, num_features: int, what: str) -> str | None:
    try:
        require_full_rank(count, num_features, what)
    except ValueError as error:
        return str(error)
    return None


def make_row(
    contender: Contender,
    values: Mapping[str, Tensor],
    measure: Measure,
    repeats: int,
    is_reference: bool = False,
) -> dict[str, Any]:
    """One row of report.json.

    Args:
        contender: the solver.
        values: `squared_errors` (n,), `seconds`, with an extractor `features` (n, d), `scores` (n, classes), and of a
            parallel sampler `rounds` and `evaluations` of all images.
        measure: what to measure.
        repeats: resamplings for intervals, 0 for none.
        is_reference: whether errors are measured against this one.
    """
    info, count = contender.table.info, len(values["squared_errors"])
    counts = resamplings(count, repeats) if repeats else None
    fitted = info.get("fitted_on") or {}
    return {
        "solver": contender.name,
        "method": info.get("method", "baseline"),
        "nfe": network_calls(contender.table, contender.denoiser),
        "rows": contender.table.num_rows,
        "guidance": contender.guidance_scale,
        "num_images": count,
        **_errors(values["squared_errors"], counts),
        **_distances(values, measure, counts),
        "end_noise_level": contender.end_noise_level,
        "rounds": _per_image(values, "rounds", contender),
        "evaluations": _per_image(values, "evaluations", contender),
        "seconds": float(values["seconds"]) / count,
        "fitting_seconds": fitted.get("seconds"),
        "unused_evaluations": len(contender.table.unused_evaluations()),
        "stochastic": contender.table.is_stochastic,
        "is_reference": is_reference,
    }


def _per_image(values: Mapping[str, Tensor], name: str, contender: Contender) -> float:
    """Of a sequential sampler: a round for each row; of every sampler network calls, two where guidance is inside."""
    table, denoiser = contender.table, contender.denoiser
    if name not in values:
        return float(table.num_rows if name == "rounds" else network_calls(table, denoiser))
    each = network_calls(table, denoiser) / table.nfe if name == "evaluations" else 1
    return each * float(values[name]) / len(values["squared_errors"])


def _errors(squared: Tensor, counts: Tensor | None) -> dict[str, Any]:
    found = error_figures(squared)
    low, high = rmse_interval(squared, counts) if counts is not None else (None, None)
    decibels = psnr(found["rmse"])
    return found | {"rmse_low": low, "rmse_high": high, "psnr": decibels if math.isfinite(decibels) else None}


def _distances(values: Mapping[str, Tensor], measure: Measure, counts: Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = {"fd": None}
    features, statistics = values.get("features"), measure.statistics
    if "fd" in measure.metrics:
        gaussian = Gaussian.of(features)
        found["fd"] = float(statistics.frechet(gaussian.mean[None], gaussian.covariance[None]))
        if counts is not None:
            found["fd_low"], found["fd_high"] = frechet_interval(features, statistics.frechet, counts)
    if "kid" in measure.metrics:
        found["kid"] = statistics.kernel(features)
        if counts is not None:
            found["kid_low"], found["kid_high"] = kernel_interval(features, statistics.kernel, counts)
    if "precision_recall" in measure.metrics:
        found["precision"], found["recall"] = precision_recall(features, statistics.manifold)
    if "inception_score" in measure.metrics:
        found["inception_score"] = inception_score(values["scores"])
    return found


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
