"""OLSS as a method: one epoch per table row, for all requested numbers of evaluations at once."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from data.shards import Trajectories, seed_ranges
from data.teacher_data import Wanted
from denoisers import Counted, Evaluations
from olss.fit import Factor
from olss.path import check_nfe, check_path, greedy_path, log_snr_path, uniform_path
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
from solvers import SolverTable, sample
from training.method import Fitting, Method, Result, Run
from training.record import log_table

PATHS = ("uniform", "log_snr", "greedy", "search")


@dataclass(frozen=True)
class OLSS(Method):
    """Learns solvers of few evaluations from a teacher's cached trajectories, by least squares.

    The student basis takes one epoch per row; the teacher basis and the greedy path take one epoch before, which
    collects the triangular factor of all trajectories. Processes share the trajectories; factors are merged at the
    end of each epoch. Training stops by itself when every student is complete.

    Args:
        nfe: numbers of evaluations to learn a solver for, each 1 to the teacher's steps.
        basis: `student`: a row's basis holds the student's own outputs; `teacher`: the teacher's, as in the paper.
        path: which teacher states the student visits. `uniform` in the index; `log_snr`: uniform in log(alpha / sigma);
            `greedy`: the paper's search; `search`: the best of several on held-out trajectories, then local moves;
            or the indices themselves, for a single nfe.
        ridge: penalty on the coefficients, mean squared error + ridge * sum of squares.
        search_trajectories: trajectories that `search` fits each candidate on.
        search_rounds: rounds of local moves of `search`.
    Raises:
        ValueError: an option out of its range.
    Source: arXiv 2305.14677; the student basis is this project's.
    """

    nfe: int | list[int] = 8
    basis: str = "student"
    path: str | list[int] = "greedy"
    ridge: float = 0.0
    search_trajectories: int = 64
    search_rounds: int = 1

    name: ClassVar[str] = "olss"
    wanted: ClassVar[Wanted] = Wanted("path", batch_size=32, in_order=True)

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise ValueError(f"unknown basis {self.basis!r}: use one of {', '.join(BASES)}")
        if isinstance(self.path, str) and self.path not in PATHS:
            raise ValueError(f"unknown path {self.path!r}: use one of {', '.join(PATHS)}, or a list of indices")
        if isinstance(self.path, list) and [len(self.path)] != self.nfes:
            raise ValueError(f"a path of {len(self.path)} indices is for nfe {len(self.path)}, asked for is {self.nfe}")
        if isinstance(self.path, list) and self.path[0] != 0:
            raise ValueError(f"path {self.path} must start at 0, the teacher's start noise")
        if self.path == "search" and self.basis == "teacher":
            raise ValueError("path search fits students on their own outputs: use basis student, or path greedy")
        if not self.ridge >= 0:
            raise ValueError(f"ridge is {self.ridge}: it must be 0 or more")

    @property
    def nfes(self) -> list[int]:
        """The numbers of evaluations, ascending."""
        return sorted({self.nfe} if isinstance(self.nfe, int) else set(self.nfe))

    @property
    def artifacts(self) -> list[str]:
        """olss-<nfe>."""
        return [f"olss-{nfe}" for nfe in self.nfes]

    @property
    def needs_factor(self) -> bool:
        """Whether the path or the rows come from all of the teacher's columns."""
        return self.basis == "teacher" or self.path in ("greedy", "search")

    def begin(self, run: Run) -> "Students":
        """No row fitted yet."""
        return Students(self, run)

    def plain_path(self, nfe: int, teacher: SolverTable) -> list[int]:
        """A path that is given or follows from the teacher's nodes."""
        if isinstance(self.path, list):
            return check_path(self.path, teacher.nfe)
        return uniform_path(teacher.nfe, nfe) if self.path == "uniform" else log_snr_path(teacher, nfe)


