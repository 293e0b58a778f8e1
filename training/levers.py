"""What Lightning offers and a module cannot follow is refused; the search of a batch size ends at the data."""

import copy
import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

FORMATS = ("32-true", "bf16-mixed", "16-mixed")  # in which weights stay as they are
ANOTHER = f"and a solver would be another network's: use one of {', '.join(FORMATS)}"
BATCHES = "a step sees data.batch_size samples: set that, or compute.micro_batch of the method for memory"


def check_levers(trainer: Trainer, module: LightningModule, is_resumed: bool) -> None:
    """Refuse what cannot work in a fit, before any work.

    Args:
        trainer: with its options.
        module: to be fitted.
        is_resumed: whether from a checkpoint.
    Raises:
        ValueError: an option or a callback that does not go with the module.
    """
    if _has(trainer, LearningRateFinder):
        raise ValueError("LearningRateFinder finds no rate to set here: give --model.optimizer.learning_rate")
    if _has(trainer, BatchSizeFinder) and is_resumed:
        raise ValueError("BatchSizeFinder would change the batches of the checkpoint: leave one of them out")
    if isinstance(trainer.strategy, ModelParallelStrategy) and not is_overridden("configure_model", module):
        raise ValueError(f"{type(module).__name__} shards no network: use --trainer.strategy ddp")
    if not module.automatic_optimization:
        _check_own_steps(trainer)


def _check_own_steps(trainer: Trainer) -> None:
    """Of methods that make solver tables of a frozen network."""
    refused = (
        (trainer.precision not in FORMATS, f"precision {trainer.precision} rounds the network, {ANOTHER}"),
        (trainer.accumulate_grad_batches != 1, f"accumulate_grad_batches does nothing here, {BATCHES}"),
        (
            bool(trainer.gradient_clip_val),
            "gradient_clip_val does nothing here: leave it out",
        ),
        (_has(trainer, BatchSizeFinder), f"BatchSizeFinder would change what is learned from, {BATCHES}"),
        (_has(trainer, StochasticWeightAveraging), "StochasticWeightAveraging has no weights to average here"),
    )
    for is_set, reason in refused:
        if is_set:
            raise ValueError(reason)


class BatchSizes(Callback):
    """Lets BatchSizeFinder settle: it doubles, and the samples must fill a step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The data are open."""
        for finder in trainer.callbacks:
            if isinstance(finder, BatchSizeFinder):
                aside = copy.copy(trainer.datamodule)  # which has made no loader yet, as a checkpoint would say
                samples = len(aside.train_dataloader().dataset)
                doublings = int(math.log2(max(1.0, samples / finder._init_val)))
                finder._max_trials = min(finder._max_trials, doublings + 1)


def _has(trainer: Trainer, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)
