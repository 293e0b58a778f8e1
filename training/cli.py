"""LightningCLI with the edges taken off: one line per error, safe resume, one run folder."""

import os
import re
from collections.abc import Sequence
from textwrap import dedent
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from training.arguments import OneLineErrors
from training.checkpoints import check_named, use_checked
from training.progress import progress
from training.quiet import be_quiet
from training.result import ResultModule
from training.safe_points import SafePoints

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # how often a job was started again


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and leave with exit code 2."""
        super().error(concise(str(message)), ex)


class CLI(LightningCLI):
    """Configs in subclass mode; the command line and the config decide, never a checkpoint's hyper-parameters."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            auto_configure_optimizers=False,
            trainer_defaults={"use_distributed_sampler": False, "default_root_dir": "runs"},
        )

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there, before any work."""
        config = self.config[self.subcommand]
        check_named(config.get("ckpt_path"))
        self._overwrites = bool(config.get("overwrite"))
        if self._overwrites:
            config["overwrite"] = False  # not for those who use the saved config again

    def before_fit(self) -> None:
        """Keep longer results; a run from the start is a new W&B run, one that goes on stays in the old one."""
        trainer = self.trainer
        if isinstance(self.model, ResultModule):
            self.model.overwrite = self._overwrites
            if trainer.max_steps != -1 and not trainer.fast_dev_run:
                self.model.check_output(trainer.max_steps)
        is_restart = any(int(os.environ.get(name) or 0) for name in RESTARTS)
        if not (self.config_init.fit.ckpt_path or trainer.fast_dev_run or is_restart):
            for logger in trainer.loggers:
                if hasattr(logger, "start_anew"):
                    logger.start_anew()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With callbacks of our own, where it may stop and what it shows, and with checkpoints that are checked."""
        given = self.config_init[self.subcommand].trainer
        callbacks = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]
        has_bar = given.enable_progress_bar is False or any(isinstance(one, ProgressBar) for one in callbacks)
        self.trainer_defaults["callbacks"] = [SafePoints(), *([] if has_bar else [progress()])]
        be_quiet()
        trainer = super().instantiate_trainer(**kwargs)
        use_checked(trainer.strategy)
        return trainer

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        if subcommand == "fit":
            parser.add_argument("--overwrite", action="store_true", help="Replace what a longer training has left.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leave the arguments alone: Lightning would replace them by those saved in the checkpoint."""


def run(args: Sequence[str] | None = None) -> CLI:
    """Run the command line.

    Args:
        args: the arguments; default: those of the process.
    Raises:
        ValueError: what a user can cause, in one line.
    """
    try:
        return CLI(args)
    except (ValueError, MisconfigurationException) as error:
        raise ValueError(concise(str(error))) from error


def concise(message: str) -> str:
    """The cause in jsonargparse's error: of the lines for every type it tried, those that say something."""
    head, found, tried = message.partition("Does not validate against any of the Union subtypes")
    if not found:
        return message
    listed, _, value = tried.partition("Errors:")[2].partition("Given value type:")
    errors = [" ".join(error.split()) for error in re.split(r"(?m)^- ", dedent(listed.strip("\n"))) if error.strip()]
    causes = [error for error in errors if not error.startswith(("Expected a ", "Not a valid subclass"))]
    return head + (causes[0] if causes else f"{'; '.join(errors)}; found {value.partition('Given value:')[2].strip()}")