class Students(Fitting):
    """The students of a run.

    Args:
        options: what to learn.
        run: its data hold whole trajectories.
    Raises:
        ValueError: a stochastic teacher, one of too few steps, no folder or nothing held out.
    """

    def __init__(self, options: OLSS, run: Run) -> None:
        self.options, self.run = options, run
        self.teacher: SolverTable = run.data.source.table
        check_teacher(self.teacher)
        for nfe in options.nfes:
            check_nfe(nfe, self.teacher.nfe)
        if run.folder is None or not run.data.source.num_held:
            raise ValueError("students are judged on trajectories held out, and kept on disk: set holdout and output")
        self.fits: dict[int, Fit] = {}
        if not options.needs_factor:
            self.fits = {nfe: Fit(options.plain_path(nfe, self.teacher)) for nfe in options.nfes}
        self.validation: dict[int, float] = {}
        self.spent = {nfe: Evaluations.of(run.denoiser) for nfe in options.nfes}
        self._store = OutputStore(run.folder / "student-outputs")
        self._factors = self._empty_factors()

    @property
    def done(self) -> bool:
        """Whether every student is complete."""
        return bool(self.fits) and all(fit.complete for fit in self.fits.values())

    def tables(self) -> dict[str, SolverTable]:
        """The finished students."""
        return {f"olss-{nfe}": fit.table(self.teacher) for nfe, fit in self.fits.items() if fit.complete}

    def step(self, batch: Any) -> None:
        """Add a batch to the factors."""
        trajectories = batch[:]
        for nfe, factor in self._factors.items():
            factor.add(self._columns(trajectories, nfe) if nfe else teacher_columns(trajectories))

    def end_epoch(self) -> None:
        """Merge the factors of all processes and solve the rows."""
        with torch.no_grad(), self.run.computing():
            for nfe, factor in self._factors.items():
                rows = self.run.sum(torch.tensor(factor.num_rows))
                factor.merge(self.run.gather(factor.r), int(rows))
                if nfe:
                    self.fits[nfe].append(solve_row(factor, self.options.ridge))
                else:
                    self._begin_students(factor)
            for nfe, fit in self.fits.items():
                self._report(nfe, fit)
        self._factors = self._empty_factors()

    def finish(self) -> None:
        """Write the artifacts and drop the students' outputs."""
        if not self.done:
            return
        for nfe in self.options.nfes:
            self.run.save(self._result(nfe))
            log_table(self.run.logger, f"olss-{nfe}", self.fits[nfe].table(self.teacher))
        if self.run.rank == 0:
            self._store.clear()

    def state(self) -> dict[str, Any]:
        """Rows, figures and counts; of an epoch that is not over, every process's factors."""
        factors = {
            nfe: [self.run.gather(f.r), self.run.gather(torch.tensor(f.num_rows))] for nfe, f in self._factors.items()
        }
        return {
            "fits": {nfe: vars(fit) for nfe, fit in self.fits.items()},
            "validation": self.validation,
            "spent": {nfe: vars(spent) for nfe, spent in self.spent.items()},
            "factors": factors,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on there, on as many processes."""
        self.fits = {nfe: Fit(**fit) for nfe, fit in state["fits"].items()}
        self.validation = dict(state["validation"])
        self.spent = {nfe: Evaluations(**spent) for nfe, spent in state["spent"].items()}
        rank = self.run.rank
        self._factors = {nfe: Factor(r[rank], int(rows[rank])) for nfe, (r, rows) in state["factors"].items()}

    def _empty_factors(self) -> dict[int, Factor]:
        """For the rows of an epoch; the whole teacher's, as 0, as long as there is no path."""
        widths = {nfe: row_width(fit) for nfe, fit in self.fits.items() if not fit.complete}
        widths = widths if self.fits else {0: 2 * self.teacher.nfe + 1}
        return {nfe: Factor.empty(width) for nfe, width in widths.items()}

    def _columns(self, trajectories: Trajectories, nfe: int) -> list[Tensor]:
        """Columns of the next row; the student's outputs come from disk as far as they are there."""
        fit, seeds = self.fits[nfe], trajectories.seeds
        outputs = self._store.load(seeds, fit, trajectories.outputs[:, 0])
        while len(outputs) <= len(fit.coefs):
            outputs.append(next_output(self._network(nfe), self.teacher, trajectories, fit, outputs))
            self._store.save(seeds, fit, len(outputs) - 1, outputs[-1])
        return row_columns(trajectories, fit, outputs)

    def _begin_students(self, factor: Factor) -> None:
        """Paths from the teacher's factor; with the teacher basis all rows too."""
        options, steps = self.options, self.teacher.nfe
        for nfe in options.nfes:
            searched = options.path in ("greedy", "search")
            path = greedy_path(factor, steps, nfe, options.ridge) if searched else options.plain_path(nfe, self.teacher)
            if options.basis == "teacher":
                self.fits[nfe] = fit_on_teacher(factor, path, steps, options.ridge)
            else:
                self.fits[nfe] = Fit(self._searched(nfe, path) if options.path == "search" else path)

    def _searched(self, nfe: int, greedy: list[int]) -> list[int]:
        """The best path on the held-out trajectories; processes share the candidates."""
        options, run = self.options, self.run
        search = PathSearch(
            self._network(nfe),
            self.teacher,
            run.data.fitted(options.search_trajectories).to(run.device),
            run.data.held_out().to(run.device),
            options.ridge,
            run.rank,
            run.world_size,
            run.sum,
            progress=run.shows_progress,
        )
        return search.best(nfe, [greedy], options.search_rounds)[0]

    def _network(self, nfe: int) -> Counted:
        """The denoiser, counted for one student."""
        return Counted(self.run.denoiser, self.spent[nfe])

    def _report(self, nfe: int, fit: Fit) -> None:
        """Figures of the newest row, and of the student once it is complete."""
        if fit.errors:
            self.run.log({f"nfe-{nfe}/row_error": fit.errors[-1]})
            self.run.log({f"nfe-{nfe}/condition": fit.conditions[-1]}, bar=False)
        if fit.complete and nfe not in self.validation:
            self.validation[nfe] = self._held_out_error(nfe)
            self.run.say(f"OLSS, {nfe} evaluations: path {fit.path}, held-out RMSE {self.validation[nfe]:.4f}")

    def _held_out_error(self, nfe: int) -> float:
        """Root-mean-square difference of the student's images to the teacher's, from the held-out noises."""
        table, network = self.fits[nfe].table(self.teacher), self._network(nfe)
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.run.data.held_out_batches():
            held = batch.to(self.run.device)[:]
            image = sample(network, table, held.noise, held.condition)
            total += torch.stack([(image - held.end).double().pow(2).sum().cpu(), torch.tensor(float(image.numel()))])
        squared, count = self.run.sum(total).tolist()
        return (squared / count) ** 0.5

    def _result(self, nfe: int) -> Result:
        fit, data, options = self.fits[nfe], self.run.data, self.options
        fitted, held = data.source.seeds[: data.source.num_fitted], data.source.seeds[data.source.num_fitted :]
        return Result(
            f"olss-{nfe}",
            fit.table(self.teacher),
            self.spent[nfe],
            data.source.record | {"seeds": seed_ranges(fitted)},
            {
                "rmse": self.validation[nfe],
                "seeds": seed_ranges(held),
                "chose_the_path": options.path == "search",
                "row_errors": fit.errors,
                "conditions": fit.conditions,
            },
            {"basis": options.basis, "path": options.path, "indices": fit.path, "ridge": options.ridge},
        )
