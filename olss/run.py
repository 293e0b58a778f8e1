"""OLSS on a solver's own outputs: fit a row, go to the next state, call the network there, fit the next row."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.shards import Trajectories
from olss.columns import RowProblem, RowSolution
from olss.fit import warn_if_ill_conditioned
from olss.path import check_path
from solvers.calls import CONDITIONAL, UNCONDITIONAL, Call, branch_condition, call_branches
from solvers.space import Plain, Space
from solvers.table import SolverTable


@dataclass(frozen=True)
class CallPlan:
    """Where a solver calls the network: at which teacher states, and where for the unconditional branch too.

    Args:
        path: (N,) increasing teacher indices; M follows. Index 0 is pure noise; a path that begins later leaves the
            first calls out, and its first state is start noise times a weight.
        unconditional: rows, indices into `path`, that make an unconditional call beside the conditional one.
    Raises:
        ValueError: a row outside the path.
    """

    path: tuple[int, ...]
    unconditional: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wrong = [row for row in self.unconditional if not 0 <= row < len(self.path)]
        if wrong or list(self.unconditional) != sorted(set(self.unconditional)):
            raise ValueError(
                f"unconditional calls at rows {list(self.unconditional)}: they must be distinct, in order, and among "
                f"the {len(self.path)} rows of the path"
            )

    @property
    def calls(self) -> tuple[Call, ...]:
        """The network calls in the order of their rows."""
        made = ((Call(row), Call(row, UNCONDITIONAL)) for row in range(len(self.path)))
        return tuple(call for pair in made for call in pair[: 1 + (pair[0].row in self.unconditional)])

    def at(self, row: int) -> tuple[str, ...]:
        """Branches called at a row."""
        return (CONDITIONAL, UNCONDITIONAL)[: 1 + (row in self.unconditional)]

    def columns(self, row: int) -> int:
        """Number of start noise and outputs that row may combine."""
        return 1 + sum(len(self.at(earlier)) for earlier in range(row + 1))


@dataclass
class Fit:
    """Rows of a solver fitted so far: state i+1 ~ weights[i][0] state[0] + sum_k weights[i][1+k] output[k].

    Args:
        plan: where the network is called.
        space: what a weight is.
        first_weight: what the teacher's state 0 is multiplied by: 1 where the path begins there.
        weights: row i is float64 (plan.columns(i), *ops).
        errors: root-mean-square error of each row on the fitted trajectories.
        conditions: condition number of each row's basis.
    """

    plan: CallPlan
    space: Space
    first_weight: float = 1.0
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

    def table(self, teacher: SolverTable) -> SolverTable:
        """The solver as a table, at the teacher's nodes and timesteps."""
        rows, path = len(self.plan.path), list(self.plan.path)
        state = torch.zeros(rows, rows, *self.space.ops, dtype=torch.float64)
        output = torch.zeros(rows, len(self.plan.calls), *self.space.ops, dtype=torch.float64)
        for row, weights in enumerate(self.weights):
            state[row, 0] = weights[0]
            output[row, : len(weights) - 1] = weights[1:]
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
            calls=self.plan.calls,
            space=self.space,
        )


@dataclass
class Run:
    """A solver fitted on trajectories in memory: `parts[k]` are state 0 and the outputs so far of batch k, split."""

    fit: Fit
    parts: list[list[Tensor]]


