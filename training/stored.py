"""What lies in W&B, brought here: `wandb:entity/project/name:alias` for a solver, `wandb:entity/project/id` for a run.

Imports next to nothing, so that a command line is there at once.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from solvers.files import atomic_write

FOLDER = Path("runs/wandb")
SOLVER = re.compile(r"wandb:((?:[\w.-]+/){0,2}[\w.-]+:[\w.-]+)")
RUN = re.compile(r"(--config=)?wandb:([\w.-]+/[\w.-]+/[\w.-]+)")


def local(text: str) -> str:
    """A text in which every `wandb:entity/project/name:alias` is the path of the solver that lies there.

    Raises:
        ValueError: W&B does not give it, or it is not one solver.
    """
    return SOLVER.sub(lambda found: str(solver(found[1])), text)


def local_tree(value: Any) -> Any:
    """Options, with all texts in them as `local` makes them."""
    if isinstance(value, str):
        return local(value)
    if isinstance(value, list | tuple):
        return type(value)(map(local_tree, value))
    if hasattr(value, "items"):
        for name, one in list(value.items()):
            value[name] = local_tree(one)
    return value


def local_configs(args: Sequence[str]) -> list[str]:
    """Arguments, in which `wandb:entity/project/id` is the file of that run's options."""
    found = [(RUN.fullmatch(one), one) for one in args]
    return [f"{run[1] or ''}{config(run[2])}" if run else one for run, one in found]


def solver(address: str) -> Path:
    """The path of a solver artifact, downloaded once for each of its versions.

    Args:
        address: entity/project/name:alias; without an entity or a project W&B's defaults stand for them.
    Raises:
        ValueError: W&B does not give it, or it is not one solver.
    """
    with _asking(address) as api:
        artifact = api.artifact(address)
        folder = FOLDER / "-".join([*address.partition(":")[0].split("/")[:-1], artifact.name.replace(":", "-")])
        if not folder.is_dir():
            _download(artifact, folder)
    found = sorted(folder.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in folder.iterdir()) or "nothing"
        raise ValueError(f"wandb:{address} holds {names}: give an artifact that holds one solver, NAME.json")
    return found[0]


def config(address: str) -> Path:
    """A file with the options that a run had.

    Args:
        address: entity/project/id.
    Raises:
        ValueError: W&B does not give it, or no run of `train.py fit` is there.
    """
    import yaml

    from training.run_card import ABOUT

    with _asking(address) as api:
        values = {name: value for name, value in dict(api.run(address).config).items() if name != ABOUT}
    if "model" not in values or "trainer" not in values:
        raise ValueError(f"wandb:{address} has no options of train.py: give a run that it has logged")
    path = FOLDER / f"{address.replace('/', '-')}.yaml"
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _download(artifact: Any, folder: Path) -> None:
    """Whole or not at all, also where other processes do the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
    try:
        artifact.download(root=temporary)
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _asking(address: str) -> Any:
    try:
        import wandb
        import wandb.errors
    except ModuleNotFoundError as error:
        raise ValueError(f"wandb:{address} needs the package wandb: install it, or give a path") from error
    try:
        yield wandb.Api()
    except (wandb.errors.Error, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"W&B does not give wandb:{address} ({reason}): check the name and the login, or give a path"
        ) from error
