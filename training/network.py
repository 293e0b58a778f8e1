"""How networks are trained here: fused AdamW, random numbers by batch, samples in the log, output at the end."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from data.loader import seed_of
from denoisers.generate import as_images, generate
from evaluation.pictures import image_grid
from solvers.table import SolverTable
from training.record import takes_pictures
from training.result import ResultModule, refuse_shorter
from training.sharded import whole


@dataclass(frozen=True)
class AdamW:
    """AdamW and its learning rate over the steps: linear warm-up, stable, then linearly to zero.

    Args:
        learning_rate: the peak.
        warmup_steps: steps of linear warm-up.
        decay_fraction: the last part of the steps after the warm-up over which the rate falls linearly to zero: 1 from
            the warm-up on, 0 for a rate that stays.
        betas: decay rates of the averages.
        weight_decay: per step, in units of the rate.
    Raises:
        ValueError: a number out of its range.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_fraction: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"learning_rate {self.learning_rate} must be positive, warmup_steps {self.warmup_steps} and "
                f"weight_decay {self.weight_decay} at least 0"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction {self.decay_fraction} must lie in [0, 1]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")

    def rate(self, step: int, total: float) -> float:
        """Rate at a step (from 0) over the peak.

        Args:
            step: from 0.
            total: steps of the run; infinite for none known, and then the rate stays.
        """
        if step < self.warmup_steps or not math.isfinite(total):
            return min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay = max(1.0, self.decay_fraction * (total - self.warmup_steps))
        return min(1.0, max(0.0, (total - step) / decay))

    def make(self, network: nn.Module) -> torch.optim.AdamW:
        """The optimiser of a network's parameters that require gradients."""
        return torch.optim.AdamW(
            [value for value in network.parameters() if value.requires_grad],
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            weight_decay=self.weight_decay,
            fused=True,
        )


class NetworkModule(ResultModule):
    """A module that trains one network and writes another, usually an average of it.

    Args:
        output: folder written at the end of training; none by default.
        optimizer: of the network.
        sample_every: steps between pictures of samples in the logger; 0: at the end alone.
        seed: of all random numbers, see `generator`.
    """

    def __init__(self, output: str | None, optimizer: AdamW, sample_every: int, seed: int) -> None:
        super().__init__(output)
        self.adamw, self.sample_every, self.seed = optimizer, sample_every, seed
        self._last_step, self._last_shown = 0, -1

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network; its parameters that require gradients are trained."""

    @property
    @abstractmethod
    def result(self) -> Any:
        """The denoiser that is shown and written."""

    @property
    def decoder(self) -> Any:
        """The denoiser that decodes what is shown."""
        return self.result

    @abstractmethod
    def sample_tables(self) -> dict[str, SolverTable]:
        """What the pictures of samples are made with, by their name in the logger."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write what was trained; every process calls it."""

    @abstractmethod
    def written_steps(self, folder: Path) -> float | None:
        """Steps of what was written into a folder; None where nothing was."""

    @property
    def left_out(self) -> set[str]:
        """Names of weights that are known without a checkpoint, which does not hold them."""
        return set()

    def after_step(self, step: int) -> None:
        """After a step of the optimiser."""

    def generator(self, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers that depend on `parts`, the seed and the process alone, so a resumed run has the same."""
        return torch.Generator(device=device).manual_seed(seed_of(*parts, self.seed, self.global_rank))

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, with a rate per step."""
        optimizer = self.adamw.make(self.trained)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Learning rate at a step over the peak."""
        total = self.trainer.estimated_stepping_batches if self.adamw.decay_fraction else math.inf
        return self.adamw.rate(step, total)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm, or each value, of the true gradients, and log them; Lightning refuses to if fused."""
        is_due = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        if not (gradient_clip_val or is_due):
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of fp16
        if scaler is not None:
            scaler.unscale_(optimizer)
        if is_due:
            self._log_step(optimizer)
        if not gradient_clip_val:
            return
        by_value = gradient_clip_algorithm == "value"
        clip = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
        clip(self.trained.parameters(), gradient_clip_val)

    def _log_step(self, optimizer: Any) -> None:
        """The norm of the gradients before they are clipped, and the learning rate."""
        found = [value.grad for value in self.trained.parameters() if value.grad is not None]
        self.log("train/gradient_norm", whole(torch.nn.utils.get_total_norm(found)))
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def on_train_start(self) -> None:
        """Steps count on from a checkpoint's."""
        super().on_train_start()
        if self.trainer.world_size > 1:
            rank_zero_info(f"{self.trainer.world_size} processes: each sees a batch of its own at every step")
        self._last_step = self.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        """Once per step of the optimiser: samples, and what a subclass adds."""
        step = self.global_step
        if step == self._last_step:  # gradients are still being accumulated
            return
        self._last_step = step
        if step % self.trainer.log_every_n_steps == 0:
            self.check_finite(self.trained)
        if self.sample_every and step % self.sample_every == 0:
            self._last_shown = step
            self.show(step)
        self.after_step(step)

    def finish(self) -> None:
        """Write the output."""
        self.check_finite(self.trained)
        self.check_output(self.global_step)
        if self.destination is not None:
            self.write(self.destination)
        if self._last_shown != self.global_step:
            self.show(self.global_step)

    def claims(self) -> list[Path]:
        """The output."""
        return [] if self.destination is None else [self.destination]

    def check_output(self, steps: float) -> None:
        """By the steps of the optimiser."""
        if self.destination is not None and not self.overwrite:
            refuse_shorter(self.destination, self.written_steps(self.destination), steps, "steps")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Never of a network that is lost."""
        self.check_finite(self.trained)
        super().on_save_checkpoint(checkpoint)
        for name in self.left_out:
            checkpoint["state_dict"].pop(name, None)  # of sharded networks only the first process has some

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another network."""
        super().on_load_checkpoint(checkpoint)
        shapes, saved = _shapes(self.state_dict()), _shapes(checkpoint.get("state_dict", {}))
        for name in sorted((shapes.keys() | saved.keys()) - self.left_out if saved else ()):
            if shapes.get(name) != saved.get(name):
                raise ValueError(
                    f"the checkpoint is of another network: {name} has shape {saved.get(name)}, here "
                    f"{shapes.get(name)}; give the network's options of the training that wrote it"
                )

    def show(self, step: int, num_images: int = 40) -> None:
        """Pictures, always from the same noises; sharded networks need all processes, others the first."""
        if not takes_pictures(self.logger) or (self.global_rank != 0 and self.device_mesh is None):
            return
        with self.trainer.precision_plugin.forward_context():
            found = {
                name: generate(self.result, table, range(num_images), batch_size=num_images)
                for name, table in self.sample_tables().items()
            }
        for name, states in found.items():
            self._log_image(name, as_images(self.decoder, states))

    @rank_zero_only
    def _log_image(self, name: str, images: Tensor) -> None:
        logger: Any = self.logger
        logger.log_image(f"pictures/{name}", [image_grid(images, columns=10)])


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}
