"""Samples as columns of least-squares problems: one problem for numbers, one per frequency band for operators."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olss.fit import Factor, solve
from solvers.space import BoundBands, Plain, Space


@dataclass(frozen=True)
class RowSolution:
    """Weights of one row (columns, *ops), root-mean-square residual, and the condition number of the worst band."""

    weights: Tensor
    error: float
    condition: float


@dataclass
class RowProblem:
    """Least squares for one row of a table: target ~ sum_j weights[j] column[j], weights of the table's space.

    With numbers every element of every sample is an equation. With bands the problem falls apart: each band has its
    own, in which every channel of a column is a column and every channel of the target is a target.

    Args:
        space: what a weight is.
        factors: triangular factor of each band: its columns, then its targets.
    """

    space: Space
    factors: list[Factor]

    @classmethod
    def empty(cls, space: Space, num_columns: int) -> "RowProblem":
        """Before any sample, for so many columns and a target."""
        bands, channels = space.ops[:2] if space.ops else (1, 1)
        return cls(space, [Factor.empty((num_columns + 1) * channels) for _ in range(bands)])

    def add(self, bound: Plain | BoundBands, columns: Sequence[Tensor], target: Tensor) -> None:
        """Add samples: equally shaped columns and their target, in the split form of `bound`."""
        measured = [bound.isometric(parts) for parts in (*columns, target)]
        for factor, *bands in zip(self.factors, *measured):
            factor.add([channel for band in bands for channel in _channels(self.space, band)])

    def solve(self, ridge: float = 0.0, prior: Tensor | None = None) -> RowSolution:
        """The weights of least error.

        Args:
            ridge: penalty on the squared distance of the weights to `prior`, in units of squared column elements.
            prior: (columns, *ops), default zero.
        """
        count = self.space.ops[1] if self.space.ops else 1
        found, squares = [], 0.0
        for band, factor in enumerate(self.factors):
            width = factor.r.shape[1] - count
            drawn = None if prior is None else _stacked(self.space, prior, band)
            solution = solve(factor, range(width), range(width, width + count), ridge, drawn)
            found.append(solution)
            squares += float(solution.error.square().sum()) * factor.num_rows
        elements = sum(factor.num_rows for factor in self.factors) * count
        weights = _unstacked(self.space, [solution.coef for solution in found])
        return RowSolution(weights, (squares / max(elements, 1)) ** 0.5, max(s.condition for s in found))


def _channels(space: Space, band: Tensor) -> Sequence[Tensor]:
    """The columns one value gives: itself for numbers, each channel for operators."""
    return band.unbind(1) if space.ops else (band,)


def _stacked(space: Space, weights: Tensor, band: int) -> Tensor:
    """Weights (columns, *ops) as the unknowns of one band, (columns * C, C): a channel matrix acts from the left."""
    return weights[:, band].transpose(-1, -2).flatten(0, 1) if space.ops else weights[:, None]


def _unstacked(space: Space, solutions: Sequence[Tensor]) -> Tensor:
    """Inverse of `_stacked` for all bands."""
    if not space.ops:
        return solutions[0][:, 0]
    channels = space.ops[1]
    return torch.stack([s.unflatten(0, (-1, channels)).transpose(-1, -2) for s in solutions], 1)
