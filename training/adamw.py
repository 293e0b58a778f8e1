"""How networks are trained here: fused AdamW with a rate per step."""

from abc import abstractmethod
from typing import Any

import lightning
import torch
from torch import nn

from training.rates import warmup_stable_decay


class AdamWModule(lightning.LightningModule):
    """A module that trains one network.

    `learning_rate` (the peak), `warmup_steps`, `decay_fraction`, `betas` and `weight_decay` are attributes of it.
    """

    learning_rate: float
    warmup_steps: int
    decay_fraction: float
    betas: tuple[float, float]
    weight_decay: float

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network; its parameters that require gradients are trained."""

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained."""
        optimizer = torch.optim.AdamW(
            [value for value in self.trained.parameters() if value.requires_grad],
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            weight_decay=self.weight_decay,
            fused=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Learning rate at a step over the peak, see `warmup_stable_decay`."""
        total = self.trainer.estimated_stepping_batches if self.decay_fraction else float("inf")
        return warmup_stable_decay(step, total, self.warmup_steps, self.decay_fraction)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm; Lightning itself refuses to with a fused optimizer."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), gradient_clip_val)
