"""95 % intervals by resampling images; all solvers of a comparison share the same resamplings."""

import torch
from torch import Tensor

from evaluation.distances import FrechetTo, Gaussian, KernelTo

_SEED = 20240501
_CHUNK = 16


def resamplings(num_images: int, repeats: int) -> Tensor:
    """How often each image is drawn in each resampling: (repeats, num_images) float64; the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.randint(num_images, (repeats, num_images), generator=generator)
    return torch.zeros(repeats, num_images, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())


def rmse_interval(squared_errors: Tensor, counts: Tensor) -> tuple[float, float]:
    """Interval of the root of the mean of per-image squared errors (n,): the percentiles of the resampled values."""
    values = (counts @ squared_errors.double() / len(squared_errors)).clamp_min(0).sqrt()
    return _percentiles(values)


def frechet_interval(features: Tensor, distance: FrechetTo, counts: Tensor) -> tuple[float, float]:
    """Interval of a Frechet distance of features (n, d), centred on the estimate from all images.

    A resampling holds fewer different images, which raises the distance by a bias of its own; so the spread of the
    resampled distances around their mean is laid around the estimate. The bias that the estimate has itself, from its
    number of images, is not removed: compare figures of the same number of images only.
    """
    features = features.double() - distance.target.mean
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


def _distances(features: Tensor, distance: FrechetTo, counts: Tensor) -> Tensor:
    n = len(features)
    means = counts @ features / n
    second = torch.stack([(features * row[:, None]).T @ features for row in counts])
    covariances = (second - n * means[:, :, None] * means[:, None, :]) / (n - 1)
    return distance(means + distance.target.mean, covariances)


def _percentiles(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
