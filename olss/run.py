"""Fits along a plan, by the solver's own outputs or by the teacher's, and the table they make."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.shards import Trajectories
from olss.columns import Columns, RowSolution
from olss.fit import warn_if_ill_conditioned
from olss.path import check_path, state_column
from olss.plan import CallPlan
from solvers.calls import Call, branch_condition, call_branches
from solvers.executor import told_node
from solvers.prediction import data_weights, noise_weights
from solvers.space import Plain, Space
from solvers.table import SolverTable

BASES = ("own", "teacher")


@dataclass
class Fit:
    """Rows of a solver fitted so far: state i+1 ~ weights[i][0] state[0] + sum_k weights[i][1+k] output[k].

    Args:
        plan: where the network is called.
        space: what a weight is.
        first_weight: what the teacher's state 0 is multiplied by: 1 where the path begins there.
        data_scale: guidance scale at which the last row is the data that the network predicts there, as in every
            classical solver; None: it is fitted like the others.
        weights: row i is float64 (plan.columns(i), *ops).
        errors: root-mean-square error of each row on the fitted trajectories.
        conditions: condition number of each row's basis.
    """

    plan: CallPlan
    space: Space = Plain()  # noqa: RUF009 - frozen
    first_weight: float = 1.0
    data_scale: float | None = None
    weights: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    conditions: list[float] = field(default_factory=list)

    def append(self, solution: RowSolution) -> None:
        """Take over the next row; warns when its basis is ill-conditioned."""
        warn_if_ill_conditioned(solution.condition, len(self.weights))
        self.weights.append(solution.weights)
        self.errors.append(solution.error)
        self.conditions.append(solution.condition)

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return len(self.weights) == len(self.plan.path)

    def solved(self, columns: Columns, teacher: SolverTable, ridge: float) -> RowSolution:
        """The next row: by least squares, or the predicted data.

        Args:
            columns: of the row, see `add_row`.
            teacher: its table.
            ridge: see `Columns.solve`.
        """
        if self.data_scale is None or len(self.weights) + 1 < len(self.plan.path):
            return solve_row(columns, ridge)
        on_state, on_outputs = self._data_row(teacher)
        state = on_state * self.weights[-1] if self.weights else self.space.embed(on_state[None])
        weights = torch.cat([state, self.space.embed(on_outputs)])
        return RowSolution(weights, columns.error(weights), 1.0)

    def _data_row(self, teacher: SolverTable) -> tuple[Tensor, Tensor]:
        """Weights of the last row on its own state, a number, and on the outputs there, (branches,)."""
        row = self.plan.path[-1]
        node = teacher.alpha[row], teacher.sigma[row]
        data, noise = (weights(teacher.prediction_type, *node) for weights in (data_weights, noise_weights))
        on_state, on_output = (teacher.alpha[-1] * d + teacher.sigma[-1] * n for d, n in zip(data, noise))
        both = len(self.plan.at(len(self.plan.path) - 1)) > 1
        shares = [self.data_scale, 1 - self.data_scale] if both else [1.0]
        return on_state, on_output * torch.tensor(shares, dtype=torch.float64)

    def table(self, teacher: SolverTable) -> SolverTable:
        """The solver as a table, at the teacher's nodes and timesteps."""
        path, calls = list(self.plan.path), self.plan.calls
        state = torch.zeros(len(path), len(path), *self.space.ops, dtype=torch.float64)
        output = torch.zeros(len(path), len(calls), *self.space.ops, dtype=torch.float64)
        for row, weights in enumerate(self.weights):
            state[row, 0] = weights[0]
            output[row, : len(weights) - 1] = weights[1:]
        if self.data_scale is not None and self.complete:
            on_state, on_outputs = self._data_row(teacher)
            state[-1], output[-1] = 0, 0
            state[-1, -1], output[-1, -len(on_outputs) :] = self.space.embed(on_state), self.space.embed(on_outputs)
        nodes = [*path, teacher.num_rows]
        return SolverTable(
            teacher.timesteps[path].clone(),
            teacher.alpha[nodes].clone(),
            teacher.sigma[nodes].clone(),
            state,
            output,
            torch.zeros_like(state),
            teacher.start_scale * self.first_weight,
            teacher.prediction_type,
            calls=calls,
            space=self.space,
        )


