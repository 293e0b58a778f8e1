"""A batch of teacher trajectories with their nodes, and the teacher's state at any node."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherPath:
    """A batch of teacher trajectories; states[:, 0] is the start noise as the teacher scaled it.

    Args:
        states: (batch, M+1, *shape).
        alpha, sigma: nodes of the teacher's states, (M+1,) float64.
        noise: (batch, *shape), the unit noise.
        condition: of the denoiser.
    """

    states: Tensor
    alpha: Tensor
    sigma: Tensor
    noise: Tensor
    condition: Any = None

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def num_steps(self) -> int:
        """M."""
        return len(self.alpha) - 1

    @property
    def end(self) -> Tensor:
        """The teacher's images, (batch, *shape)."""
        return self.states[:, -1]

    def at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The teacher's state at a node, (batch, *shape); differentiable in the node.

        Linear between the neighbouring teacher states in x / (alpha + sigma) over sigma / (alpha + sigma), where DDIM
        and Euler move on straight lines. (The paper's release takes the nearest state, of another noise level.)
        """
        norm = self.alpha + self.sigma
        position = self.sigma / norm
        wanted = sigma / (alpha + sigma)
        upper = int((position > wanted.detach()).sum().clamp(1, self.num_steps))
        share = (wanted - position[upper - 1]) / (position[upper] - position[upper - 1])
        weights = (alpha + sigma) * torch.stack([(1 - share) / norm[upper - 1], share / norm[upper]])
        weights = weights.to(self.states)
        return weights[0] * self.states[:, upper - 1] + weights[1] * self.states[:, upper]
