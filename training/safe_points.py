"""Where a trainer can be stopped without a loss: after a batch, its state saved."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from solvers.files import claimed
from training.result import ResultModule
from training.signals import GRACE, stop

KEPT = {
    "predict": "shards that are written stay; run the same command again to go on",
    "validate": "nothing was changed",
    "test": "nothing was changed",
}


def ask_all(strategy: Strategy) -> bool:
    """Whether a process of the run was asked to stop; then all of them are. Called in all processes."""
    is_any = partial(strategy.reduce_boolean_decision, all=False)
    if not is_any(stop.asked is not None):
        return False
    stop.ask(SIGUSR1 if is_any(stop.asked == SIGUSR1) else SIGTERM)
    return True


class SafePoints(Callback):
    """Lets `signals.stop` end a run after a batch; a fit saves a checkpoint before.

    While a fit validates, this is the checkpoint of the step before, whose tensors do not change meanwhile.
    """

    def __init__(self) -> None:
        self._claims = ExitStack()
        self._before: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on there is something to save; the processes that Lightning starts are running."""
        self._step, self._saved = trainer.global_step, ""
        stop.grace = GRACE if stage in ("fit", "predict") else 0.0
        stop.kept = lambda: self._kept_of_fit(trainer, pl_module) if stage == "fit" else KEPT[stage]
        started = getattr(trainer.strategy.launcher, "procs", [])
        stop.children = list(started)
        started.clear()  # Lightning's own observer would kill this process without a word

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep other runs from the checkpoints and from what this one writes."""
        if not trainer.is_global_zero:
            return
        callback = trainer.checkpoint_callback
        places = [callback.dirpath] if isinstance(callback, ModelCheckpoint) and callback.dirpath else []
        places += pl_module.claims() if isinstance(pl_module, ResultModule) else []
        for place in dict.fromkeys(Path(one).absolute() for one in places):
            self._claims.enter_context(claimed(place))

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
        if step != self._step and ask_all(trainer.strategy):
            self._save(trainer, trainer.save_checkpoint)
            stop.check()
        is_whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)  # one process writes all of it
        validates = is_whole and trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        self._before = trainer._checkpoint_connector.dump_checkpoint() if validates else None

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Each process stops by itself; the checkpoint is known."""
        if stop.asked is not None and (known := self._before) is not None:
            self._save(trainer, lambda path: trainer.strategy.save_checkpoint(known, path))
            stop.check()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on, and changes the tensors."""
        self._before = None

    def on_predict_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Each process stops by itself, the batch before handed to its writer."""
        stop.check()

    def _save(self, trainer: Trainer, save: Callable[[str], None]) -> None:
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint):
            path = callback.format_checkpoint_name(dict(trainer.callback_metrics))
            with stop.saving():
                save(path)
            self._saved = path

    def _kept_of_fit(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """The newest checkpoint of this run, or the one that it went on from; what stays without one."""
        callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        paths = [self._saved, *(path for one in callbacks for path in (one.last_model_path, one.best_model_path))]
        newest = max((path for path in paths if Path(path).is_file()), key=os.path.getmtime, default=trainer.ckpt_path)
        if newest:
            return f"go on with --ckpt_path {newest}"
        stays = pl_module.stays() if isinstance(pl_module, ResultModule) else ""
        return f"{stays}; run the same command again to go on" if stays else "there is no checkpoint yet; start again"
