"""Progress for people in a terminal, and for logs: a line every minute."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from solvers.progress import EVERY


class Bar(RichProgressBar):
    """Lightning's bar, which counts epochs to -2 where there is no limit."""

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs == -1:
            return f"Epoch {current_epoch}".ljust(len(self.validation_description))
        return super()._get_train_description(current_epoch)


class Lines(ProgressBar):
    """A line now and then: bars fill a log with their states."""

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled, self._last = True, time.monotonic()

    def disable(self) -> None:
        """For other processes than the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Say something again."""
        self._is_enabled = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Steps, and what the bar would show."""
        steps = f"step {trainer.global_step}" + (f" of {trainer.max_steps}" if trainer.max_steps > 0 else "")
        values = self.get_metrics(trainer, pl_module).items()
        self._say(", ".join([steps, *(f"{name} {value:.4g}" for name, value in values if isinstance(value, float))]))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Batches."""
        done = trainer.predict_loop.batch_progress.current.processed
        self._say(f"batch {done} of {sum(trainer.num_predict_batches)}")

    def _say(self, text: str) -> None:
        if self._is_enabled and time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def progress() -> ProgressBar:
    """What suits the error stream."""
    return Bar() if sys.stderr.isatty() else Lines()
