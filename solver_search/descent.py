"""How the numbers of a search move."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.arguments import check_choice

OPTIMIZERS = ("lm", "lbfgs", "lion", "adam")


@dataclass(frozen=True)
class Descent:
    """How the numbers of a stage move.

    Args:
        optimizer: `lm` (Levenberg-Marquardt); `lbfgs`, in coordinates in which the weights of a start are well
            conditioned, for operators too; `lion` or `adam`.
        learning_rate: of lion and adam, at the first step.
        steps: optimiser steps of a stage.
        whiten: lion and adam move in the coordinates of lbfgs, too.
        decay: their learning rate falls linearly to zero.
        tolerance: a stage of Levenberg-Marquardt ends when a step lowers the loss by a smaller share.
    Raises:
        ValueError: an option out of its range.
    """

    optimizer: str = "lm"
    learning_rate: float = 0.01
    steps: int = 8
    tolerance: float = 1e-3
    whiten: bool = False
    decay: bool = False

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.learning_rate <= 0 or self.steps < 1:
            raise ValueError(f"learning_rate {self.learning_rate} and steps {self.steps} must be positive")
        if (self.whiten or self.decay) and self.optimizer not in ("lion", "adam"):
            raise ValueError(f"whiten and decay are for lion and adam: leave them out with {self.optimizer}")

    @property
    def whitens(self) -> bool:
        """Whether the numbers move in well conditioned coordinates."""
        return self.whiten or self.optimizer == "lbfgs"

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0, where it decays."""
        return self.learning_rate * (1 - step / self.steps)

    def make(self, theta: Tensor) -> torch.optim.Optimizer | None:
        """The optimiser of a stage; Levenberg-Marquardt has none."""
        if self.optimizer == "lm":
            return None
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS([theta], max_iter=1, max_eval=20, history_size=30, line_search_fn="strong_wolfe")
        if self.optimizer == "adam":
            return torch.optim.Adam([theta], lr=self.learning_rate)
        from timm.optim import Lion  # imports torchvision, which takes seconds

        return Lion([theta], lr=self.learning_rate)
