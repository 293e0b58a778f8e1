"""What all trainings have in common: they leave files behind, and a checkpoint knows which training it is of."""

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from solvers.provenance import provenance
from training.record import keeps_artifacts, log_about
from training.run_card import Origin, RunCard
from training.sharded import own_part


class ResultModule(lightning.LightningModule):
    """A module whose training leaves something behind.

    Args:
        output: folder of what it leaves; nothing is written without.
    """

    kind: ClassVar[str] = "network"  # the method's name
    overwrite = False  # whether what a longer training has left may be replaced

    def __init__(self, output: str | Path | None = None) -> None:
        super().__init__()
        self.output = None if output is None else Path(output)
        self._trial: tempfile.TemporaryDirectory | None = None
        self._is_finished = True  # until a fit starts: a search of the batch size trains before
        self._figures: dict[str, float] = {}

    @property
    def destination(self) -> Path | None:
        """Where files go: the output, or under `fast_dev_run` a folder that vanishes."""
        if self.output is None or not (self._fits and getattr(self.trainer, "fast_dev_run", False)):
            return self.output
        self._trial = self._trial or tempfile.TemporaryDirectory()
        return Path(self._trial.name)

    @property
    def card(self) -> RunCard:
        """What the run is called."""
        return RunCard(self.kind, "model" if self.output is None else self.output.resolve().name)

    def about(self) -> dict[str, Any]:
        """What people ask of a run beside its options."""
        made = provenance()
        return {"git_commit": made["git_commit"], "versions": made["versions"]}

    def origins(self) -> list[Origin]:
        """What the run learns from: the trajectories, where its data are some."""
        folders = getattr(getattr(self.trainer, "datamodule", None), "folders", [])
        return [Origin.of_trajectories(Path(folder)) for folder in folders]

    def finish(self) -> None:
        """Write what was learned; in all processes, once, also where a checkpoint leaves nothing to train."""

    def check_output(self, steps: float) -> None:
        """Refuse to replace what a longer training has left.

        Args:
            steps: of this training.
        Raises:
            ValueError: there is such a result, and `overwrite` is off.
        """

    def claims(self) -> list[Path]:
        """Folders and files `*.json` that one training at a time writes."""
        return []

    def stays(self) -> str:
        """What the same command goes on from where there is no checkpoint yet; empty: nothing."""
        return ""

    def made_by(self) -> dict[str, str]:
        """What a checkpoint is of, to be told apart from others: each a short text."""
        return {"module": type(self).__name__}

    def settings(self) -> dict[str, str]:
        """What must be the same where a training is resumed, by the names of the options: each a short text."""
        return {}

    def figures(self) -> dict[str, float]:
        """What was logged last, under each name, before a resume too."""
        return self._figures | {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def on_fit_start(self) -> None:
        """A training begins, or goes on."""
        self._is_finished = False
        if keeps_artifacts(self.logger):
            log_about(self.logger, self.about(), self.origins())

    def on_train_end(self) -> None:
        """All steps have been made."""
        self._finish()

    def on_fit_end(self) -> None:
        """Lightning comes here alone where a checkpoint has all steps already."""
        if self.global_step:
            self._finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what it is of, and where it stands."""
        checkpoint["made_by"], checkpoint["settings"] = self.made_by(), self.settings()
        checkpoint["figures"] = self.figures()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another training's.

        Raises:
            ValueError: it is of another module or method, or of other settings where it is to be resumed.
        """
        _compare(checkpoint.get("made_by", {}), self.made_by(), "give one of this training")
        self._figures = checkpoint["figures"]
        if self._fits:
            _compare(checkpoint["settings"], self.settings(), "resume with the same, or start anew")

    @property
    def _fits(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def check_finite(self, network: nn.Module) -> None:
        """Stop, in all processes, at a loss or trained weights that are not finite.

        Raises:
            ValueError: they are not.
        """
        loss = self.trainer.callback_metrics.get("train/loss", torch.zeros(()))
        values = [loss, *(value.detach() for value in network.parameters() if value.requires_grad)]
        is_finite = all(bool(torch.isfinite(own_part(value)).all()) for value in values)
        if not self.trainer.strategy.reduce_boolean_decision(is_finite, all=True):
            raise ValueError(
                f"the loss ({float(loss):g}) or the network's weights are not finite after {self.global_step} steps: "
                "lower the learning rate, clip gradients, or check the data; checkpoints and outputs are as before"
            )

    def _finish(self) -> None:
        if not self._is_finished:
            self._is_finished = True
            self.finish()


def recorded(path: Path, *keys: str) -> float | None:
    """A number that stands in a JSON file under some keys; None where it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
        return float(value)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def refuse_shorter(path: Path, before: float | None, now: float, unit: str) -> None:
    """ValueError where a result is of a longer training than the one that would replace it."""
    if before is not None and now < before:
        raise ValueError(
            f"{path} is the result of {before:,.0f} {unit}, this training has {now:,.0f}: it stays as it is; choose "
            "another output, or replace it with --overwrite"
        )


def _compare(found: dict[str, str], wanted: dict[str, str], advice: str) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"the checkpoint is of {name} {found.get(name, 'unknown')}, this training of {wanted[name]}: {advice}"
            )
