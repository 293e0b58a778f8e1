"""The Lightning module of every method that makes solver tables of a frozen network."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from denoisers import load_denoiser, with_guidance
from solvers import DenoiserIdentity, SolverTable, identify, save_solver
from training.method import Fitting, Method, Result, Run
from training.record import upload_solver
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
        super().__init__()
        self.evaluation, self.method = evaluation, method
        trusting = partial(load_denoiser, trust_remote_code=trust_remote_code)
        load = trusting if isinstance(denoiser, str) else with_guidance
        self.denoiser = load(denoiser, guidance_scale).eval().requires_grad_(False)
        self.guidance_scale = usable_guidance or guidance_scale
        self.output = None if output is None else Path(output)
        self.anchor = nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.fitting: Fitting | None = None

    def current_tables(self) -> dict[str, SolverTable]:
        """Those of the method."""
        return self.fitting.tables() if self.fitting else {}

    def artifact_paths(self) -> dict[str, Path]:
        """NAME.json in the output."""
        return {name: self.output / f"{name}.json" for name in self.method.artifacts if self.output}

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
        self.fitting.start()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of the method."""
        self.optimizers().step()
        if not self.fitting.done and len(batch):
            self.fitting.step(batch)
        self.trainer.should_stop |= self.fitting.done

    def on_train_epoch_end(self) -> None:
        """For methods that work by epochs."""
        self.fitting.end_epoch()
        self.trainer.should_stop |= self.fitting.done

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Judge the current table."""
        if len(batch):
            self.fitting.validate(batch)

    def on_validation_epoch_end(self) -> None:
        """All has been shown."""
        self.fitting.end_validation()

    def on_train_end(self) -> None:
        """Write what is left to write."""
        self.fitting.finish()

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
            checkpoint["method"] = self.fitting.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        super().on_load_checkpoint(checkpoint)
        if self.fitting:
            self.fitting.load(checkpoint["method"])


class TrainerRun(Run):
    """A run in the processes of a trainer.

    Args:
        module: attached to its trainer.
    """

    def __init__(self, module: SolverTraining) -> None:
        super().__init__(module.denoiser, module.trainer.datamodule)
        self.module, self.trainer, self.folder = module, module.trainer, module.output
        self.device, self.precision = self.trainer.strategy.root_device, str(self.trainer.precision)
        self.rank, self.world_size = self.trainer.global_rank, self.trainer.world_size
        self.logger = self.trainer.logger
        self.shows_progress = self.rank == 0 and self.trainer.progress_bar_callback is not None

    @cached_property
    def identity(self) -> DenoiserIdentity:
        """Of the denoiser, with the guidance that artifacts may be used at."""
        return identify(self.denoiser, guidance_scale=self.module.guidance_scale)

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

    def log(self, values: dict[str, float | Tensor], bar: bool = True) -> None:
        """With Lightning."""
        self.module.log_dict(values, prog_bar=bar, batch_size=1)

    def say(self, message: str) -> None:
        """In the first process."""
        rank_zero_info(message)

    def save(self, result: Result, is_final: bool = True) -> Path | None:
        """By the first process; the last version of an artifact goes to the logger too."""
        spent = result.spent.summed(self.sum)
        if self.folder is None:
            return None
        path = self.folder / f"{result.name}.json"
        if self.rank == 0:
            save_solver(
                result.table.detach(),
                path,
                self.identity,
                method=self.module.method.name,
                fitted_on=result.fitted_on | {"evaluations": spent.record(), "seconds": self.module.fitting_seconds},
                validation=result.validation,
                config=result.config,
            )
        if is_final:
            upload_solver(self.logger, path)
        return path

    def restart_clock(self) -> None:
        """The module's, which is kept over a resume."""
        self.module.restart_clock()
