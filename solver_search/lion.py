"""Lion, the sign-momentum optimiser of the paper."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """step = -lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g.

    Args:
        params: parameters.
        lr: length of the step of every number.
        betas: (beta1, beta2), each in [0, 1).
        weight_decay: decoupled: params shrink by lr * weight_decay first.
    Raises:
        ValueError: an option out of its range.
    Source: arXiv 2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0 or not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
            raise ValueError(
                f"lr {lr} must be positive, betas {betas} in [0, 1), weight_decay {weight_decay} not negative"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self._update(value, group)
        return loss

    def _update(self, value: Tensor, group: dict) -> None:
        state = self.state[value]
        if not state:
            state["momentum"] = torch.zeros_like(value)
        (beta1, beta2), momentum = group["betas"], state["momentum"]
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.sub_(group["lr"] * torch.lerp(value.grad, momentum, beta1).sign())
        momentum.lerp_(value.grad, 1 - beta2)
