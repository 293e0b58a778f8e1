"""Where the states of a solver lie, and what lies between two of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.table import SolverTable


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes of some states, x = alpha data + sigma noise, from noise to data.

    Args:
        alpha, sigma: (K+1,) float64.
        start_scale: the first state is start_scale times a unit noise.
    """

    alpha: Tensor
    sigma: Tensor
    start_scale: float = 1.0

    @classmethod
    def of(cls, table: SolverTable) -> "Nodes":
        """Those of all states of a table."""
        return cls(table.alpha, table.sigma, table.start_scale)

    @property
    def ends(self) -> "Nodes":
        """The first and the last alone."""
        return Nodes(self.alpha[[0, -1]], self.sigma[[0, -1]], self.start_scale)

    def between(self, alpha: Tensor, sigma: Tensor) -> tuple[int, Tensor]:
        """The state at another node from its two neighbours: (k, (2,) weights of states k-1 and k).

        Linear in x / (alpha + sigma) over sigma / (alpha + sigma), where DDIM and Euler move on straight lines;
        differentiable in the node.
        """
        norm = self.alpha + self.sigma
        position, wanted = self.sigma / norm, sigma / (alpha + sigma)
        upper = int((position > wanted.detach()).sum().clamp(1, len(norm) - 1))
        share = (wanted - position[upper - 1]) / (position[upper] - position[upper - 1])
        return upper, (alpha + sigma) * torch.stack([(1 - share) / norm[upper - 1], share / norm[upper]])
