"""The command line of `learn.py`."""

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learn.options import DTYPES, METHODS, LearnOptions
from training.arguments import OneLineErrors, fail, guarded
from training.signals import stop


class Parser(OneLineErrors, argparse.ArgumentParser):
    """argparse's parser with one-line errors."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; errors a user can cause are one line and exit code 2."""
    values = vars(_parser().parse_args(args))
    guarded(_run, values.pop("model"), values)


def _run(model: str, values: dict[str, Any]) -> None:
    import warnings

    warnings.filterwarnings("ignore")  # of libraries; what concerns the user is printed
    from learn.run import learn
    from training.stored import local

    stop.kept = lambda: f"what was recorded and learned stays in {values['output']}; run the same command to go on"
    values["teacher"] = values["teacher"] and local(values["teacher"])
    values["call"] = dict(map(_pair, values["call"]))
    values["prompts"] = None if values["prompts"] is None else _lines(Path(values["prompts"]))
    try:
        learn(model, **values)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"the disk is full ({error.filename or values['output']}): make room and run the same command again")


def _parser() -> argparse.ArgumentParser:
    defaults = LearnOptions()
    parser = Parser(prog="learn.py", description="From a model to solvers of few network calls, and a report.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="diffusers folder or hub name, DiT / SiT .pt, checkpoint, module:object")
    add(
        "--calls",
        type=int,
        nargs="+",
        metavar="N",
        default=list(defaults.calls),
        help="network calls an image, a solver each (4 6 8 10)",
    )
    add("--guidance_scale", type=float, metavar="G", help="guidance they are for (the pipeline's, else 1)")
    add("--prompts", metavar="FILE", help="text file of prompts, one a line")
    add("--output", metavar="DIR", default=defaults.output, help=f"folder to write, or to go on in ({defaults.output})")
    add("--call", nargs="+", metavar="KEY=VALUE", default=[], help="further arguments of the pipeline's call")
    add(
        "--trajectories",
        type=int,
        metavar="N",
        default=defaults.trajectories,
        help="to fit on, and as many held out (16)",
    )
    add("--teacher", metavar="NAME:STEPS", help="the slow solver (unipc:30)")
    add("--method", choices=METHODS, default=defaults.method, help="auto, or least squares alone")
    add(
        "--dtype",
        choices=DTYPES,
        default=defaults.dtype,
        help="of the network (float32); auto: bfloat16 where the device has units for it",
    )
    add("--device", default=defaults.device, metavar="D", help="cpu, cuda, cuda:1, mps (auto)")
    add("--batch_size", type=int, metavar="N", default=defaults.batch_size, help="samples in a network call (16)")
    add("--save_pipeline", metavar="DIR", help="also write a pipeline folder with the solvers in it")
    add("--trust", action="store_true", help="a denoiser.yaml may name code of your own")
    return parser


def _pair(text: str) -> tuple[str, Any]:
    """key=value, the value as JSON where it is that, else as text."""
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise ValueError(f"--call {text} is no key=value: write --call height=512 num_frames=9")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _lines(path: Path) -> list[str]:
    from denoisers.prompts import read_prompts

    return read_prompts(path)


if __name__ == "__main__":
    main(sys.argv[1:])
