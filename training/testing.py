"""`train.py test`: figures of a method's current tables, by the code of `sample.py compare`."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from denoisers import network_calls
from evaluation.contenders import fitted_seeds
from evaluation.evaluate import evaluate_table, reference_images, shipped_measure
from solvers import SolverTable, default_solver, load_solver, resolve_solver
from solvers.identity import guidance_range, own_guidance
from training.clock import Clock
from training.exam import Exam, Taken
from training.record import log_errors, log_results, log_table, takes_pictures
from training.result import ResultModule


@dataclass(frozen=True)
class Evaluation:
    """What `train.py test` measures.

    Args:
        num_images: images per table; they have seeds `seed`, `seed` + 1, ...
        seed: of the first image.
        batch_size: images per network call.
        metrics: some of `evaluation.rows.METRICS`; default: what can be measured offline of so many images.
        reference: solver that RMSE and PSNR are measured against, name:steps or an artifact's path; default: the
            teacher's 100 steps.
    Raises:
        ValueError: no images, or a batch of none.
    """

    num_images: int = 256
    seed: int = 0
    batch_size: int = 64
    metrics: list[str] | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.batch_size < 1:
            raise ValueError(f"num_images {self.num_images} and batch_size {self.batch_size} must be at least 1")


class TableModule(ResultModule):
    """A module whose result is one or several solver tables.

    `train.py test --ckpt_path ...` measures the tables as they are in the checkpoint, `train.py test` alone the
    artifacts that the run has written.
    """

    denoiser: Any
    evaluation: Evaluation

    def __init__(self, output: str | Path | None = None) -> None:
        super().__init__(output)
        self.clock = Clock()

    @abstractmethod
    def current_tables(self) -> dict[str, SolverTable]:
        """Tables in memory by name; none before a fit."""

    @abstractmethod
    def artifact_paths(self) -> dict[str, Path]:
        """Where the artifacts are written, by name."""

    @abstractmethod
    def used_seeds(self) -> Sequence[Sequence[int]]:
        """Half-open ranges of the seeds of the data at hand."""

    @property
    def fitting_seconds(self) -> float:
        """Seconds of training, over resumes, or since `restart_clock`; for `fitted_on` of artifacts."""
        return round(self.clock.seconds, 3)

    def restart_clock(self) -> None:
        """The work on another table begins."""
        self.clock = Clock()

    def on_fit_start(self) -> None:
        """Start the clock, or let it go on."""
        super().on_fit_start()
        self.clock.start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the time spent."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fitting_seconds"] = self.clock.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on from it."""
        super().on_load_checkpoint(checkpoint)
        self.clock = Clock(checkpoint["fitting_seconds"])

    @property
    def reference_denoiser(self) -> Any:
        """The network of the reference, where it is not the tested one: a student's teacher."""
        return self.denoiser

    @property
    def default_reference(self) -> str:
        """The teacher."""
        return default_solver(self.denoiser.schedule)

    @cached_property
    def exam(self) -> Exam | None:
        """What the tables are ranked by, where the logger asks for it; None for a range of guidance scales."""
        wanted = self.logger.num_images if takes_pictures(self.logger) and hasattr(self.logger, "num_images") else 0
        low, high = guidance_range(own_guidance(self.reference_denoiser))
        return Exam(self.reference_denoiser, self.teacher_table(), wanted) if wanted and low == high else None

    def teacher_table(self) -> SolverTable:
        """The solver that the exam's images are compared with."""
        network = self.reference_denoiser
        return resolve_solver(self.default_reference, network.schedule, denoiser=network)

    def examine(self, name: str, table: SolverTable, spent: float) -> None:
        """Log the errors of a table.

        Args:
            name: of its artifact.
            table: the solver.
            spent: network calls that were spent on it.
        """
        if self._examines:
            taken = self._taken(name, table)
            log_errors(self.logger, f"held_out/{self._calls(table)}-calls", taken.figures, spent)

    def show_results(self) -> None:
        """Log a table of all solvers, with pictures, and the best errors."""
        tables = self.current_tables()
        if self._examines and tables:
            taken = {name: self._taken(name, table) for name, table in tables.items()}
            with self.trainer.precision_plugin.forward_context():
                found = [self.exam.row(one, self._calls(tables[name])) for name, one in taken.items()]
            log_results(self.logger, *zip(*found, strict=True))

    def _taken(self, name: str, table: SolverTable) -> Taken:
        with self.trainer.precision_plugin.forward_context():
            return self.exam.take(name, table.detach(), self.denoiser)

    def _calls(self, table: SolverTable) -> int:
        return network_calls(table, self.denoiser)

    @property
    def _examines(self) -> bool:
        """In the first process; sharded networks need all."""
        return self.exam is not None and (self.global_rank == 0 or self.device_mesh is not None)

    def tables_to_test(self) -> list[str]:
        """Names of the tables.

        Raises:
            ValueError: there is none.
        """
        self._tested = self.current_tables() or self._written()
        if not self._tested:
            where = ", ".join(map(str, self.artifact_paths().values())) or "(no output)"
            raise ValueError(f"there is no table to test: give --ckpt_path, or fit first; no artifact at {where}")
        return list(self._tested)

    def on_test_start(self) -> None:
        """The reference's images, once for all tables."""
        options = self.evaluation
        self._measure = shipped_measure(self.reference_denoiser, options.num_images, options.metrics)
        name = options.reference or self.default_reference
        network = self.reference_denoiser
        table = resolve_solver(name, network.schedule, denoiser=network)
        shown = name if self.global_rank == 0 and self.trainer.progress_bar_callback else None
        self._target: Tensor = reference_images(
            network, table, options.num_images, options.seed, options.batch_size, progress=shown
        )

    def test_step(self, batch: str, batch_idx: int) -> None:
        """Figures of one table; every process samples its share of the images."""
        options, table = self.evaluation, self._tested[batch]
        found = evaluate_table(
            self.denoiser,
            table,
            self._target,
            num_images=options.num_images,
            seed=options.seed,
            batch_size=options.batch_size,
            measure=self._measure,
            fitted_seeds=[*fitted_seeds(table), *self.used_seeds()],
        )
        self.log_dict({f"test/{batch}/{name}": value for name, value in found.items()}, batch_size=1)
        log_table(self.logger, f"test/{batch}", table)

    def _written(self) -> dict[str, SolverTable]:
        found = {name: path for name, path in self.artifact_paths().items() if path.exists()}
        if found:
            rank_zero_info(f"testing the artifacts {', '.join(map(str, found.values()))}")
        return {name: load_solver(path, denoiser=self.denoiser) for name, path in found.items()}
