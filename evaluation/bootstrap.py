"""95 % intervals by resampling images; all solvers of a comparison share the same resamplings."""

from functools import lru_cache

import torch
from torch import Tensor

from evaluation.distances import FrechetTo, Gaussian, KernelTo
from evaluation.parts import Parts

_SEED = 20240501
_CHUNK = 16


@lru_cache(maxsize=2)
def resamplings(num_images: int, repeats: int) -> Tensor:
    """How often each image is drawn in each resampling: (repeats, num_images) float64; the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.randint(num_images, (repeats, num_images), generator=generator)
    return torch.zeros(repeats, num_images, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())


def rmse_interval(squared_errors: Tensor, counts: Tensor) -> tuple[float, float]:
    """Interval of the root of the mean of per-image squared errors (n,): the percentiles of the resampled values."""
    values = (counts @ squared_errors.double() / len(squared_errors)).clamp_min(0).sqrt()
    return _percentiles(values)


def mean_interval(values: Tensor, counts: Tensor) -> tuple[float, float]:
    """Interval of the mean of figures of single images (n,): the percentiles of the resampled means."""
    return _percentiles(counts @ values.double() / len(values))


def frechet_interval(features: Parts, distance: FrechetTo, counts: Tensor) -> tuple[float, float]:
    """Interval of a Frechet distance of features (n, d), centred on the estimate from all images.

    A resampling holds fewer different images, which raises the distance by a bias of its own; so the spread of the
    resampled distances around their mean is laid around the estimate. The bias that the estimate has itself, from its
    number of images, is not removed: compare figures of the same number of images only.
    """
    features = Parts(lambda rows=features: (part.double() - distance.target.mean for part in rows), len(features))
    estimate = Gaussian.of(features)
    centre = float(distance((estimate.mean + distance.target.mean)[None], estimate.covariance[None]))
    values = torch.cat([_distances(features, distance, part) for part in counts.split(_CHUNK)])
    low, high = _percentiles(values - values.mean())
    return max(0.0, centre + low), centre + high


def kernel_interval(features: Tensor, distance: KernelTo, counts: Tensor) -> tuple[float, float]:
    """Interval of a kernel distance of features (n, d): the percentiles of the resampled values.

    Up to 1.7 times too wide where the distance itself is no larger than its noise.
    """
    return _percentiles(distance.resampled(features, counts))


def _distances(features: Parts, distance: FrechetTo, counts: Tensor) -> Tensor:
    n, start = len(features), 0
    means, second = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for part in features:
        drawn = counts[:, start : start + len(part)]
        means = means + drawn @ part
        second = second + torch.stack([(part * row[:, None]).T @ part for row in drawn])
        start += len(part)
    means = means / n
    covariances = (second - n * means[:, :, None] * means[:, None, :]) / (n - 1)
    return distance(means + distance.target.mean, covariances)


def _percentiles(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
