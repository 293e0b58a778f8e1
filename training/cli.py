"""LightningCLI with the edges taken off: one line per error, safe resume, one run folder."""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


class Parser(LightningArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong without the usage text."""
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        print(f"error: {' '.join(lines)} (see --help)", file=sys.stderr)
        sys.exit(2)


class CLI(LightningCLI):
    """Configs in subclass mode; the command line and the config decide, never a checkpoint's hyper-parameters."""

    def __init__(self, args: Sequence[str] | None = None, **kwargs: Any) -> None:
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
            trainer_defaults={"use_distributed_sampler": False},
            **kwargs,
        )

    def _parse_ckpt_path(self) -> None:
        """Leave the arguments alone: Lightning would replace them by those saved in the checkpoint."""


def run(args: Sequence[str] | None = None) -> CLI:
    """Run the command line; what a user can cause ends in one line and exit code 2.

    Args:
        args: the arguments; default: those of the process.
    """
    try:
        return CLI(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
