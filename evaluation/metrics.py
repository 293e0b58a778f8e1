"""What is measured of images: features and a distance, or a figure of each image by itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.generate import device_of
from evaluation.bootstrap import frechet_interval, kernel_interval, mean_interval, resamplings
from evaluation.distances import Gaussian, density_coverage, inception_score, precision_recall, require_full_rank
from evaluation.extractors import Extractor
from evaluation.parts import Parts
from evaluation.statistics import DataStatistics, describe

PAIRED = 10_000  # images that pairs are taken of, so that their cost ends to grow with the square
Figures = dict[str, float | tuple[float, tuple[float, float] | None]]


@dataclass(frozen=True)
class Metric:
    """Figures of all images in one feature space.

    Args:
        figures: (features or scores, statistics of the data, resamplings) -> figures by name, each with its interval
            where it has one.
        of: `features`, or `scores` of classes.
        is_default: measured where nothing else is asked for.
        least: images, made and of the data, that it needs.
    """

    figures: Callable[[Parts, DataStatistics | None, int], Figures]
    of: str = "features"
    is_default: bool = True
    least: int = 4


def _frechet(features: Parts, data: DataStatistics, repeats: int) -> Figures:
    own = Gaussian.of(features)
    value = float(data.frechet(own.mean[None], own.covariance[None]))
    counts = resamplings(len(features), repeats) if repeats else None
    return {"fd": (value, frechet_interval(features, data.frechet, counts) if counts is not None else None)}


def _kernel(features: Parts, data: DataStatistics, repeats: int) -> Figures:
    rows = features.spread(PAIRED)
    counts = resamplings(len(rows), repeats) if repeats else None
    return {"kid": (data.kernel(rows), kernel_interval(rows, data.kernel, counts) if counts is not None else None)}


def _precision_recall(features: Parts, data: DataStatistics, repeats: int) -> Figures:
    return dict(zip(("precision", "recall"), precision_recall(features.spread(PAIRED), data.manifold)))


def _density_coverage(features: Parts, data: DataStatistics, repeats: int) -> Figures:
    return dict(zip(("density", "coverage"), density_coverage(features.spread(PAIRED), data.wide_manifold)))


def _inception_score(scores: Parts, data: DataStatistics | None, repeats: int) -> Figures:
    return {"inception_score": inception_score(scores)}


METRICS = {
    "fd": Metric(_frechet),
    "kid": Metric(_kernel),
    "precision_recall": Metric(_precision_recall),
    "density_coverage": Metric(_density_coverage, is_default=False, least=6),
    "inception_score": Metric(_inception_score, "scores"),
}
NAMES = ("rmse", *METRICS, "lpips", "clip_score")
MISSING = "there is no extractor"


@dataclass(frozen=True)
class Space:
    """A feature space and what is measured in it.

    Args:
        extractor: makes the features.
        statistics: of the data.
        metrics: of METRICS.
        suffix: of the names of its figures: none in the first space, `@` and the extractor's name in others.
    """

    extractor: Extractor
    statistics: DataStatistics | None
    metrics: tuple[str, ...] = ()
    suffix: str = ""


@dataclass(frozen=True)
class Measure:
    """What is measured, decided before anything is computed.

    Args:
        spaces: feature spaces.
        judges: networks that judge each image by itself, (images, reference, prompts) -> (batch,); see
            `evaluation.judges`.
        notes: what was left out and why, for the report.
        asked: the metrics that were asked for; None: all that are possible.
    """

    spaces: tuple[Space, ...] = ()
    judges: Mapping[str, nn.Module] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    asked: tuple[str, ...] | None = None

    @property
    def described(self) -> dict[str, Any]:
        """The feature spaces and networks, JSON types."""
        spaces = [
            {"extractor": space.extractor.identity["name"], "fingerprint": space.extractor.fingerprint}
            | {"statistics": describe(space.statistics)}
            for space in self.spaces
        ]
        return {"spaces": spaces, "judges": {name: judge.identity for name, judge in self.judges.items()}}

    def values(
        self, images: Tensor, reference: Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """What figures are made of, of a batch of pictures in [-1, 1]: on the CPU, by name."""
        found: dict[str, Tensor] = {}
        for space in self.spaces:
            features, scores = space.extractor(images.to(device_of(space.extractor)))
            found["features" + space.suffix] = features.cpu()
            if scores is not None:
                found["scores" + space.suffix] = scores.cpu()
        for name, judge in self.judges.items():
            found[name] = judge(images, reference, prompts).cpu()
        return found

    def figures(self, values: Mapping[str, Parts], repeats: int = 0) -> dict[str, float]:
        """All figures of images, and their 95 % intervals as NAME_low and NAME_high.

        Args:
            values: what `values` gave of all images.
            repeats: resamplings for intervals, 0 for none.
        """
        found: dict[str, float] = {}
        for name, value in self._found(values, repeats):
            value, interval = value if isinstance(value, tuple) else (value, None)
            found[name] = value
            if interval is not None:
                found[f"{name}_low"], found[f"{name}_high"] = interval
        return found

    def figures_of(self, images: Tensor, repeats: int = 0, batch_size: int = 256) -> dict[str, float]:
        """Those of images in memory."""
        parts = [self.values(part) for part in images.split(batch_size)]
        return self.figures({name: Parts.of(torch.cat([part[name] for part in parts])) for name in parts[0]}, repeats)

    def _found(self, values: Mapping[str, Parts], repeats: int) -> Iterator[tuple[str, Any]]:
        for space in self.spaces:
            for metric in (METRICS[name] for name in space.metrics):
                figures = metric.figures(values[metric.of + space.suffix], space.statistics, repeats)
                yield from ((name + space.suffix, value) for name, value in figures.items())
        for name in self.judges:
            each = values[name].whole().double()
            yield name, (float(each.mean()), mean_interval(each, resamplings(len(each), repeats)) if repeats else None)


def choose_metrics(
    wanted: Sequence[str] | None,
    spaces: Sequence[tuple[Extractor, DataStatistics | None]],
    num_samples: int,
    shape: Sequence[int],
    judges: Mapping[str, nn.Module] | None = None,
) -> Measure:
    """Decide what is measured.

    Args:
        wanted: metrics asked for; None: all that are possible, the others are noted.
        spaces: extractors with the statistics of the data, where there are some.
        num_samples: images per solver.
        shape: of an image.
        judges: see `Measure`.
    Raises:
        ValueError: an unknown metric, or one that was asked for and is not possible.
    """
    unknown = set(wanted or ()) - set(NAMES)
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(sorted(unknown))}: use some of {', '.join(NAMES)}")
    names = [name for name, metric in METRICS.items() if (metric.is_default if wanted is None else name in wanted)]
    shape, notes = tuple(shape), [] if spaces or not names else [f"left out: {', '.join(names)}, because {MISSING}"]
    chosen = [_chosen(names, *space, num_samples, shape, index, notes) for index, space in enumerate(spaces)]
    for name in set(wanted or ()) & set(NAMES) - {"rmse", *METRICS, *(judges or ())}:
        raise ValueError(f"{name} was asked for, which `sample.py compare` and `evaluate` measure: leave it out here")
    for name in judges or ():
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"{name} was asked for: {shape} are no pictures")
    for name in names if wanted is not None else ():
        if not any(name in space.metrics for space in chosen):
            reason = _obstacle(name, *spaces[0], num_samples, shape) if spaces else MISSING
            raise ValueError(f"{name} was asked for: {reason}")
    # Few images may become many, whose metrics need the features of all.
    kept = (s for s in chosen if s.metrics or (wanted is None and s.statistics is not None and s.extractor.fits(shape)))
    asked = None if wanted is None else ("rmse", *(name for name in NAMES[1:] if name in wanted))
    return Measure(tuple(kept), dict(judges or {}), tuple(notes), asked)


def _chosen(names, extractor, statistics, num_samples, shape, index, notes) -> Space:
    """A space with what is possible in it; reasons for the rest are added to the notes."""
    obstacles = {name: _obstacle(name, extractor, statistics, num_samples, shape) for name in names}
    for reason in dict.fromkeys(reason for reason in obstacles.values() if reason):
        left_out = [name for name in names if obstacles[name] == reason]
        notes.append(f"left out: {', '.join(left_out)}, because {reason}")
    metrics = tuple(name for name in names if obstacles[name] is None)
    return Space(extractor, statistics, metrics, f"@{extractor.identity['name']}" if index else "")


def _obstacle(metric, extractor, statistics, num_samples, shape) -> str | None:
    name = extractor.identity["name"]
    if not extractor.fits(shape):
        wanted = extractor.image_shape or "(3, height, width)"
        latent = "" if shape[0] in (1, 3) else "; a latent model needs its decoder (decoder: true in denoiser.yaml)"
        return f"the extractor {name} takes images {wanted}, the model makes {shape}{latent}"
    if METRICS[metric].of == "scores":
        return None if extractor.num_classes else f"the extractor {name} has no classes"
    if statistics is None:
        return f"there are no data statistics for {name} (--statistics)"
    if metric == "fd":
        counts = ((num_samples, "images"), (statistics.gaussian.count, "images of the data"))
        reasons = (_rank_obstacle(count, extractor.num_features, what) for count, what in counts if count is not None)
        return next((reason for reason in reasons if reason), None)
    if not len(statistics.features):
        return "the data statistics hold no features, only their moments"
    if min(num_samples, len(statistics.features)) < METRICS[metric].least:
        return f"{num_samples} images, compared with {len(statistics.features)} of the data, are too few"
    return None


def _rank_obstacle(count: int, num_features: int, what: str) -> str | None:
    try:
        require_full_rank(count, num_features, what)
    except ValueError as error:
        return str(error)
    return None
