"""Where a trainer can be stopped without a loss: after a batch, its state saved."""

import os
from contextlib import ExitStack
from pathlib import Path
from signal import SIGTERM
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from solvers.files import claimed
from training.signals import GRACE, stop

KEPT = {
    "predict": "shards that are written stay; run the same command again to go on",
    "validate": "nothing was changed",
    "test": "nothing was changed",
}


class SafePoints(Callback):
    """Lets `signals.stop` end a run after a batch; a fit saves a checkpoint before."""

    def __init__(self) -> None:
        self._claims = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on there is something to save; the processes that Lightning starts are running."""
        self._step, self._saved = trainer.global_step, ""
        stop.grace = GRACE if stage in ("fit", "predict") else 0.0
        stop.kept = lambda: self._kept_of_fit(trainer) if stage == "fit" else KEPT[stage]
        started = getattr(trainer.strategy.launcher, "procs", [])
        stop.children = list(started)
        started.clear()  # Lightning's own observer would kill this process without a word

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep other runs from the folder of the checkpoints."""
        callback = trainer.checkpoint_callback
        if trainer.is_global_zero and isinstance(callback, ModelCheckpoint) and callback.dirpath:
            self._claims.enter_context(claimed(callback.dirpath))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Others may write to the folder."""
        self._claims.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """See `teardown`."""
        self._claims.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has set its handlers, which send messages to other processes in the middle of anything."""
        stop.take_signals()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `on_train_start`."""
        stop.take_signals()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `on_train_start`."""
        stop.take_signals()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `on_train_start`."""
        stop.take_signals()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """All processes stop together, with one checkpoint; not while gradients are being accumulated."""
        step, self._step = self._step, trainer.global_step
        if step != self._step and trainer.strategy.reduce_boolean_decision(stop.asked is not None, all=False):
            stop.ask(SIGTERM)  # where another process was asked
            with stop.saving():
                self._save(trainer)
            stop.check()

    def on_predict_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Each process stops by itself, the batch before handed to its writer."""
        stop.check()

    def _save(self, trainer: Trainer) -> None:
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint):
            self._saved = callback.format_checkpoint_name(dict(trainer.callback_metrics))
            trainer.save_checkpoint(self._saved)

    def _kept_of_fit(self, trainer: Trainer) -> str:
        """The newest checkpoint of this run, or the one that it went on from."""
        callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        paths = [self._saved, *(path for one in callbacks for path in (one.last_model_path, one.best_model_path))]
        newest = max((path for path in paths if Path(path).is_file()), key=os.path.getmtime, default=trainer.ckpt_path)
        return f"go on with --ckpt_path {newest}" if newest else "there is no checkpoint yet; start again"