def begin(teacher: SolverTable, batches: Iterable[Trajectories], plan: CallPlan, space: Space) -> Fit:
    """A fit without rows: its first state is the teacher's, or start noise times the best weight for a later one."""
    check_path(plan.path, teacher.num_rows)
    first = plan.path[0]
    if not first:
        return Fit(plan, space)
    pairs = [(batch.states[:, 0].double(), batch.states[:, first].double()) for batch in batches]
    weight = sum(float((a * b).sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
    return Fit(plan, space, weight)


def fit_run(
    denoiser: Callable,
    teacher: SolverTable,
    batches: Sequence[Trajectories],
    plan: CallPlan,
    space: Space = Plain(),  # noqa: B008 - frozen
    ridge: float = 0.0,
    watched: Sequence[Trajectories] = (),
    known: Run | None = None,
) -> Run:
    """Row by row: fit, go to the solver's own next state, and use the outputs there in the next row's basis.

    Args:
        denoiser: the teacher's network.
        teacher: the teacher's table; with guidance as weights (`SolverTable.guided`) where the plan makes
            unconditional calls.
        batches: trajectories in memory; the outputs stay in memory too.
        plan: where the network is called.
        space: what a weight is.
        ridge: penalty on the squared distance of weights to those of numbers (of numbers: to zero).
        watched: batches the solver also runs on without being fitted on them; their parts come last.
        known: an earlier run on the same batches: rows before the first difference of the plans are taken over.
    """
    run = _shared(known, begin(teacher, batches, plan, space), len(batches) + len(watched))
    fit = run.fit
    while not fit.complete:
        for batch, parts in zip([*batches, *watched], run.parts):
            advance(denoiser, teacher, batch, fit, parts)
        problem = RowProblem.empty(space, plan.columns(len(fit.weights)))
        for batch, parts in zip(batches, run.parts):
            add_row(problem, batch, fit, parts)
        fit.append(problem.solve(ridge))
    return run


def end_error(batch: Trajectories, fit: Fit, parts: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the solver's images to the teacher's, (batch,) in float64."""
    image = next_state(batch, fit, parts)
    return (image - batch.states[:, -1]).double().flatten(1).square().mean(1)


@torch.no_grad()
def advance(denoiser: Callable, teacher: SolverTable, batch: Trajectories, fit: Fit, parts: list[Tensor]) -> None:
    """Append what the network says at the solver's next state; nothing where it is there already.

    Args:
        batch: trajectories of the teacher.
        fit: all rows before the next.
        parts: state 0 and the outputs so far, split; empty before the first.
    """
    row = len(fit.weights)
    bound = fit.space.bind(batch.states.shape[2:], batch.states.device)
    if len(parts) >= fit.plan.columns(row):
        return
    state = next_state(batch, fit, parts)
    if not parts:
        parts.append(bound.split(state))
    branches = fit.plan.at(row)
    if fit.plan.path[row] == 0:
        columns = [teacher.calls.index(Call(0, branch)) for branch in branches]
        outputs = [batch.outputs[:, column] for column in columns]
    else:
        timestep = teacher.timesteps[fit.plan.path[row]].to(state.device, state.dtype)
        conditions = [branch_condition(denoiser, batch.condition, branch) for branch in branches]
        outputs = call_branches(denoiser, state, timestep, conditions)
    parts.extend(bound.split(output.to(state.dtype)) for output in outputs)


def next_state(batch: Trajectories, fit: Fit, parts: Sequence[Tensor]) -> Tensor:
    """The solver's state after the rows fitted so far, (batch, *shape), added up as the sampler does."""
    start = batch.states[:, 0]
    start = start.to(torch.promote_types(start.dtype, torch.float32))
    if not fit.weights:
        return start * fit.first_weight
    bound = fit.space.bind(start.shape[1:], start.device)
    weights = fit.weights[-1].to(start)
    total = None
    for weight, part in zip(weights, parts):
        total = bound.add(total, weight, part)
    return bound.merge(total)


def add_row(problem: RowProblem, batch: Trajectories, fit: Fit, parts: Sequence[Tensor]) -> None:
    """Add a batch to the next row's problem: state 0 and the outputs so far, and the teacher's state to reach."""
    row = len(fit.weights)
    bound = fit.space.bind(batch.states.shape[2:], batch.states.device)
    target = batch.states[:, [*fit.plan.path, batch.states.shape[1] - 1][row + 1]]
    problem.add(bound, parts[: fit.plan.columns(row)], bound.split(target))


def _shared(known: Run | None, fit: Fit, num_batches: int) -> Run:
    """The part of a run that a plan has in common with an earlier one."""
    if known is None or known.fit.space != fit.space:
        return Run(fit, [[] for _ in range(num_batches)])
    old = known.fit
    new, before = ([(point, *p.plan.at(row)) for row, point in enumerate(p.plan.path)] for p in (fit, old))
    pairs = enumerate(zip([*new, None], [*before, None]))
    same = next(index for index, (a, b) in pairs if a != b or a is None)  # rows whose outputs agree
    rows = same if same == len(new) == len(before) else max(same - 1, 0)  # rows whose targets agree too
    for name in ("weights", "errors", "conditions"):
        setattr(fit, name, list(getattr(old, name)[:rows]))
    columns = fit.plan.columns(same - 1) if same else 0
    return Run(fit, [parts[:columns] for parts in known.parts])
