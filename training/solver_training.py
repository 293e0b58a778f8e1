"""The Lightning module of every method that makes solver tables of a frozen network."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from denoisers import load_denoiser, with_guidance
from solvers import SolverTable, identify, save_solver
from solvers.files import atomic_write
from training.method import Fitting, Method, Result, Run
from training.record import log_validation, upload_solver
from training.result import recorded, refuse_shorter
from training.run_card import Origin, RunCard, about_model
from training.safe_points import ask_all
from training.signals import stop
from training.testing import Evaluation, TableModule


class SolverTraining(TableModule):
    """Runs a method; its tables become artifacts.

    A method steps by itself, so the optimiser here moves nothing: Lightning counts its steps, and DDP and checkpoints
    want a parameter.

    Args:
        denoiser: the network, or a path for `load_denoiser`; it is not trained.
        method: with its options, such as `class_path: olss.method.OLSS`.
        output: folder of the artifacts; none are written without.
        guidance_scale: uncond + guidance_scale (cond - uncond); [lowest, highest] makes tables for a range.
        usable_guidance: [lowest, highest] scale the artifacts may be used at; default: what they were made at.
        evaluation: what `train.py test` measures.
        trust_remote_code: a `denoiser.yaml` may name a class of your own, see `load_denoiser`.
    Raises:
        ValueError: a denoiser that cannot be loaded or guided; on set-up: data or options that do not fit it.
    """

    strict_loading = False

    def __init__(
        self,
        denoiser: str | nn.Module,
        method: Method,
        output: str | None = None,
        guidance_scale: float | list[float] = 1.0,
        usable_guidance: list[float] | None = None,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(output)
        self.evaluation, self.method = evaluation, method
        trusting = partial(load_denoiser, trust_remote_code=trust_remote_code)
        load = trusting if isinstance(denoiser, str) else with_guidance
        self.denoiser = load(denoiser, guidance_scale).eval().requires_grad_(False)
        usable = usable_guidance or guidance_scale
        self.identity = identify(self.denoiser, guidance_scale=usable)  # of weights not yet cast
        self.written: dict[str, str] = {}  # text of the artifacts that are final
        self._earlier: dict[str, float] = {}  # network calls that artifacts of other trainings took
        self.anchor = nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.fitting: Fitting | None = None

    def current_tables(self) -> dict[str, SolverTable]:
        """Those of the method."""
        return self.fitting.tables() if self.fitting else {}

    def artifact_paths(self) -> dict[str, Path]:
        """NAME.json in the output."""
        return {name: self.destination / f"{name}.json" for name in self.method.artifacts if self.destination}

    def claims(self) -> list[Path]:
        """The artifacts, and what the method keeps meanwhile."""
        return [*self.artifact_paths().values(), *(self.fitting.folders if self.fitting else [])]

    def stays(self) -> str:
        """Of the method."""
        return self.fitting.stays if self.fitting else ""

    @property
    def card(self) -> RunCard:
        """By the model."""
        return RunCard(self.method.name, self.identity.name or type(self.denoiser).__name__, self.method.artifacts)

    def about(self) -> dict[str, Any]:
        """With the network and the teacher."""
        return super().about() | about_model(self.identity, self.trainer.datamodule.source.record.get("teacher"))

    def origins(self) -> list[Origin]:
        """With the model."""
        return [*super().origins(), Origin.of_model(self.identity)]

    def teacher_table(self) -> SolverTable:
        """That of the trajectories, where there are some."""
        return self.trainer.datamodule.source.table or super().teacher_table()

    def made_by(self) -> dict[str, str]:
        """With the method and the network."""
        weights, guidance = self.identity.weight_hash, self.identity.guidance_scale
        network = {"network": str(weights), "guidance scale": str(guidance)}
        return super().made_by() | {"method": self.method.name} | network

    def settings(self) -> dict[str, str]:
        """The method's options and the number format: both change the numbers."""
        return self.method.settings() | {"precision": str(self.trainer.precision)}

    def used_seeds(self) -> Sequence[Sequence[int]]:
        """Those of the data."""
        return self.trainer.datamodule.seed_ranges()

    def setup(self, stage: str) -> None:
        """Let the method refuse options and data before any work."""
        if self.fitting is None:
            self.fitting = self.method.begin(TrainerRun(self))

    def on_fit_start(self) -> None:
        """The network is on its device."""
        super().on_fit_start()
        found = {
            name: recorded(path, "fitted_on", "evaluations", "calls") for name, path in self.artifact_paths().items()
        }
        self._earlier = {name: calls for name, calls in found.items() if calls is not None and not self.overwrite}
        self.fitting.start()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of the method."""
        self.optimizers().step()
        if not self.fitting.done and len(batch):
            self.fitting.step(batch)
        if self.trainer.is_last_batch:  # before a checkpoint can be written, so that none is between a step and its end
            self.fitting.end_epoch()
        self.trainer.should_stop |= self.fitting.done

    def finish(self) -> None:
        """Write what is left to write, and what a resumed run finds gone."""
        self.fitting.finish()
        for name, text in self.written.items():
            path = self.artifact_paths().get(name)
            if self.global_rank == 0 and path is not None and not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_text(text)
        self.show_results()

    def keeps(self, name: str, calls: float, is_final: bool) -> bool:
        """Whether another training's artifact stays for now.

        Raises:
            ValueError: it took more network calls than the final one that would replace it.
        """
        before = self._earlier.get(name)
        if before is not None and calls < before and not is_final:
            return True
        refuse_shorter(self.artifact_paths()[name], before, calls, "network calls")
        self._earlier.pop(name, None)
        return False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """For the count of steps alone."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The anchor: the network stays out of checkpoints."""
        return {"anchor": self.anchor.detach()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the method."""
        super().on_save_checkpoint(checkpoint)
        if self.fitting:
            checkpoint["method"], checkpoint["written"] = self.fitting.state(), self.written

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        super().on_load_checkpoint(checkpoint)
        if self.fitting:
            self.fitting.load(checkpoint["method"])
            self.written = checkpoint["written"]


class TrainerRun(Run):
    """A run in the processes of a trainer.

    Args:
        module: attached to its trainer.
    """

    def __init__(self, module: SolverTraining) -> None:
        super().__init__(module.denoiser, module.trainer.datamodule)
        self.module, self.trainer, self.folder = module, module.trainer, module.destination
        self.device, self.precision = self.trainer.strategy.root_device, str(self.trainer.precision)
        self.rank, self.world_size = self.trainer.global_rank, self.trainer.world_size
        self.logger = self.trainer.logger
        self.shows_progress = self.rank == 0 and self.trainer.progress_bar_callback is not None

    def sum(self, value: Tensor) -> Tensor:
        """By the trainer's strategy."""
        if self.world_size == 1:
            return value.cpu()
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum").cpu()

    def gather(self, value: Tensor) -> Tensor:
        """By the trainer's strategy."""
        return self.trainer.strategy.all_gather(value.to(self.device)).cpu().reshape(-1, *value.shape)

    def computing(self) -> AbstractContextManager:
        """That of the trainer's precision."""
        return self.trainer.precision_plugin.forward_context()

    def log(self, values: dict[str, float | Tensor], bar: bool = True, of_epoch: bool = False) -> None:
        """With Lightning, but a step's to the loggers from here: it repeats them in every later step of an epoch."""
        options = {"prog_bar": bar, "logger": of_epoch, "on_step": not of_epoch, "on_epoch": of_epoch}
        self.module.log_dict(values, batch_size=1, **options)
        step = self.module.global_step
        if not of_epoch and step % self.trainer.log_every_n_steps == 0:
            found = {name: float(value) for name, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(found, step=step - 1)

    def say(self, message: str) -> None:
        """In the first process."""
        rank_zero_info(message)

    def safe_point(self) -> None:
        """By the trainer's strategy."""
        ask_all(self.trainer.strategy)
        stop.check()

    def save(self, result: Result, is_final: bool = True) -> Path | None:
        """By the first process; the last version of an artifact goes to the logger too."""
        spent = result.spent.summed(self.sum)
        self.module.examine(result.name, result.table, spent.calls)
        if is_final:
            log_validation(self.logger, result.name, result.validation, spent.calls)
        if self.folder is None or self.module.keeps(result.name, spent.calls, is_final):
            return None
        path = self.folder / f"{result.name}.json"
        if self.rank == 0:
            save_solver(
                result.table.detach(),
                path,
                self.module.identity,
                method=self.module.method.name,
                fitted_on=result.fitted_on | {"evaluations": spent.record(), "seconds": self.module.fitting_seconds},
                validation=result.validation,
                config=result.config,
            )
        if is_final:
            self.module.written |= {result.name: path.read_text()} if self.rank == 0 else {}
            upload_solver(self.logger, path, self.module.card.model, self.module.origins())
        return path

    def restart_clock(self) -> None:
        """The module's, which is kept over a resume."""
        self.module.restart_clock()
