"""A run of OLSS: the solvers of all budgets and kinds of weights, a row an epoch."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.shards import Trajectories, seed_ranges
from data.sources import Batch
from denoisers import Counted, Evaluations, calls_per_row, unguided
from evaluation.distances import error_figures, listed
from olss.columns import Columns
from olss.fit import Factor
from olss.path import check_path, greedy_path, log_snr_path, uniform_path
from olss.plan import CallPlan, patterns
from olss.run import (
    Fit,
    add_row,
    add_teacher,
    begin,
    check_teacher,
    fit_on_teacher,
    next_outputs,
    take,
    teacher_columns,
)
from olss.search import PlanSearch
from olss.store import OutputStore
from solvers import Plain, SolverTable, sample
from solvers.identity import own_guidance
from solvers.space import Space
from training.method import Fitting, Result, Run
from training.record import log_table

if TYPE_CHECKING:
    from olss.method import OLSS

Key = tuple[int, str]  # (network calls, kind of weights)


class Solvers(Fitting):
    """The solvers of a run.

    Args:
        options: what to learn.
        run: its data hold whole trajectories.
    Raises:
        ValueError: a stochastic teacher, one of too few steps, no folder, or too few trajectories held out.
    """

    def __init__(self, options: "OLSS", run: Run) -> None:
        self.options, self.run = options, run
        self.teacher: SolverTable = run.data.source.table
        check_teacher(self.teacher)
        run.data.source.check_halves()
        if run.folder is None:
            raise ValueError("outputs are kept on disk while solvers are fitted: set output")
        self.denoiser = unguided(run.denoiser) if self.teacher.has_branches else run.denoiser
        self.spaces = options.spaces(run.denoiser.sample_shape)
        self.rows = {calls: self._rows(calls) for calls in options.budgets}
        self.fits: dict[Key, Fit] = {}
        self.kept: dict[int, str] = {}
        self.validation: dict[int, dict[str, Any]] = {}
        self.spent = {calls: Evaluations.of(self.denoiser) for calls in options.budgets}
        self._store = OutputStore(run.folder / "solver-outputs", run, self.teacher)
        self.folders = [self._store.folder]
        self._columns: dict[Key, Columns] = {}

    @property
    def stays(self) -> str:
        """Plans whose scores are on disk."""
        tried = sum(1 for _ in self._store.folder.glob("*.score"))
        return f"{tried} plans of calls that were tried stay" if tried else ""

    @property
    def done(self) -> bool:
        """Whether every solver is complete."""
        return bool(self.fits) and all(fit.complete for fit in self.fits.values())

    def tables(self) -> dict[str, SolverTable]:
        """The finished solvers."""
        return {f"olss-{calls}": self._kept(calls).table(self.teacher) for calls in self.kept}

    def start(self) -> None:
        """Plans that need nothing of the trajectories, or are searched on the first of them."""
        if not self.fits and not self.options.needs_columns:
            with torch.no_grad(), self.run.computing():
                self._begin({calls: self._plan(calls) for calls in self.options.budgets})
        self._columns = self._columns or self._empty()

    def step(self, batch: Any) -> None:
        """Add a batch to the columns."""
        trajectories = batch[:]
        for key, columns in self._columns.items():
            if self.fits:
                parts = self._parts(trajectories, key)
                add_row(columns, trajectories, self.fits[key], parts)
            else:
                add_teacher(columns, trajectories)

    def end_epoch(self) -> None:
        """Merge the columns of all processes and solve the rows."""
        with torch.no_grad(), self.run.computing():
            for columns in self._columns.values():
                for factor in columns.factors:
                    rows = self.run.sum(torch.tensor(factor.num_rows))
                    factor.merge(self.run.gather(factor.r), int(rows))
            if self.fits:
                for key, columns in self._columns.items():
                    fit = self.fits[key]
                    fit.append(fit.solved(columns, self.teacher, self.options.ridge))
            else:
                self._begin_on_teacher()
            self._report()
        self._columns = self._empty()

    def finish(self) -> None:
        """Write the artifacts and drop the outputs."""
        if not self.done:
            return
        for calls in self.options.budgets:
            self.run.save(self._result(calls))
            log_table(self.run.logger, f"olss-{calls}", self._kept(calls).table(self.teacher))
        if self.run.rank == 0:
            self._store.clear()

    def state(self) -> dict[str, Any]:
        """Rows, figures and counts; of an epoch that is not over, every process's factors."""
        gather = self.run.gather
        return {
            "fits": [_packed(key, fit) for key, fit in self.fits.items()],
            "kept": self.kept,
            "validation": self.validation,
            "spent": {calls: vars(spent) for calls, spent in self.spent.items()},
            "factors": [
                [*key, [[gather(f.r), gather(torch.tensor(f.num_rows))] for f in columns.factors]]
                for key, columns in self._columns.items()
            ],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on there, on as many processes."""
        self.fits = dict(_unpacked(values, self.spaces) for values in state["fits"])
        self.kept, self.validation = dict(state["kept"]), dict(state["validation"])
        self.spent = {calls: Evaluations(**spent) for calls, spent in state["spent"].items()}
        self._columns = self._empty()
        for calls, kind, factors in state["factors"]:
            for factor, (r, rows) in zip(self._columns[calls, kind].factors, factors):
                factor.r, factor.num_rows = r[self.run.rank], int(rows[self.run.rank])

    def _rows(self, calls: int) -> int:
        """Rows of a solver that makes every row's calls."""
        each = 2 if self.teacher.has_branches else calls_per_row(self.denoiser)
        if (self.options.path != "search" and calls % each) or calls < each:
            raise ValueError(f"{calls} network calls do not fit rows of {each} calls: use a multiple, or path search")
        if calls // each > self.teacher.num_rows:
            raise ValueError(
                f"{calls} network calls are {calls // each} rows, more than the teacher's {self.teacher.num_rows}: "
                "lower calls, or make trajectories with more steps"
            )
        return calls // each

    def _plan(self, calls: int) -> CallPlan:
        """A plan that is given, follows from the teacher's nodes, or is searched."""
        path, rows = self.options.path, self.rows[calls]
        if path == "search":
            return self._searched(calls)
        if isinstance(path, list):
            if len(path) != rows:
                raise ValueError(f"a path of {len(path)} indices is for {len(path)} rows, {calls} calls are {rows}")
            return CallPlan.of(check_path(path, self.teacher.num_rows), self.teacher)
        plain = uniform_path(self.teacher.num_rows, rows) if path == "uniform" else log_snr_path(self.teacher, rows)
        return CallPlan.of(plain, self.teacher)

    def _searched(self, calls: int) -> CallPlan:
        """The best plan on the half of the held-out trajectories that chooses; processes share the candidates."""
        options, run, teacher = self.options, self.run, self.teacher
        (fitted, factor), chosen = self._first, run.data.choosing().to(run.device)[: options.search_trajectories]
        kept = self._store.scores(fitted, chosen, (options.ridge, self._data_scale), self.spent[calls])
        processes = run.rank, run.world_size, run.sum, run.shows_progress
        search = PlanSearch(
            self._network(calls),
            teacher,
            fitted,
            chosen,
            options.ridge,
            *processes,
            kept,
            run.safe_point,
            self._data_scale,
        )
        budget = calls if teacher.has_branches else self.rows[calls]
        greedy = [
            CallPlan(tuple(greedy_path(factor, teacher, rows, options.ridge)), pattern)
            for rows, pattern in patterns(teacher, budget)
        ]
        return search.best(budget, greedy, options.search_rounds)[0]

    @cached_property
    def _first(self) -> tuple[Trajectories, Factor]:
        """The trajectories that candidates are fitted on, and their factor."""
        fitted = self.run.data.fitted(self.options.search_trajectories).to(self.run.device)
        return fitted, teacher_columns(self.teacher, [fitted]).factors[0]

    def _begin(self, plans: dict[int, CallPlan]) -> None:
        first = {calls: plan.path[0] for calls, plan in plans.items()}
        batches = [self.run.data.fitted(self.options.search_trajectories)] if any(first.values()) else []
        for calls, plan in plans.items():
            for kind, space in self.spaces.items():
                self.fits[calls, kind] = begin(self.teacher, plan, space, batches, self._data_scale)

    def _begin_on_teacher(self) -> None:
        """Paths from the teacher's columns; with the teacher basis all rows too."""
        options, some = self.options, next(iter(self._columns.values()))
        greedy = options.path == "greedy"
        plans = {
            calls: CallPlan.of(greedy_path(some.factors[0], self.teacher, rows, options.ridge), self.teacher)
            if greedy
            else self._plan(calls)
            for calls, rows in self.rows.items()
        }
        if options.basis == "own":
            self._begin(plans)
            return
        for calls, plan in plans.items():
            for kind in self.spaces:
                self.fits[calls, kind] = fit_on_teacher(self._columns[0, kind], self.teacher, plan, options.ridge)

    def _empty(self) -> dict[Key, Columns]:
        """For the next rows; the teacher's, as budget 0, as long as there is no plan."""
        if self.fits:
            unfinished = {key: fit for key, fit in self.fits.items() if not fit.complete}
            return {key: Columns.empty(f.space, f.plan.columns(len(f.weights)) + 1) for key, f in unfinished.items()}
        count = 1 + self.teacher.nfe + self.teacher.num_rows
        spaces = self.spaces if self.options.basis == "teacher" else {}
        return {(0, kind): Columns.empty(space, count) for kind, space in ({"numbers": Plain()} | spaces).items()}

    def _parts(self, trajectories: Trajectories, key: Key) -> list[Tensor]:
        """State 0 and the outputs up to the next row; from disk as far as they are there."""
        fit, parts = self.fits[key], []
        for row in range(len(fit.weights) + 1):
            outputs = self._store.load(trajectories, fit, row)
            if outputs is None:
                outputs = next_outputs(self._network(key[0]), self.teacher, trajectories, fit, parts)
                self._store.save(trajectories, fit, row, outputs)
            take(fit, trajectories, parts, outputs)
        return parts

    @property
    def _data_scale(self) -> float | None:
        """See `Fit.data_scale`."""
        scale = own_guidance(self.run.denoiser)
        return (scale if self.teacher.has_branches else 1.0) if self.options.last_row == "data" else None

    def _network(self, calls: int) -> Counted:
        """The denoiser, counted for one budget."""
        return Counted(self.denoiser, self.spent[calls])

    def _kept(self, calls: int) -> Fit:
        return self.fits[calls, self.kept[calls]]

    def _report(self) -> None:
        """Figures of the newest rows, and of the solvers that are complete."""
        for (calls, kind), fit in self.fits.items():
            if fit.errors:
                name, shown = f"train/olss-{calls}/{kind}", kind == "numbers"
                self.run.log({f"{name}/row_error": fit.errors[-1]}, bar=shown, of_epoch=True)
                self.run.log({f"{name}/condition": fit.conditions[-1]}, bar=False, of_epoch=True)
        for calls in self.options.budgets:
            fits = {kind: fit for (budget, kind), fit in self.fits.items() if budget == calls}
            if calls not in self.kept and fits and all(fit.complete for fit in fits.values()):
                self._choose(calls, fits)

    def _choose(self, calls: int, fits: dict[str, Fit]) -> None:
        """Keep the kind of weights that is best on the half that chooses; measure it on the half that reports."""
        choosing, reporting = (
            half.to(self.run.device) for half in (self.run.data.choosing(), self.run.data.reporting())
        )
        scores = {kind: float(self._errors(calls, fit, choosing).sqrt().mean()) for kind, fit in fits.items()}
        kind = min(scores, key=scores.__getitem__)
        plan, found = fits[kind].plan, error_figures(self._errors(calls, fits[kind], reporting))
        self.kept[calls] = kind
        self.validation[calls] = found | self.run.data.held_out_seeds() | {"chosen_from": scores}
        unconditional = f", unconditional at rows {list(plan.unconditional)}" if plan.unconditional else ""
        self.run.say(
            f"OLSS, {calls} network calls: path {list(plan.path)}{unconditional}; weights: {kind}; held-out "
            f"{listed(found)}"
        )

    def _errors(self, calls: int, fit: Fit, held: Batch) -> Tensor:
        """Mean squared difference of each image to the teacher's, (held,), by the shared sampler; processes share."""
        table, found = fit.table(self.teacher), torch.zeros(len(held), dtype=torch.float64)
        for first in range(self.run.rank * 32, len(held), self.run.world_size * 32):
            part = held[first : first + 32]
            image = sample(self._network(calls), table, part.noise, part.condition)
            found[first : first + 32] = (image - part.end).double().flatten(1).square().mean(1).cpu()
        return self.run.sum(found)

    def _result(self, calls: int) -> Result:
        fit, data, options = self._kept(calls), self.run.data, self.options
        fitted = seed_ranges(data.source.seeds[: data.source.num_fitted])
        return Result(
            f"olss-{calls}",
            fit.table(self.teacher),
            self.spent[calls],
            data.source.record | {"seeds": fitted},
            self.validation[calls] | {"row_errors": fit.errors, "conditions": list(map(_finite, fit.conditions))},
            {
                "basis": options.basis,
                "path": options.path,
                "indices": list(fit.plan.path),
                "unconditional": list(fit.plan.unconditional),
                "weights": self.kept[calls],
                "ridge": options.ridge,
                "last_row": options.last_row,
            },
        )


def _finite(condition: float) -> float | None:
    """A condition number as JSON holds it: None for a basis that is singular."""
    return condition if math.isfinite(condition) else None


def _packed(key: Key, fit: Fit) -> list[Any]:
    plan = [list(fit.plan.path), list(fit.plan.unconditional)]
    return [*key, *plan, fit.first_weight, fit.data_scale, fit.weights, fit.errors, fit.conditions]


def _unpacked(values: Sequence[Any], spaces: dict[str, Space]) -> tuple[Key, Fit]:
    calls, kind, path, unconditional, first_weight, data_scale, *rows = values
    return (calls, kind), Fit(
        CallPlan(tuple(path), tuple(unconditional)), spaces[kind], first_weight, data_scale, *rows
    )
