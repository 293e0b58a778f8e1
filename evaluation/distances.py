"""Distances between two sets of features, as plain functions of tensors; the metrics and the reports use them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.parts import Parts


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,), unbiased covariance (d, d), both float64, and the number of features they are from, if it is known."""

    mean: Tensor
    covariance: Tensor
    count: int | None

    @classmethod
    def of(cls, features: Tensor | Parts) -> "Gaussian":
        """Moments of features (n, d), those of the parts put together.

        Raises:
            ValueError: fewer than two features.
        """
        if len(features) < 2:
            raise ValueError(f"{len(features)} images have no covariance: give at least 2")
        count, mean, scatter = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for part in _parts(features):
            own, total = part.double().mean(0), count + len(part)
            centred, step = part.double() - own, own - mean
            scatter = scatter + centred.T @ centred + torch.outer(step, step) * (count * len(part) / total)
            mean, count = mean + step * (len(part) / total), total
        return cls(mean, scatter / (count - 1), count)


class FrechetTo:
    """Squared Frechet distances to one fixed Gaussian, whose root is taken once, the "FID" formula.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))

    The root is taken of the symmetric product, with a symmetric eigenvalue solver, in float64.

    Args:
        target: the fixed one, usually that of the data.
    Source: arXiv 1706.08500, eq. 6.
    """

    def __init__(self, target: Gaussian) -> None:
        values, vectors = torch.linalg.eigh(target.covariance)
        self.target, self.root = target, (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    def __call__(self, means: Tensor, covariances: Tensor) -> Tensor:
        """Distances (batch,) of Gaussians with means (batch, d) and covariances (batch, d, d)."""
        inner = self.root @ covariances @ self.root
        cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp_min(0).sqrt().sum(-1)
        traces = torch.trace(self.target.covariance) + covariances.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (means - self.target.mean).square().sum(-1) + traces - 2 * cross


class KernelTo:
    """Unbiased squared maximum mean discrepancies to one set of features, "KID", over all pairs.

    The kernel is (x . y / d + 1)^3; the sum within the fixed set is taken once.

    Args:
        target: features (m, d) of the data, at least two.
        chunk: rows of a kernel matrix held at once.
    Source: arXiv 1801.01401, eq. 4; of all features instead of the mean over subsets, which has the same expectation.
    """

    def __init__(self, target: Tensor, chunk: int = 1024) -> None:
        self.target, self.chunk = target.double(), chunk
        self.within = float(self._within(self.target))

    def __call__(self, features: Tensor) -> float:
        """The distance of features (n, d), at least two."""
        return float(self.differentiable(features))

    def differentiable(self, features: Tensor) -> Tensor:
        """The same, float64 on the device of the features, with gradients to them."""
        features = features.double()
        target = self.target.to(features.device)
        across = sum(_kernel(part, target).sum() for part in features.split(self.chunk))
        return self._within(features) + self.within - 2 * across / (len(features) * len(target))

    def resampled(self, features: Tensor, counts: Tensor) -> Tensor:
        """Distances of resamplings, (repeats,): image i of features (n, d) is drawn counts[r, i] times in the r-th.

        A pair of two draws of the same image is none, so that resamplings have no bias of their own.
        """
        features, counts = features.double(), counts.double()
        number = len(features)
        within, across = torch.zeros(len(counts), dtype=torch.float64), torch.zeros(len(counts), dtype=torch.float64)
        for part, drawn in zip(features.split(self.chunk), counts.split(self.chunk, dim=1)):
            itself = (part.square().mean(1) + 1) ** 3
            within += (drawn * (counts @ _kernel(part, features).T)).sum(1) - drawn.square() @ itself
            across += drawn @ _kernel(part, self.target).mean(1) / number
        return within / (number**2 - counts.square().sum(1)) + self.within - 2 * across

    def _within(self, features: Tensor) -> Tensor:
        """Mean of the kernel over ordered pairs of different features."""
        count = len(features)
        if count < 2:
            raise ValueError(f"a kernel distance of {count} images is undefined: give at least 2")
        total = sum(_kernel(part, features).sum() for part in features.split(self.chunk))
        return (total - ((features.square().mean(1) + 1) ** 3).sum()) / (count * (count - 1))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


class Manifold:
    """Union of balls around features that reach to their k-th nearest neighbour.

    Args:
        features: (n, d), more than `neighbours`.
        neighbours: k.
    Source: arXiv 1904.06991, eq. 1.
    """

    def __init__(self, features: Tensor, neighbours: int = 3) -> None:
        if len(features) <= neighbours:
            raise ValueError(f"precision and recall need more than {neighbours} images, {len(features)} were given")
        self.features, self.neighbours = features.double(), neighbours
        parts = [_distance(part, self.features).kthvalue(neighbours + 1).values for part in self.features.split(1024)]
        self.radius = torch.cat(parts)

    def hits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """In how many balls each of features (m, d) lies, (m,), and how many of them lie in each ball, (n,)."""
        inside = [_distance(part, self.features) <= self.radius for part in features.double().split(1024)]
        return torch.cat([part.sum(1) for part in inside]), torch.stack([part.sum(0) for part in inside]).sum(0)

    def share(self, features: Tensor) -> float:
        """Share of features (m, d) that lie inside."""
        return float((self.hits(features)[0] > 0).double().mean())


def precision_recall(generated: Tensor, real: Manifold) -> tuple[float, float]:
    """Share of generated features (n, d) within the real manifold, and of real ones within the generated manifold.

    Source: arXiv 1904.06991, eq. 2.
    """
    return real.share(generated), Manifold(generated, real.neighbours).share(real.features)


def density_coverage(generated: Tensor, real: Manifold) -> tuple[float, float]:
    """Mean number of real balls around generated features (n, d) over k, and the share of real balls that hold some.

    Source: arXiv 2002.09797, eq. 3 and 4.
    """
    each, balls = real.hits(generated)
    return float(each.double().mean()) / real.neighbours, float((balls > 0).double().mean())


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Differences instead of a matrix product: a point is at distance exactly 0 from itself."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def inception_score(scores: Tensor | Parts) -> float:
    """exp of the mean divergence of class probabilities from their mean; scores (n, classes) before the softmax.

    Source: arXiv 1606.03498, section 4; over all images at once, without splits.
    """
    logs = Parts(lambda: (part.double().log_softmax(1) for part in _parts(scores)), len(scores))
    log_mean = (sum(part.exp().sum(0) for part in logs) / len(logs)).log()
    divergence = sum((part.exp() * (part - log_mean)).sum(1).sum() for part in logs) / len(logs)
    return float(divergence.exp())


def _parts(rows: Tensor | Parts) -> Parts:
    return rows if isinstance(rows, Parts) else Parts.of(rows)


def squared_errors(images: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference per image, (batch,) float64.

    Raises:
        ValueError: different shapes, or values that are not finite.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images {tuple(images.shape)} and their reference {tuple(reference.shape)} differ in shape")
    require_finite(images)
    require_finite(reference, "reference images")
    return (images.double() - reference.double()).square().flatten(1).mean(1)


def error_figures(squared: Tensor) -> dict[str, float]:
    """Root mean square, median, 99th percentile and worst of the images' errors: a mean hides its tail.

    Args:
        squared: mean squared difference per image, (batch,), at least one.
    """
    squared = squared.double()
    errors = squared.sqrt()
    return {
        "rmse": float(squared.mean().sqrt()),
        "median": float(errors.median()),
        "p99": float(errors.quantile(0.99)),
        "worst": float(errors.max()),
    }


def listed(figures: Mapping[str, float]) -> str:
    """Those of `error_figures` for people."""
    rmse, median, p99, worst = (f"{figures[name]:.4f}" for name in ("rmse", "median", "p99", "worst"))
    return f"RMSE {rmse}, median {median}, 99 % below {p99}, worst {worst}"


def psnr(rmse: float) -> float:
    """Peak signal to noise ratio in dB of images in [-1, 1]; infinity at no error."""
    return float(20 * torch.log10(2 / torch.tensor(rmse, dtype=torch.float64)))


def require_full_rank(num_images: int, num_features: int, what: str = "images") -> None:
    """Refuse a Frechet distance whose covariance cannot have full rank.

    Raises:
        ValueError: not more images than feature dimensions.
    """
    if num_images <= num_features:
        raise ValueError(
            f"{num_images} {what} are too few for a Frechet distance in {num_features} feature dimensions: their "
            f"covariance has rank {max(num_images - 1, 0)} at most, so the distance would mostly measure the number "
            f"of images; give more than {num_features} images (10 times as many for a stable figure), or leave fd out"
        )


def require_finite(images: Tensor, what: str = "images") -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: names the first image that has one.
    """
    bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(images)} {what} hold NaN or infinity, the first at index {int(bad[0])}: "
            "a metric of them would mean nothing"
        )
