"""Samples as columns of least-squares problems: one problem for numbers, one per frequency band for operators."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olss.fit import Factor, solve
from solvers.space import BoundBands, Plain, Space


@dataclass(frozen=True)
class RowSolution:
    """Weights of one row (basis, *ops), root-mean-square residual, and the condition number of the worst band."""

    weights: Tensor
    error: float
    condition: float


@dataclass
class Columns:
    """States and outputs as columns, of which some approximate another with weights of a space.

    With numbers every element of every sample is an equation. With bands the problem falls apart: each band has its
    own, in which every channel of a column is a column.

    Args:
        space: what a weight is.
        factors: triangular factor of each band.
        redundant: rows of the factors for each element of a sample; above 1 for a half spectrum.
    """

    space: Space
    factors: list[Factor]
    redundant: float = 1.0

    @classmethod
    def empty(cls, space: Space, count: int) -> "Columns":
        """So many columns, before any sample."""
        bands, channels = space.ops[:2] if space.ops else (1, 1)
        return cls(space, [Factor.empty(count * channels) for _ in range(bands)])

    def add(self, bound: Plain | BoundBands, columns: Sequence[Tensor]) -> None:
        """Add samples: equally shaped columns in the split form of `bound`, which belongs to the space."""
        if isinstance(bound, BoundBands):
            self.redundant = sum(bound.numbers) / (bound.size[0] * bound.size[1])
        for factor, *bands in zip(self.factors, *(bound.isometric(parts) for parts in columns)):
            factor.add([channel for band in bands for channel in (band.unbind(1) if self.space.ops else [band])])

    def solve(self, basis: Sequence[int], target: int, ridge: float = 0.0) -> RowSolution:
        """The weights of least error with which the columns of `basis` approximate `target`.

        Args:
            ridge: penalty on squared weights, of operators on their distance to the best numbers, in units of squared
                column elements.
        """
        prior = self._numbers(basis, target) if ridge and self.space.ops else None
        solutions = [
            solve(factor, self._places(basis), self._places([target]), ridge, prior) for factor in self.factors
        ]
        squares = sum(float(s.error.square().sum()) * f.num_rows for s, f in zip(solutions, self.factors))
        weights = self._weights([solution.coef for solution in solutions])
        return RowSolution(weights, self._root_mean(squares), max(s.condition for s in solutions))

    def error(self, weights: Tensor) -> float:
        """Root-mean-square residual of given weights, (columns - 1, *ops), of all columns for the last."""
        count, squares = self._channels, 0.0
        known = weights.unbind(1) if self.space.ops else [weights]
        for factor, weight in zip(self.factors, known):
            unknowns = weight.transpose(-1, -2).flatten(0, 1) if self.space.ops else weight[:, None]
            squares += float((factor.r.cpu()[:, :-count] @ unknowns - factor.r.cpu()[:, -count:]).square().sum())
        return self._root_mean(squares)

    def _root_mean(self, squares: float) -> float:
        elements = sum(factor.num_rows for factor in self.factors) * self._channels / self.redundant
        return (squares / max(elements, 1)) ** 0.5

    @property
    def _channels(self) -> int:
        return self.space.ops[1] if self.space.ops else 1

    def _places(self, columns: Sequence[int]) -> list[int]:
        """Columns of a band's factor that belong to columns."""
        return [column * self._channels + channel for column in columns for channel in range(self._channels)]

    def _weights(self, solutions: Sequence[Tensor]) -> Tensor:
        """(basis, *ops) of the unknowns of each band, (basis * C, C): a channel matrix acts from the left."""
        if not self.space.ops:
            return solutions[0][:, 0]
        return torch.stack([s.unflatten(0, (-1, self._channels)).transpose(-1, -2) for s in solutions], 1)

    def _numbers(self, basis: Sequence[int], target: int) -> Tensor:
        """The best numbers, as the unknowns of every band: all bands and channels are equations of one problem."""
        count = self.factors[0].r.shape[1] // self._channels
        together = Factor.empty(count)
        for factor in self.factors:
            for channel in range(self._channels):
                together.add(list(factor.r[:, channel :: self._channels].unbind(1)))
        together.num_rows = sum(factor.num_rows for factor in self.factors) * self._channels
        numbers = solve(together, basis, [target]).coef[:, 0]
        return torch.kron(numbers[:, None], torch.eye(self._channels, dtype=torch.float64))
