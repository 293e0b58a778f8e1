"""Coefficients along a path, by the teacher's outputs or by the student's own, and the table they make."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.shards import Trajectories
from olss.fit import Factor, Solution, solve, warn_if_ill_conditioned
from olss.path import check_path, output_column, state_column
from solvers.table import SolverTable

BASES = ("student", "teacher")


@dataclass
class Fit:
    """Rows of a student fitted so far, X[path[i+1]] ~ coef[0] X[0] + sum_j coef[1+j] output[j].

    Args:
        path: (N,) teacher indices the student visits; M follows.
        coefs: row i is float64 (i+2,).
        errors: root-mean-square error of each row on the fitted trajectories.
        conditions: condition number of each row's basis.
    """

    path: list[int]
    coefs: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    conditions: list[float] = field(default_factory=list)

    def append(self, solution: Solution) -> None:
        """Take over the next row; warns when its basis is ill-conditioned."""
        warn_if_ill_conditioned(solution.condition, len(self.coefs))
        self.coefs.append(solution.coef[:, 0])
        self.errors.append(float(solution.error[0]))
        self.conditions.append(solution.condition)

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return len(self.coefs) == len(self.path)

    def table(self, teacher: SolverTable) -> SolverTable:
        """The student as a solver table, at the teacher's nodes and timesteps."""
        nfe = len(self.path)
        state, output = torch.zeros(2, nfe, nfe, dtype=torch.float64)
        for row, coef in enumerate(self.coefs):
            state[row, 0] = coef[0]
            output[row, : row + 1] = coef[1:]
        nodes = [*self.path, teacher.nfe]
        return SolverTable(
            teacher.timesteps[self.path].clone(),
            teacher.alpha[nodes].clone(),
            teacher.sigma[nodes].clone(),
            state,
            output,
            torch.zeros(nfe, nfe, dtype=torch.float64),
            teacher.start_scale,
            teacher.prediction_type,
        )


def check_teacher(teacher: SolverTable) -> None:
    """ValueError for a stochastic teacher: its states are no function of the start noise and the outputs."""
    if teacher.is_stochastic:
        raise ValueError("the teacher of these trajectories adds noise at every step: OLSS needs a deterministic one")


def teacher_factor(batches: Iterable[Trajectories], num_steps: int) -> Factor:
    """R of the columns [X[0], F[0..M-1], X[1..M]]."""
    factor = Factor.empty(2 * num_steps + 1)
    for batch in batches:
        factor.add(teacher_columns(batch))
    return factor


def teacher_columns(batch: Trajectories) -> list[Tensor]:
    """The columns [X[0], F[0..M-1], X[1..M]] of a batch, each (batch, *shape)."""
    return [batch.states[:, 0], *batch.outputs.unbind(1), *batch.states[:, 1:].unbind(1)]


def fit_on_teacher(factor: Factor, path: Sequence[int], num_steps: int, ridge: float = 0.0) -> Fit:
    """The paper's fit: the basis holds the teacher's own outputs.

    Args:
        factor: see `teacher_factor`.
        path: N indices, see `olss.path`.
        num_steps: M.
        ridge: see `solve`.
    Source: arXiv 2305.14677, eq. 11.
    """
    path = check_path(path, num_steps)
    fit = Fit(path)
    for row, end in enumerate([*path[1:], num_steps]):
        basis = [0, *(output_column(i) for i in path[: row + 1])]
        fit.append(solve(factor, basis, [state_column(end, num_steps)], ridge))
    return fit


@dataclass
class Run:
    """A student fitted on trajectories in memory: `outputs[k][i]` is its output i on batch k."""

    fit: Fit
    outputs: list[list[Tensor]]


def fit_on_student(
    denoiser: Callable, teacher: SolverTable, batches: Sequence[Trajectories], path: Sequence[int], ridge: float = 0.0
) -> Fit:
    """Row by row: fit, go to the student's own next state, and use the output there in the next row's basis.

    Args:
        denoiser: the teacher's network; called N-1 times per batch, as output 0 is the teacher's.
        teacher: the teacher's table.
        batches: trajectories in memory; the student's outputs stay in memory too.
        path: N indices, see `olss.path`.
        ridge: see `solve`.
    """
    return run_student(denoiser, teacher, batches, path, ridge).fit


