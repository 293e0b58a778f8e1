"""OLSS as a LightningModule: one epoch per table row, for all requested numbers of evaluations at once."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from data.shards import Trajectories, seed_ranges
from denoisers import load_denoiser
from olss.data import FitTrajectories, Unit
from olss.fit import Factor
from olss.path import check_nfe, check_path, greedy_path, log_snr_path, uniform_path
from olss.record import held_out_error, save_student
from olss.search import PathSearch
from olss.store import OutputStore
from olss.student import (
    BASES,
    Fit,
    check_teacher,
    fit_on_teacher,
    next_output,
    row_columns,
    row_width,
    solve_row,
    teacher_columns,
)
from solvers.table import SolverTable
from training.testing import Evaluation, TableModule

PATHS = ("uniform", "log_snr", "greedy", "search")


class OLSS(TableModule):
    """Learns solvers of few evaluations from a teacher's cached trajectories, by least squares.

    The student basis takes one epoch per row; the teacher basis and the greedy path take one epoch before, which
    collects the triangular factor of all trajectories. Processes share the trajectories; factors are merged at the
    end of each epoch. Training stops by itself when every student is complete, and writes one artifact each.

    Args:
        denoiser: the teacher's network, or a path for `load_denoiser`.
        output: folder of the artifacts `olss-<nfe>.json`.
        nfe: numbers of evaluations to learn a solver for, each 1 to the teacher's steps.
        basis: `student`: a row's basis holds the student's own outputs; `teacher`: the teacher's, as in the paper.
        path: which teacher states the student visits. `uniform` in the index; `log_snr`: uniform in log(alpha / sigma);
            `greedy`: the paper's search; `search`: the best of several on held-out trajectories, then local moves;
            or the indices themselves, for a single nfe.
        ridge: penalty on the coefficients, mean squared error + ridge * sum of squares.
        search_trajectories: trajectories that `search` fits each candidate on.
        search_rounds: rounds of local moves of `search`.
        guidance_scale: guidance of a denoiser given by its path; must be that of the trajectories.
        evaluation: what `train.py test` measures.
    Raises:
        ValueError: an option out of its range, or a denoiser that cannot be loaded; when training starts: trajectories
            of another denoiser or of a stochastic teacher.
    Source: arXiv 2305.14677; the student basis is this project's.
    """

    def __init__(
        self,
        denoiser: str | nn.Module,
        output: str,
        nfe: list[int] | int = 8,
        basis: str = "student",
        path: str | list[int] = "greedy",
        ridge: float = 0.0,
        search_trajectories: int = 64,
        search_rounds: int = 1,
        guidance_scale: float = 1.0,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.evaluation = evaluation
        _check_options(basis, path, ridge, nfe)
        self.denoiser = load_denoiser(denoiser, guidance_scale) if isinstance(denoiser, str) else denoiser
        self.output, self.nfes = Path(output), sorted({nfe} if isinstance(nfe, int) else set(nfe))
        self.basis, self.path, self.ridge = basis, path, ridge
        self.search_trajectories, self.search_rounds = search_trajectories, search_rounds
        self.anchor = nn.Parameter(torch.zeros(()))  # DDP and checkpoints need a parameter and an optimiser
        self.automatic_optimization = False
        self.strict_loading = False
        self.fits: dict[int, Fit] = {}
        self.validation: dict[int, float] = {}
        self._factors: dict[int, Factor] = {}  # plain attributes: DDP would overwrite buffers by those of rank 0
        self._store = OutputStore(self.output / "student-outputs")

    @property
    def data(self) -> FitTrajectories:
        """The trajectories."""
        return self.trainer.datamodule

    @property
    def teacher(self) -> SolverTable:
        """The teacher's table."""
        return self.data.cache.table

    def table(self, nfe: int) -> SolverTable:
        """A finished student as a solver table."""
        return self.fits[nfe].table(self.teacher)

    def current_tables(self) -> dict[str, SolverTable]:
        """The finished students."""
        return {f"olss-{nfe}": self.table(nfe) for nfe, fit in self.fits.items() if fit.complete}

    def artifact_paths(self) -> dict[str, Path]:
        """olss-<nfe>.json."""
        return {f"olss-{nfe}": self.output / f"olss-{nfe}.json" for nfe in self.nfes}

    def used_seeds(self) -> list[list[int]]:
        """Those of the trajectories."""
        return seed_ranges(sorted(self.data.cache.seeds))

    def on_fit_start(self) -> None:
        """Check the trajectories; take up the paths that need nothing of them."""
        self.denoiser.eval().requires_grad_(False)
        self.data.cache.check(self.denoiser)
        check_teacher(self.teacher)
        for nfe in self.nfes:
            check_nfe(nfe, self.teacher.nfe)
        if self.trainer.max_epochs == -1:
            self.trainer.fit_loop.max_epochs = self._num_epochs
        if not self.fits and self.basis == "student" and self.path not in ("greedy", "search"):
            self.fits = {nfe: Fit(self._plain_path(nfe)) for nfe in self.nfes}

    def on_train_epoch_start(self) -> None:
        """Empty factors for the rows of this epoch; the whole teacher's as long as there is no path."""
        widths = {nfe: row_width(fit) for nfe, fit in self.fits.items() if not fit.complete}
        widths = widths if self.fits else {0: 2 * self.teacher.nfe + 1}
        self._factors = {nfe: Factor.empty(width) for nfe, width in widths.items()}

    def training_step(self, batch: Unit, batch_idx: int) -> None:
        """Add a batch to the factors; the optimiser only counts steps."""
        name, trajectories = batch
        self.optimizers().step()
        if trajectories is None:
            return
        for nfe, factor in self._factors.items():
            factor.add(self._columns(name, trajectories, self.fits[nfe]) if nfe else teacher_columns(trajectories))

    def on_train_epoch_end(self) -> None:
        """Merge the factors of all processes and solve the rows; stop when all students are complete."""
        for nfe, factor in self._factors.items():
            self._merge(factor)
            if nfe:
                self.fits[nfe].append(solve_row(factor, self.ridge))
            else:
                self._begin(factor)
        for nfe, fit in self.fits.items():
            self._log_row(nfe, fit)
            if fit.complete and nfe not in self.validation:
                self.validation[nfe] = held_out_error(self, fit)
                rank_zero_info(f"OLSS, {nfe} evaluations: path {fit.path}, held-out RMSE {self.validation[nfe]:.4f}")
        self._factors = {}
        self.trainer.should_stop = self._done

    def on_train_end(self) -> None:
        """Write the artifacts and drop the student's outputs."""
        if self._done and self.global_rank == 0:
            for nfe in self.nfes:
                save_student(self, nfe)
            self._store.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimiser that changes nothing, for the count of steps that checkpoints go by."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The anchor alone: the teacher stays out of checkpoints."""
        return {"anchor": self.anchor.detach()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The rows found so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["olss"] = {"fits": {nfe: vars(fit) for nfe, fit in self.fits.items()}, "validation": self.validation}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the rows of the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["olss"]
        self.fits = {nfe: Fit(**fit) for nfe, fit in state["fits"].items()}
        self.validation = dict(state["validation"])

    @property
    def _num_epochs(self) -> int:
        """One for the teacher's factor, if it is needed, and one per row of the longest student."""
        rows = max(self.nfes) if self.basis == "student" else 0
        return rows + (self.basis == "teacher" or self.path in ("greedy", "search"))

    @property
    def _done(self) -> bool:
        return bool(self.fits) and all(fit.complete for fit in self.fits.values())

    def _plain_path(self, nfe: int) -> list[int]:
        """A path that is given or follows from the teacher's nodes."""
        if isinstance(self.path, list):
            return check_path(self.path, self.teacher.nfe)
        return uniform_path(self.teacher.nfe, nfe) if self.path == "uniform" else log_snr_path(self.teacher, nfe)

    def _columns(self, name: str, trajectories: Trajectories, fit: Fit) -> list[Tensor]:
        """Columns of the next row; the student's outputs come from disk as far as they are there."""
        outputs = self._store.load(name, fit, trajectories.outputs[:, 0])
        while len(outputs) <= len(fit.coefs):
            outputs.append(next_output(self.denoiser, self.teacher, trajectories, fit, outputs))
            self._store.save(name, fit, len(outputs) - 1, outputs[-1])
        return row_columns(trajectories, fit, outputs)

    def _merge(self, factor: Factor) -> None:
        """Factor of the rows of all processes."""
        rows = self.all_gather(torch.tensor(factor.num_rows, device=self.device))
        factor.merge(self.all_gather(factor.r.to(self.device)).cpu(), int(rows.sum()))

    def _begin(self, factor: Factor) -> None:
        """Paths from the teacher's factor; with the teacher basis all rows too."""
        steps = self.teacher.nfe
        for nfe in self.nfes:
            searched = self.path in ("greedy", "search")
            path = greedy_path(factor, steps, nfe, self.ridge) if searched else self._plain_path(nfe)
            if self.basis == "teacher":
                self.fits[nfe] = fit_on_teacher(factor, path, steps, self.ridge)
            else:
                self.fits[nfe] = Fit(self._searched(nfe, path) if self.path == "search" else path)

    def _searched(self, nfe: int, greedy: list[int]) -> list[int]:
        """The best path on the held-out trajectories; processes share the candidates."""
        fitted = self.data.fitted(self.search_trajectories).to(self.device)
        search = PathSearch(
            self.network,
            self.teacher,
            fitted,
            self.data.held_out().to(self.device),
            self.ridge,
            self.global_rank,
            self.trainer.world_size,
            lambda scores: self.all_gather(scores.to(self.device)).reshape(-1, len(scores)).sum(0).cpu(),
            progress=self.global_rank == 0 and self.trainer.progress_bar_callback is not None,
        )
        return search.best(nfe, [greedy], self.search_rounds)[0]

    @torch.no_grad()
    def network(self, *arguments: Any) -> Tensor:
        """The denoiser in the trainer's precision, for hooks that Lightning does not run in it."""
        with self.trainer.precision_plugin.forward_context():
            return self.denoiser(*arguments)

    def _log_row(self, nfe: int, fit: Fit) -> None:
        """The newest row's figures, in the bar and in the log."""
        if fit.errors:
            self.log(f"nfe-{nfe}/row_error", fit.errors[-1], prog_bar=True, rank_zero_only=True)
            self.log(f"nfe-{nfe}/condition", fit.conditions[-1], rank_zero_only=True)


def _check_options(basis: str, path: str | list[int], ridge: float, nfe: int | list[int]) -> None:
    if basis not in BASES:
        raise ValueError(f"unknown basis {basis!r}: use one of {', '.join(BASES)}")
    if isinstance(path, str) and path not in PATHS:
        raise ValueError(f"unknown path {path!r}: use one of {', '.join(PATHS)}, or a list of indices")
    if isinstance(path, list) and [len(path)] != ([nfe] if isinstance(nfe, int) else list(nfe)):
        raise ValueError(f"a path of {len(path)} indices is for nfe {len(path)}, asked for is {nfe}")
    if path == "search" and basis == "teacher":
        raise ValueError("path search fits students on their own outputs: use basis student, or path greedy")
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}: it must be 0 or more")
