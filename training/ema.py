"""Exponential moving average of a network's weights, kept beside it and in the checkpoint."""

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class EMA(Callback):
    """Average of `module.<attribute>` over the optimiser's steps.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that the random start is forgotten.

    Args:
        decay: weight of the past, in [0, 1).
        attribute: the module's attribute that holds the network.
    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999, attribute: str = "network") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} must lie in [0, 1)")
        self.decay, self.attribute = decay, attribute
        self.network: nn.Module | None = None
        self._step = 0
        self._restored: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the network, or take up the average of the checkpoint."""
        self.network = copy.deepcopy(getattr(pl_module, self.attribute)).eval().requires_grad_(False)
        self._step = trainer.global_step
        if self._restored is not None:
            self.network.load_state_dict(self._restored)
            self._restored = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the average of the checkpoint, so that it is what is tested."""
        if self._restored is not None:
            self.on_fit_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is validated is what is written."""
        self.on_test_start(trainer, pl_module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Follow the weights, once per optimiser step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weight = 1 - min(self.decay, (1 + self._step) / (10 + self._step))
        for average, value in zip(self.network.parameters(), getattr(pl_module, self.attribute).parameters()):
            average.lerp_(value, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return {} if self.network is None else self.network.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Keep the averaged weights until the network exists."""
        self._restored = state or None


def averaged_network(trainer: Trainer, default: nn.Module) -> nn.Module:
    """The EMA callback's network, or `default` when the trainer has no such callback."""
    networks = [callback.network for callback in trainer.callbacks if isinstance(callback, EMA)]
    return networks[0] if networks and networks[0] is not None else default
