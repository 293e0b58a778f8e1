"""Exponential moving average of a network's weights, kept beside it and in the checkpoint."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from training.sharded import load_whole, own_part, whole_weights


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
        self._step, self._has_begun, self._left_out = 0, False, set[str]()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the network before a module shards it: a sharded one cannot be copied."""
        if stage == "fit" or self.network is None:
            self.network, self._has_begun = average_of(getattr(pl_module, self.attribute)), False
            self._left_out = {name.removeprefix(f"{self.attribute}.") for name in getattr(pl_module, "left_out", ())}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """To the network's device."""
        assert self.network is not None
        self.network.to(pl_module.device)

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the network, unless a checkpoint had an average, which sharded networks get late."""
        self._step = trainer.global_step
        if not self._has_begun:
            for average, value in self._pairs(pl_module):
                average.copy_(value)
        self._has_begun = True

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is tested is the average, of this training or of the checkpoint, where there is one."""
        if trainer.state.fn != TrainerFn.FITTING:
            self.network = self.network.to(pl_module.device) if self._has_begun else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is validated is what is written."""
        self.on_test_start(trainer, pl_module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Follow the weights, once per optimiser step; each process those that it holds."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weight = 1 - min(self.decay, (1 + self._step) / (10 + self._step))
        for average, value in self._pairs(pl_module):
            average.lerp_(value, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the average; sharded, whole in the first process (collective)."""
        found = {} if self.network is None else whole_weights(self.network)
        return {name: value for name, value in found.items() if name not in self._left_out}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the average of a checkpoint."""
        if state and self.network is not None:
            load_whole(self.network, state)
            self._has_begun = True

    def _pairs(self, pl_module: LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        """Average and value of what this process holds of all that is trained."""
        values = dict(getattr(pl_module, self.attribute).named_parameters())
        for name, average in self.network.named_parameters():
            if values[name].requires_grad:
                yield own_part(average), own_part(values[name])


def average_of(network: nn.Module) -> nn.Module:
    """A frozen copy of a network to hold an average; what is not trained is shared, not copied."""
    frozen: dict[int, Any] = {id(value): value for value in network.parameters() if not value.requires_grad}
    return copy.deepcopy(network, frozen).eval().requires_grad_(False)


def averages(trainer: Trainer) -> list[nn.Module]:
    """The networks of EMA callbacks."""
    found = [callback.network for callback in trainer.callbacks if isinstance(callback, EMA)]
    return [network for network in found if network is not None]


def averaged_network(trainer: Trainer, default: nn.Module) -> nn.Module:
    """The EMA callback's network, or `default` when the trainer has no such callback."""
    return next(iter(averages(trainer)), default)