def check_teacher(teacher: SolverTable) -> None:
    """ValueError for a stochastic teacher: its states are no function of the start noise and the outputs."""
    if teacher.is_stochastic:
        raise ValueError("the teacher of these trajectories adds noise at every step: OLSS needs a deterministic one")


def begin(
    teacher: SolverTable,
    plan: CallPlan,
    space: Space,
    batches: Iterable[Trajectories],
    data_scale: float | None = None,
) -> Fit:
    """A fit without rows: its first state is the teacher's, or start noise times the best weight for a later one."""
    first = check_path(plan.path, teacher.num_rows)[0]
    if not first:
        return Fit(plan, space, data_scale=data_scale)
    pairs = [(batch.states[:, 0].double(), batch.states[:, first].double()) for batch in batches]
    weight = sum(float((a * b).sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
    return Fit(plan, space, weight, data_scale)


def teacher_columns(teacher: SolverTable, batches: Iterable[Trajectories], space: Space = Plain()) -> Columns:  # noqa: B008
    """The columns [X[0], F[0..K-1], X[1..M]] of all batches."""
    columns = Columns.empty(space, 1 + teacher.nfe + teacher.num_rows)
    for batch in batches:
        add_teacher(columns, batch)
    return columns


def add_teacher(columns: Columns, batch: Trajectories) -> None:
    """Add a batch to the teacher's columns [X[0], F[0..K-1], X[1..M]]."""
    bound = columns.space.bind(batch.states.shape[2:], batch.states.device)
    values = [batch.states[:, 0], *batch.outputs.unbind(1), *batch.states[:, 1:].unbind(1)]
    columns.add(bound, [bound.split(value) for value in values])


def fit_on_teacher(columns: Columns, teacher: SolverTable, plan: CallPlan, ridge: float = 0.0) -> Fit:
    """The paper's fit: the basis holds the teacher's own outputs.

    Args:
        columns: see `teacher_columns`.
        teacher: its table.
        plan: where the network is called; the path begins at 0.
        ridge: see `Columns.solve`.
    Raises:
        ValueError: a path that begins later: the teacher's outputs there do not belong to start noise times a weight.
    Source: arXiv 2305.14677, eq. 11.
    """
    if plan.path[0] != 0:
        raise ValueError(f"path {list(plan.path)} must start at 0 with the basis teacher: use basis own, or start at 0")
    fit, basis = Fit(plan, columns.space), [0]
    for row, (point, end) in enumerate(zip(plan.path, [*plan.path[1:], teacher.num_rows])):
        basis += [1 + teacher.calls.index(Call(point, branch)) for branch in plan.at(row)]
        fit.append(columns.solve(basis, state_column(end, teacher), ridge))
    return fit


@dataclass
class Run:
    """A solver fitted on trajectories in memory: `parts[k]` are state 0 and the outputs so far of batch k, split."""

    fit: Fit
    parts: list[list[Tensor]]


def fit_run(
    denoiser: Callable,
    teacher: SolverTable,
    batches: Sequence[Trajectories],
    plan: CallPlan,
    space: Space = Plain(),  # noqa: B008 - frozen
    *,
    ridge: float = 0.0,
    data_scale: float | None = None,
    watched: Sequence[Trajectories] = (),
    known: Run | None = None,
) -> Run:
    """Row by row: fit, go to the solver's own next state, and use the outputs there in the next row's basis.

    Args:
        denoiser: the teacher's network; output 0 is the teacher's where the path begins at 0.
        teacher: the teacher's table; with guidance as weights (`SolverTable.guided`) where the plan makes
            unconditional calls.
        batches: trajectories in memory; the outputs stay in memory too.
        plan: where the network is called.
        space: what a weight is.
        ridge: see `Columns.solve`.
        data_scale: see `Fit`.
        watched: batches the solver also runs on without being fitted on them; their parts come last.
        known: an earlier run on the same batches: rows before the first difference of the plans are taken over.
    """
    run = _shared(known, begin(teacher, plan, space, batches, data_scale), len(batches) + len(watched))
    fit = run.fit
    while not fit.complete:
        for batch, parts in zip([*batches, *watched], run.parts):
            if len(parts) < plan.columns(len(fit.weights)):
                take(fit, batch, parts, next_outputs(denoiser, teacher, batch, fit, parts))
        columns = Columns.empty(space, plan.columns(len(fit.weights)) + 1)
        for batch, parts in zip(batches, run.parts):
            add_row(columns, batch, fit, parts)
        fit.append(fit.solved(columns, teacher, ridge))
    return run


@torch.no_grad()
def next_outputs(
    denoiser: Callable, teacher: SolverTable, batch: Trajectories, fit: Fit, parts: Sequence[Tensor]
) -> list[Tensor]:
    """What the network says at the next row after those that `parts` hold, one (batch, *shape) per branch."""
    row = _rows(fit.plan, parts)
    point, branches = fit.plan.path[row], fit.plan.at(row)
    if point == 0:
        return [batch.outputs[:, teacher.calls.index(Call(0, branch))] for branch in branches]
    state = state_at(batch, fit, parts, row)
    conditions = [branch_condition(denoiser, batch.condition, branch) for branch in branches]
    told = told_node(denoiser, teacher, point)
    timestep = teacher.timesteps[point].to(state.device, state.dtype)
    outputs = call_branches(denoiser, state, timestep, conditions, **told)
    return [output.to(state.dtype) for output in outputs]


def take(fit: Fit, batch: Trajectories, parts: list[Tensor], outputs: Sequence[Tensor]) -> None:
    """Append the outputs of a row, and state 0 before the first, in split form."""
    bound = fit.space.bind(batch.states.shape[2:], batch.states.device)
    if not parts:
        parts.append(bound.split(state_at(batch, fit, parts, 0)))
    parts.extend(bound.split(output.to(parts[0].dtype)) for output in outputs)


def state_at(batch: Trajectories, fit: Fit, parts: Sequence[Tensor], row: int) -> Tensor:
    """The solver's state at a row, (batch, *shape), added up as the sampler does, in float32 or better."""
    start = batch.states[:, 0]
    start = start.to(torch.promote_types(start.dtype, torch.float32))
    if not row:
        return start * fit.first_weight
    bound, total = fit.space.bind(start.shape[1:], start.device), None
    for weight, part in zip(fit.weights[row - 1].to(start), parts):
        total = bound.add(total, weight, part)
    return bound.merge(total)


def end_errors(batch: Trajectories, fit: Fit, parts: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of each of the solver's images to the teacher's, (batch,) in float64."""
    image = state_at(batch, fit, parts, len(fit.plan.path))
    return (image - batch.states[:, -1]).double().flatten(1).square().mean(1)


def add_row(columns: Columns, batch: Trajectories, fit: Fit, parts: Sequence[Tensor]) -> None:
    """Add a batch to the next row's columns: state 0, the outputs so far, and the teacher's state to reach."""
    row = len(fit.weights)
    bound = fit.space.bind(batch.states.shape[2:], batch.states.device)
    target = batch.states[:, [*fit.plan.path, batch.states.shape[1] - 1][row + 1]]
    columns.add(bound, [*parts[: fit.plan.columns(row)], bound.split(target)])


def solve_row(columns: Columns, ridge: float) -> RowSolution:
    """The last column by all others."""
    count = columns.factors[0].r.shape[1] // (columns.space.ops[1] if columns.space.ops else 1)
    return columns.solve(range(count - 1), count - 1, ridge)


def _rows(plan: CallPlan, parts: Sequence[Tensor]) -> int:
    """How many rows' outputs `parts` hold."""
    return next(row for row in range(len(plan.path)) if plan.columns(row) > len(parts))


def _shared(known: Run | None, fit: Fit, num_batches: int) -> Run:
    """The part of a run that a plan has in common with an earlier one."""
    if known is None or known.fit.space != fit.space:
        return Run(fit, [[] for _ in range(num_batches)])
    old = known.fit
    new, before = ([(point, *plan.at(row)) for row, point in enumerate(plan.path)] for plan in (fit.plan, old.plan))
    pairs = zip([*new, None], [*before, None])
    same = next(index for index, (a, b) in enumerate(pairs) if a != b or a is None)  # rows whose outputs agree
    rows = same if same == len(new) == len(before) else max(same - 1, 0)  # rows whose targets agree too
    for name in ("weights", "errors", "conditions"):
        setattr(fit, name, list(getattr(old, name)[:rows]))
    columns = fit.plan.columns(same - 1) if same else 0
    return Run(fit, [parts[:columns] for parts in known.parts])
