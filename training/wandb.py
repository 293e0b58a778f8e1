"""W&B logging that never asks: offline when not logged in, one run id per run folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_info

from training.run_card import SPENT, RunCard
from training.run_id import new_run_id, run_id


class Wandb(WandbLogger):
    """Lightning's W&B logger for one run folder.

    Without an account (or with WANDB_MODE=offline) it writes an offline run and says so. The run id is kept in the
    run folder, so that a resumed run goes on in the same place. What is not given is what the run says of itself.

    Args:
        save_dir: the run folder.
        name: name of the run; default: model, method and network calls, `digits-dit-olss-4-6`.
        project: W&B project.
        offline: do not even try to log in.
        group: of runs; default: the model.
        job_type: default: the method.
        tags: default: model, method and network calls.
        notes: default: the comment at the top of the config.
        num_images: images that every method is measured on, see `training.exam`; 0 for none.
    Raises:
        ValueError: a negative number of images.
    """

    def __init__(
        self,
        save_dir: str,
        name: str | None = None,
        project: str = "learned-diffusion-solvers",
        offline: bool = False,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        num_images: int = 32,
    ) -> None:
        if num_images < 0:
            raise ValueError(f"num_images is {num_images}: give the number of images to measure on, 0 for none")
        self.num_images = num_images
        offline = offline or not _logged_in()
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        self._folder = save_dir
        super().__init__(
            name=name,
            save_dir=save_dir,
            project=project,
            offline=offline,
            id=run_id(save_dir),
            resume="allow",
            group=group,
            job_type=job_type,
            tags=None if tags is None else list(tags),
            notes=notes,
            allow_val_change=True,
        )

    def describe(self, card: RunCard, config: dict[str, Any], notes: str) -> None:
        """Say what the run is, before it begins.

        Args:
            card: what stands in for name, group, job type and tags that were not given.
            config: the resolved one, of which `train.py fit --config wandb:entity/project/id` makes the same run.
            notes: where none were given.
        """
        known = {
            "name": card.name,
            "group": card.model,
            "job_type": card.method,
            "tags": card.tags,
            "notes": notes or None,
        }
        given = {name: self._wandb_init.get(name) for name in known}
        self._wandb_init |= {name: value if given[name] is None else given[name] for name, value in known.items()}
        self._name = self._wandb_init["name"]
        self._wandb_init["config"] = config

    def start_anew(self) -> None:
        """Be a new run, where the folder's last one is not gone on with."""
        self._id = self._wandb_init["id"] = new_run_id(self._folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; errors are drawn over the network calls that were spent on them."""
        is_new = self._experiment is None
        run = super().experiment
        if is_new:
            run.define_metric(SPENT)
            for group in ("held_out/*", "validation/*"):
                run.define_metric(group, step_metric=SPENT, step_sync=True)
        return run

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
