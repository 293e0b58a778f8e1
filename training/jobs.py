"""A job of a cluster that is started again goes on from its own newest checkpoint.

SLURM sends SIGUSR1 before a job's time is over (`--signal=SIGUSR1@120`): the run is saved and the job asked for again.
After SIGTERM, of a preemption, SLURM does so by itself. The next start has the same job id and a restart count.
"""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from signal import SIGUSR1
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from training.checkpoints import verify
from training.signals import stop

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # how often a job was started again


class OfJob(Callback):
    """Lets checkpoints say which job wrote them."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on the command is known to be sound: a job that asks for it again makes progress."""
        stop.again = ask_again

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the job."""
        checkpoint["job"] = job()


def job() -> str | None:
    """What is the same in all processes and all starts of a job; None outside of one."""
    if SLURMEnvironment.detect():
        return f"slurm {os.environ['SLURM_JOB_ID']}"
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else f"torchrun {name}"


def is_restart() -> bool:
    """Whether this job was started before."""
    return any(int(os.environ.get(name) or 0) for name in RESTARTS)


def own_checkpoint(callbacks: Iterable[Callback]) -> str | None:
    """The newest whole checkpoint that an earlier start of this job has written; None where there is none.

    Args:
        callbacks: of the trainer; checkpoints are looked for in the folders of ModelCheckpoint.
    """
    name = job() if is_restart() else None
    if name is None:
        return None
    folders = [Path(one.dirpath) for one in callbacks if isinstance(one, ModelCheckpoint) and one.dirpath]
    found = [path for folder in folders for path in folder.glob("*.ckpt")]
    ordered = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((str(path) for path in ordered if _writer(path) == name), None)


def refuse_foreign(folder: str | os.PathLike) -> None:
    """Lightning would restore its own checkpoints of any job in SLURM.

    Raises:
        ValueError: there is one.
    """
    if SLURMEnvironment.detect() and (found := sorted(Path(folder).glob("hpc_ckpt_*.ckpt"))):
        raise ValueError(
            f"Lightning would restore {found[-1]}, of another job, unasked: move it away; a job that is started again "
            "goes on from the folder of ModelCheckpoint"
        )


def ask_again() -> str:
    """Ask SLURM to start this job once more, after SIGUSR1; says what came of it."""
    if stop.asked != SIGUSR1 or not SLURMEnvironment.detect():
        return ""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(getattr(error, "stderr", "") or error).split())
        return f"; `{' '.join(command)}` failed ({reason}), start it yourself"
    return "; the job is queued again and goes on by itself"


def _writer(path: Path) -> str | None:
    """The job that wrote a checkpoint, if it is whole."""
    try:
        verify(path)
        return torch.load(path, weights_only=True, mmap=True).get("job")
    except (ValueError, OSError, RuntimeError, UnpicklingError):
        return None
