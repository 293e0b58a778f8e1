"""What a searched solver is asked to match: the teacher's end point, its path, features of its images, or the data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.shards import Trajectories
from solvers import SolverTable


@dataclass(frozen=True)
class Term:
    """One part of a loss: weight * mean(rho(residual)), rho = r^2, or Huber's r^2/2, delta (|r| - delta/2).

    With `robust`, s, an image whose mean square is m counts s^2 log(1 + m / s^2) instead of m (Cauchy's loss).
    """

    weight: float
    row: int
    delta: float | None = None
    feature: bool = False
    robust: float = 0.0

    def value(self, residual: Tensor) -> Tensor:
        """The scalar."""
        if self.robust:
            return self.weight * self.robust**2 * torch.log1p(self._relative(residual)).mean()
        if self.delta is None:
            return self.weight * residual.square().mean()
        return self.weight * nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=self.delta)

    def curvature(self, residual: Tensor) -> Tensor | float:
        """Weight of a squared residual in the Gauss-Newton matrix: weight * rho'(r) / (2 r), as in reweighting."""
        if self.robust:
            share = 1 / (1 + self._relative(residual))
            return self.weight * share.reshape(-1, *[1] * (residual.ndim - 1)).expand_as(residual)
        if self.delta is None:
            return self.weight
        return 0.5 * self.weight * (self.delta / residual.abs().clamp_min(self.delta))

    def _relative(self, residual: Tensor) -> Tensor:
        """Mean square of each image over that of `robust`, (batch,)."""
        return residual.flatten(1).square().mean(1) / self.robust**2


@dataclass(frozen=True)
class SearchLoss:
    """A weighted sum of distances between a student's run and the teacher's; a weight of 0 switches a part off.

    Args:
        endpoint: mean squared error of the last state.
        path: mean squared error of every state to the teacher's at the same node, averaged over the rows.
        huber: Huber distance of the last state.
        huber_delta: where Huber's distance turns from a parabola into a line.
        feature: mean squared error of an extractor's features of the last state.
        kernel: squared kernel distance (KID) between an extractor's features of the last states and of data, unbiased;
            it knows no pairs, so that the teacher is no limit, and its images are not kept.
        robust: root mean square above which an image counts less in endpoint and path, 0 for never. Where pictures are
            sharp, a few images that end elsewhere rule a plain mean square.
    Raises:
        ValueError: a negative weight, all weights 0, huber_delta <= 0, or robust < 0.
    Source: arXiv 2505.21114, section 4.3: path 1, huber 1000, huber_delta 0.001; kernel: arXiv 2202.05830, section 3.
    """

    endpoint: float = 1.0
    path: float = 0.0
    huber: float = 0.0
    huber_delta: float = 1e-3
    feature: float = 0.0
    kernel: float = 0.0
    robust: float = 0.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("endpoint", "path", "huber", "feature", "kernel")}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(f"loss weights are {weights}: none may be negative, one must be positive")
        if self.huber_delta <= 0:
            raise ValueError(f"huber_delta is {self.huber_delta}: it must be positive")
        if not self.robust >= 0:
            raise ValueError(f"robust is {self.robust}: it must be 0 (off) or a positive root mean square")

    @property
    def needs_extractor(self) -> bool:
        """Whether images are compared by their features."""
        return self.feature > 0 or self.kernel > 0

    def terms(self, num_rows: int) -> list[Term]:
        """The parts that compare pairs, by state index."""
        terms = [Term(self.path / num_rows, row, robust=self.robust) for row in range(1, num_rows + 1)]
        terms += [Term(self.endpoint, num_rows, robust=self.robust), Term(self.huber, num_rows, delta=self.huber_delta)]
        terms.append(Term(self.feature, num_rows, feature=True))
        return [term for term in terms if term.weight]


def residual(
    term: Term, table: SolverTable, states: Sequence[Tensor], teacher: Trajectories, extractor: nn.Module | None
) -> Tensor:
    """Student minus teacher, (batch, *shape) or (batch, features), of one part of the loss."""
    target = teacher.at(table.alpha[term.row], table.sigma[term.row])
    if not term.feature:
        return states[term.row] - target
    assert extractor is not None
    return extractor(states[term.row]) - extractor(target)


def total(
    loss: SearchLoss, table: SolverTable, states: Sequence[Tensor], teacher: Trajectories, extractor: nn.Module | None
) -> Tensor:
    """The loss of a run: a scalar; gradients flow to the table."""
    terms = loss.terms(table.num_rows)
    value = sum(term.value(residual(term, table, states, teacher, extractor)) for term in terms)
    return value + loss.kernel * extractor.distance(states[-1]) if loss.kernel else value


class Features(nn.Module):
    """Features of images for the loss, differentiable: images are cut off at -1 and 1 but not rounded.

    Args:
        name: of the extractor.
        statistics: of data, a file of `evaluation.statistics`, for `distance`.
    Raises:
        ValueError: no such extractor, or no statistics that were made with it.
    """

    def __init__(self, name: str, statistics: str | None = None) -> None:
        super().__init__()
        from evaluation.extractors import load_extractor  # imports torchvision, which takes seconds
        from evaluation.statistics import load_statistics

        self.extractor = load_extractor(name)
        self.data = load_statistics(statistics, self.extractor) if statistics else None

    def forward(self, images: Tensor) -> Tensor:
        """(batch, features) of (batch, channels, height, width)."""
        return self.extractor.compute(images.float().clamp(-1, 1))[0]

    def distance(self, images: Tensor) -> Tensor:
        """Squared kernel distance, float64, of at least two images (batch, channels, height, width) to the data."""
        return self.data.kernel.differentiable(self(images))
