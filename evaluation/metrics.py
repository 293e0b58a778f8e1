"""The distances as torchmetrics: updated batch by batch, synchronised over processes, independent of both."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from evaluation import distances
from evaluation.distances import require_finite
from evaluation.statistics import DataStatistics


class FrechetDistance(Metric):
    """Frechet distance of the features' Gaussian to the data's.

    Sums are kept in float64 and around the data's mean, so that neither batches nor processes show.

    Args:
        statistics: of the data.
        kwargs: of torchmetrics' Metric.
    """

    is_differentiable, higher_is_better, full_state_update = False, False, False

    def __init__(self, statistics: DataStatistics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.statistics = statistics
        dimension = len(statistics.gaussian.mean)
        self.add_state("total", torch.zeros(dimension, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(dimension, dimension, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features (batch, d); ValueError where one is not finite."""
        require_finite(features, "features")
        centred = features.double() - self.statistics.gaussian.mean.to(features.device)
        self.total += centred.sum(0)
        self.products += centred.T @ centred
        self.count += len(features)

    def compute(self) -> Tensor:
        """The distance, float64.

        Raises:
            ValueError: not more images than feature dimensions.
        """
        count = int(self.count)
        distances.require_full_rank(count, len(self.total))
        offset = (self.total / count).cpu()
        covariance = (self.products.cpu() - count * torch.outer(offset, offset)) / (count - 1)
        return self.statistics.frechet((offset + self.statistics.gaussian.mean)[None], covariance[None])[0]


class _Gathered(Metric):
    """A metric of all features or scores, which it keeps."""

    is_differentiable, full_state_update = False, False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add a batch, (batch, d); ValueError where one is not finite."""
        require_finite(values, "features")
        self.values.append(values.detach())

    def gathered(self) -> Tensor:
        """All values, on the CPU."""
        if isinstance(self.values, Tensor):
            return self.values.cpu()
        if not self.values:
            raise ValueError("no images were given: call update before compute")
        return torch.cat(self.values).cpu()


class KernelDistance(_Gathered):
    """Unbiased kernel distance to the subset of the data's features."""

    higher_is_better = False

    def __init__(self, statistics: DataStatistics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.statistics = statistics

    def compute(self) -> Tensor:
        """The distance, float64."""
        return _scalar(self.statistics.kernel(self.gathered()))


class PrecisionRecall(_Gathered):
    """Share of samples within the data's manifold, and of data within the samples'.

    Args:
        statistics: of the data.
        kwargs: of torchmetrics' Metric.
    """

    higher_is_better = True

    def __init__(self, statistics: DataStatistics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.statistics = statistics

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`, float64."""
        found = distances.precision_recall(self.gathered(), self.statistics.manifold)
        return {"precision": _scalar(found[0]), "recall": _scalar(found[1])}


class InceptionScore(_Gathered):
    """exp of the mean divergence of class probabilities from their mean; takes class scores before the softmax."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The score, float64."""
        return _scalar(distances.inception_score(self.gathered()))


class ReferenceError(Metric):
    """Errors of images to those of the reference solver from the same noises; images are not cut off."""

    is_differentiable, higher_is_better, full_state_update = False, False, False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("errors", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, reference: Tensor) -> None:
        """Add images and their reference, (batch, ...) each.

        Raises:
            ValueError: different shapes, or values that are not finite.
        """
        self.errors.append(distances.squared_errors(images, reference))

    def compute(self) -> dict[str, Tensor]:
        """`rmse`, `median`, `p99` and `worst`, see `error_figures`, and `psnr` (dB, range 2), float64.

        Raises:
            ValueError: no images.
        """
        if not len(self.errors):
            raise ValueError("no images were given: call update before compute")
        found = distances.error_figures(dim_zero_cat(self.errors))
        return {name: _scalar(value) for name, value in (found | {"psnr": distances.psnr(found["rmse"])}).items()}


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
