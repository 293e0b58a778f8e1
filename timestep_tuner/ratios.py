"""Timesteps as ratios to those of a base table: the numbers that are tuned."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers import SolverTable


@dataclass(frozen=True, eq=False)
class Ratios:
    """The base table, told other timesteps; everything else of it stays.

        tau[i] = clamp(t_min + ratio[i] * (t[i] - t_min), t_min, t_max)

    Ratio 1 is the base table (bit for bit where t_min is 0). A timestep of t_min stays there, whatever its ratio.

    Args:
        base: the solver to tune, N rows.
        bounds: (t_min, t_max), the timesteps the network was trained on.
        free_last: also tune the last row, which the paper leaves alone.
    Raises:
        ValueError: base timesteps outside the bounds, nothing to tune, or a table that is not plain.
    Source: arXiv 2310.09469; the clamp is this project's.
    """

    base: SolverTable
    bounds: tuple[float, float]
    free_last: bool = False

    def __post_init__(self) -> None:
        self.base.require_plain("the tuner")
        low, high = self.bounds
        told = self.base.timesteps.detach()
        if bool(((told < low) | (told > high)).any()):
            raise ValueError(
                f"the base solver tells the network timesteps {told.tolist()}, it was trained on [{low}, {high}]: "
                "start from a solver inside that range"
            )
        if self.size < 1:
            raise ValueError("a solver of one evaluation has its last row alone: set free_last to tune it")

    @property
    def nfe(self) -> int:
        """Network evaluations N."""
        return self.base.nfe

    @property
    def size(self) -> int:
        """Number of ratios: N, or N - 1 with the last row fixed; ratio i belongs to row i."""
        return self.base.num_rows - (not self.free_last)

    def initial(self) -> Tensor:
        """Ones, (size,) float64."""
        return torch.ones(self.size, dtype=torch.float64)

    def timesteps(self, ratio: Tensor) -> Tensor:
        """(N,) float64 on the CPU; `ratio` (size,) float64 on the CPU.

        The value is clamped, the gradient is not, so that a ratio at its bound can come back.
        """
        original = self.base.timesteps.detach()
        low = self.bounds[0]
        told = low + ratio * (original[: self.size] - low)
        inside = told.detach().clamp(*self.bounds) + (told - told.detach())
        return torch.cat([inside, original[self.size :]])

    def table(self, ratio: Tensor) -> SolverTable:
        """The tuned table."""
        return replace(self.base, timesteps=self.timesteps(ratio))

    def project(self, ratio: Tensor) -> Tensor:
        """`ratio` moved to where the clamp does nothing."""
        low, high = self.bounds
        span = self.base.timesteps.detach()[: self.size] - low
        moves = span > 0
        highest = (high - low) / torch.where(moves, span, 1.0)
        return torch.where(moves, ratio.clamp_min(0.0).minimum(highest), ratio)
