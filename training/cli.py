"""LightningCLI with the edges taken off: one line per error, safe resume, one run folder."""

import re
from collections.abc import Iterator, Sequence
from textwrap import dedent
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from training.arguments import OneLineErrors
from training.progress import progress
from training.quiet import be_quiet
from training.run_id import forget_run
from training.safe_points import SafePoints


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
        """A run from the start is a new W&B run; one from a checkpoint goes on in the old one."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and not config.get("ckpt_path"):
            for folder in _run_folders(config.trainer.get("logger")):
                forget_run(folder)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With callbacks of our own: where it may be stopped, and what it shows."""
        given = self.config_init[self.subcommand].trainer
        callbacks = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]
        has_bar = given.enable_progress_bar is False or any(isinstance(one, ProgressBar) for one in callbacks)
        self.trainer_defaults["callbacks"] = [SafePoints(), *([] if has_bar else [progress()])]
        be_quiet()
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
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


def _run_folders(logger: Any) -> Iterator[str]:
    """Folders of the W&B loggers in the parsed `trainer.logger`: one logger, several, or a bool."""
    for one in logger if isinstance(logger, list) else [logger]:
        if hasattr(one, "class_path") and one.class_path == "training.wandb.Wandb":
            yield one.init_args.save_dir
