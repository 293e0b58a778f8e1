"""W&B logging that never asks: offline when not logged in, one run id per run folder."""

import os
from pathlib import Path

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from training.run_id import new_run_id, run_id


class Wandb(WandbLogger):
    """Lightning's W&B logger for one run folder.

    Without an account (or with WANDB_MODE=offline) it writes an offline run and says so. The run id is kept in the
    run folder, so that a resumed run goes on in the same place.

    Args:
        save_dir: the run folder.
        name: name of the run; default: the folder's name.
        project: W&B project.
        offline: do not even try to log in.
    """

    def __init__(
        self,
        save_dir: str,
        name: str | None = None,
        project: str = "learned-diffusion-solvers",
        offline: bool = False,
    ) -> None:
        offline = offline or not _logged_in()
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        self._folder = save_dir
        super().__init__(
            name=name or Path(save_dir).resolve().name,
            save_dir=save_dir,
            project=project,
            offline=offline,
            id=run_id(save_dir),
            resume="allow",
        )

    def start_anew(self) -> None:
        """Be a new run, where the folder's last one is not gone on with."""
        self._id = self._wandb_init["id"] = new_run_id(self._folder)

    @property
    def save_dir(self) -> str:
        """The run folder, where the trainer keeps its checkpoints too."""
        return self._folder


def _logged_in() -> bool:
    """Whether W&B can be used online; says so when not."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if (os.environ.get("WANDB_API_KEY") or wandb.api.api_key) and wandb.login(prompt=False):
        return True
    rank_zero_info(
        "W&B: not logged in, so the run is kept offline; `wandb login` first, or `wandb sync` its folder later"
    )
    return False