def run_student(
    denoiser: Callable,
    teacher: SolverTable,
    batches: Sequence[Trajectories],
    path: Sequence[int],
    ridge: float = 0.0,
    watched: Sequence[Trajectories] = (),
    known: Run | None = None,
) -> Run:
    """`fit_on_student`, with its outputs.

    Args:
        watched: batches the student also runs on without being fitted on them; their outputs come last.
        known: an earlier run on the same batches: rows before the first different point of the path are taken over.
    """
    run = _shared(known, check_path(path, teacher.nfe), len(batches) + len(watched))
    fit = run.fit
    while not fit.complete:
        factor = Factor.empty(row_width(fit))
        for batch, outputs in zip([*batches, *watched], run.outputs):
            if len(outputs) <= len(fit.coefs):
                outputs.append(next_output(denoiser, teacher, batch, fit, outputs))
        for batch, outputs in zip(batches, run.outputs):
            factor.add(row_columns(batch, fit, outputs))
        fit.append(solve_row(factor, ridge))
    return run


def _shared(known: Run | None, path: list[int], num_batches: int) -> Run:
    """The part of a run that a path has in common with an earlier one."""
    if known is None:
        return Run(Fit(path), [[] for _ in range(num_batches)])
    pairs = zip([*path, None], [*known.fit.path, None])
    same = next(index for index, (new, old) in enumerate(pairs) if new != old or new is None)
    rows = same - 1 if same < max(len(path), len(known.fit.path)) else same
    old = known.fit
    fit = Fit(path, old.coefs[:rows], old.errors[:rows], old.conditions[:rows])
    return Run(fit, [outputs[:same] for outputs in known.outputs])


def end_error(batch: Trajectories, fit: Fit, outputs: Sequence[Tensor]) -> float:
    """Root-mean-square difference of the student's image to the teacher's, from the student's outputs."""
    image = student_state(batch.states[:, 0], outputs, fit.coefs[-1])
    return float((image - batch.states[:, -1]).double().pow(2).mean().sqrt())


@torch.no_grad()
def next_output(
    denoiser: Callable, teacher: SolverTable, batch: Trajectories, fit: Fit, outputs: Sequence[Tensor]
) -> Tensor:
    """What the network says at the student's current state, (batch, *shape).

    Args:
        batch: trajectories of the teacher.
        fit: rows 0 to i-1.
        outputs: the student's outputs 0 to i-1.
    """
    if not outputs:
        return batch.outputs[:, 0]
    state = student_state(batch.states[:, 0], outputs, fit.coefs[len(outputs) - 1])
    timestep = teacher.timesteps[fit.path[len(outputs)]].to(state.device, state.dtype)
    return denoiser(state, timestep, batch.condition).to(state.dtype)


def student_state(start: Tensor, outputs: Sequence[Tensor], coef: Tensor) -> Tensor:
    """coef[0] start + sum_j coef[1+j] outputs[j], as the sampler adds it up, in float32 or better."""
    coef = coef.to(start.device, torch.promote_types(start.dtype, torch.float32))
    state = coef[0] * start
    for weight, output in zip(coef[1:], outputs):
        state = torch.addcmul(state, weight, output.to(state.dtype))
    return state


def row_columns(batch: Trajectories, fit: Fit, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Columns of the next row's problem: start, the student's outputs so far, and the teacher's state to reach."""
    end = [*fit.path, batch.outputs.shape[1]][len(outputs)]
    return [batch.states[:, 0], *outputs, batch.states[:, end]]


def row_width(fit: Fit) -> int:
    """Number of columns of the next row's problem."""
    return len(fit.coefs) + 3


def solve_row(factor: Factor, ridge: float) -> Solution:
    """The last column by all others."""
    width = factor.r.shape[1]
    return solve(factor, range(width - 1), [width - 1], ridge)
