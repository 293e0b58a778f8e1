"""LightningCLI with the edges taken off: one line per error, safe resume, one run folder."""

import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from denoisers.precision import warn_of_emulated_bf16
from training.arguments import OneLineErrors
from training.checkpoints import check_named, use_checked
from training.jobs import OfJob, is_restart, own_checkpoint, refuse_foreign
from training.levers import BatchSizes, check_levers
from training.progress import progress
from training.quiet import be_quiet
from training.result import ResultModule
from training.safe_points import SafePoints
from training.stored import local_configs, local_tree

NOT_KEPT = ("config", "ckpt_path", "verbose", "weights_only", "overwrite")  # of a run's config


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors, and a help that ends with what this project adds."""

    added_help = ""

    def format_help(self) -> str:
        """Lightning's options first: there are hundreds of lines of them."""
        return f"{super().format_help()}\n{self.added_help}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and leave with exit code 2."""
        super().error(concise(str(message)), ex)


class CLI(LightningCLI):
    """Configs in subclass mode; the command line and the config decide, never a checkpoint's hyper-parameters.

    Args:
        args: the arguments; default: those of the process.
        added_help: of a subcommand, what its help says of this project's modules.
    """

    def __init__(self, args: Sequence[str] | None = None, added_help: Callable[[str], str] = lambda _: "") -> None:
        self._added_help = added_help
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:
        """With the options of a run in W&B, where one is named."""
        self.config = parser.parse_args(local_configs(sys.argv[1:] if args is None else args))

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there, before any work."""
        config = self.config[self.subcommand]
        check_named(config.get("ckpt_path"))
        if not config.get("ckpt_path"):
            refuse_foreign(config.trainer.default_root_dir or ".")
        self._overwrites = bool(config.get("overwrite"))
        if self._overwrites:
            config["overwrite"] = False  # not for those who use the saved config again
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        self._resolved = {key: value for key, value in yaml.safe_load(text).items() if key not in NOT_KEPT}
        self.config[self.subcommand] = local_tree(config)

    def before_fit(self) -> None:
        """Keep longer results; a run from the start is a new W&B run, one that goes on stays in the old one."""
        trainer = self.trainer
        ckpt_path = self.config_init.fit.ckpt_path = own_checkpoint(trainer.callbacks) or self.config_init.fit.ckpt_path
        check_levers(trainer, self.model, bool(ckpt_path))
        if isinstance(self.model, ResultModule):
            self.model.overwrite = self._overwrites
            if trainer.max_steps != -1 and not trainer.fast_dev_run:
                self.model.check_output(trainer.max_steps)
        if not (ckpt_path or trainer.fast_dev_run or is_restart()):
            for logger in trainer.loggers:
                if hasattr(logger, "start_anew"):
                    logger.start_anew()
        self._describe()

    def before_validate(self) -> None:
        """Say what is measured."""
        self._describe()

    def before_test(self) -> None:
        """Say what is measured."""
        self._describe()

    def _describe(self) -> None:
        """Name the run where it is logged, and keep its resolved config there."""
        notes = "\n".join(opening(path) for path in self.config[self.subcommand].config or [])
        for logger in self.trainer.loggers:
            if hasattr(logger, "describe") and isinstance(self.model, ResultModule):
                logger.describe(self.model.card, self._resolved, notes)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With callbacks of our own, where it may stop and what it shows, and with checkpoints that are checked."""
        given = self.config_init[self.subcommand].trainer
        callbacks = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]
        has_bar = given.enable_progress_bar is False or any(isinstance(one, ProgressBar) for one in callbacks)
        self.trainer_defaults["callbacks"] = [SafePoints(), OfJob(), BatchSizes(), *([] if has_bar else [progress()])]
        be_quiet()
        trainer = super().instantiate_trainer(**kwargs)
        if "bf16" in str(trainer.precision):
            warn_of_emulated_bf16(trainer.strategy.root_device)
        use_checked(trainer.strategy)
        return trainer

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        parser.added_help = self._added_help(subcommand)
        if subcommand == "fit":
            parser.add_argument("--overwrite", action="store_true", help="Replace what a longer training has left.")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leave the arguments alone: Lightning would replace them by those saved in the checkpoint."""


def run(args: Sequence[str] | None = None, added_help: Callable[[str], str] = lambda _: "") -> CLI:
    """Run the command line.

    Args:
        args, added_help: see `CLI`.
    Raises:
        ValueError: what a user can cause, in one line.
    """
    try:
        return CLI(args, added_help)
    except (ValueError, MisconfigurationException) as error:
        raise ValueError(concise(str(error))) from error


def opening(path: Any) -> str:
    """The comment at the top of a config."""
    lines = Path(str(path)).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))


def concise(message: str) -> str:
    """The cause in jsonargparse's error: of the lines for every type it tried, those that say something."""
    head, found, tried = message.partition("Does not validate against any of the Union subtypes")
    if not found:
        return message
    listed, _, value = tried.partition("Errors:")[2].partition("Given value type:")
    errors = [" ".join(error.split()) for error in re.split(r"(?m)^- ", dedent(listed.strip("\n"))) if error.strip()]
    causes = [error for error in errors if not error.startswith(("Expected a ", "Not a valid subclass"))]
    return head + (causes[0] if causes else f"{'; '.join(errors)}; found {value.partition('Given value:')[2].strip()}")
