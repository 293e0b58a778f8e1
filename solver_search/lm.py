"""Levenberg-Marquardt for solver tables: few numbers, so the whole Jacobian is cheap by forward-mode derivatives.

A run is linearised row by row. The tangents of state i+1 follow from those of earlier states and outputs; only the
network needs a derivative of its own, and only for the numbers that have acted on its input so far. The tangents of
one evaluation go through the network together (vmap), `chunk` at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.shards import Trajectories
from denoisers import Evaluations
from solver_search.losses import SearchLoss, Term
from solvers import SolverTable
from solvers.executor import OUTPUT, STATE, Executor, Key, evaluator
from training.method import Parameters


@dataclass(frozen=True)
class Linearization:
    """A run and its derivatives by theta: states i (batch, *shape), tangents (K, batch, *shape), None where zero."""

    table: SolverTable
    nodes: tuple[Tensor, Tensor]
    states: list[Tensor]
    tangents: list[Tensor | None]


def linearize(
    denoiser: Any,
    parameters: Parameters,
    theta: Tensor,
    noise: Tensor,
    condition: Any = None,
    chunk: int | None = None,
    evaluations: Evaluations | None = None,
    tangent_denoiser: Any = None,
) -> Linearization:
    """States of a run and their derivatives by theta.

    Equal to forward-mode differentiation of `sample_trace`, without the tangents that are still zero.

    Args:
        denoiser: see `sample`.
        parameters: theta -> table.
        theta: (K,) float64.
        noise: (batch, *shape).
        condition: of the denoiser.
        chunk: tangents that go through the network at once; default all.
        evaluations: counts what is spent.
        tangent_denoiser: the same network in lower precision, for the derivatives alone.
    """
    table, jacobian = _table_jacobian(parameters, theta)
    if table.space.ops:
        raise ValueError("Levenberg-Marquardt moves numbers, this table has operators: use optimizer lbfgs")
    dtype = torch.promote_types(noise.dtype, torch.float32)
    d_time, d_state, d_output = (value.to(noise.device, dtype) for value in jacobian[:3])
    rows = range(table.num_rows)
    moves = [[(block[:, i] != 0).reshape(len(theta), -1).any(1) for block in jacobian[:3]] for i in rows]
    evaluate = [evaluator(network or denoiser, table, condition) for network in (denoiser, tangent_denoiser)]
    state = noise.to(dtype) * table.start_scale
    run = Executor(table.detach(), state)
    values: dict[Key, Tensor] = {(STATE, 0): state}
    tangents: dict[Key, Tensor | None] = {(STATE, 0): None}
    reached = torch.zeros(len(theta), dtype=torch.bool)
    for row in run.rows:
        i = row.index
        live = reached | moves[i][0]
        outputs, pushed = _evaluate(
            evaluate, row, run.timesteps[i], values[STATE, i], tangents[STATE, i], d_time[:, i], live, chunk
        )
        for place, call in enumerate(row.calls):
            values[OUTPUT, call] = outputs[place]
            tangents[OUTPUT, call] = None if pushed is None else pushed[:, place]
        if evaluations is not None:
            made = len(noise) * len(row.calls)
            evaluations.forward += made * (1 + -(-int(live.sum()) // (chunk or len(theta))))
            evaluations.tangent += made * int(live.sum())
        reached = live | moves[i][1] | moves[i][2]
        change = state.new_zeros(len(theta), *noise.shape)
        for (block, column), weight in zip(row.terms, run.weights[i]):
            derivative = (d_state, d_output)[block][:, i, column]
            change += derivative.reshape(-1, *[1] * noise.ndim) * values[block, column]
            if (tangent := tangents[block, column]) is not None:
                change += weight * tangent
        total = run.combine(i, values)
        values[STATE, i + 1] = torch.zeros_like(state) if total is None else total
        tangents[STATE, i + 1] = change
    states = [(STATE, i) for i in range(table.num_rows + 1)]
    nodes = (jacobian[3], jacobian[4])
    return Linearization(table, nodes, [values[key] for key in states], [tangents[key] for key in states])


def _evaluate(evaluate, row, timestep, state, tangent, d_time, live, chunk) -> tuple[Sequence[Tensor], Tensor | None]:
    """Outputs of a row's calls, and their tangents (K, calls, batch, *shape), None where all are zero.

    Those of numbers that are not `live` are zero.
    """
    if not row.calls:
        return (), None

    def run(call: Callable) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: torch.stack(call(x, t, row)).to(state.dtype)

    with torch.no_grad():
        output = run(evaluate[0])(state, timestep)
        picked = live.nonzero().flatten().to(state.device)
        if not len(picked):
            return output, None
        d_state = state.new_zeros(len(picked), *state.shape) if tangent is None else tangent[picked]
        push = vmap(lambda *direction: jvp(run(evaluate[1]), (state, timestep), direction)[1])
        size = chunk or len(picked)
        with sdpa_kernel(SDPBackend.MATH):
            parts = [push(*part) for part in zip(d_state.split(size), d_time[picked].split(size))]
    return output, state.new_zeros(len(live), *output.shape).index_copy_(0, picked, torch.cat(parts))


def _table_jacobian(parameters: Parameters, theta: Tensor) -> tuple[SolverTable, list[Tensor]]:
    """The table, and the derivatives (K, ...) of timesteps, state_coef, output_coef, alpha and sigma."""
    names = ("timesteps", "state_coef", "output_coef", "alpha", "sigma")
    theta = theta.detach().cpu()

    def numbers(values: Tensor) -> tuple[Tensor, ...]:
        table = parameters.table(values)
        return tuple(getattr(table, name) + 0 * values[0] for name in names)

    with torch.no_grad():
        derivatives = jacfwd(numbers)(theta)
    return parameters.table(theta), [value.movedim(-1, 0) for value in derivatives]


@dataclass(frozen=True)
class NormalEquations:
    """Gauss-Newton's quadratic: loss + 2 gradient . step + step . matrix . step; matrix (K, K), gradient (K,)."""

    matrix: Tensor
    gradient: Tensor
    loss: float


def normal_equations(
    run: Linearization, loss: SearchLoss, teacher: Trajectories, extractor: nn.Module | None = None
) -> NormalEquations:
    """The normal equations of one batch, in float64."""
    size = len(run.tangents[-1])
    matrix = torch.zeros(size, size, dtype=torch.float64)
    gradient, value = torch.zeros(size, dtype=torch.float64), 0.0
    for term in loss.terms(run.table.num_rows):
        error, slope = _linear_residual(term, run, teacher, extractor)
        curvature = term.curvature(error) / error.numel()
        rows = slope.double().flatten(1)
        weighted = rows * (curvature.double().flatten() if isinstance(curvature, Tensor) else curvature)
        matrix += (weighted @ rows.T).cpu()
        gradient += (weighted @ error.double().flatten()).cpu()
        value += float(term.value(error))
    return NormalEquations(matrix, gradient, value)


def _linear_residual(term: Term, run: Linearization, teacher: Trajectories, extractor) -> tuple[Tensor, Tensor]:
    """Residual of a part and its derivative (K, ...)."""
    row, table = term.row, run.table
    state, tangent = run.states[row], run.tangents[row]
    target = teacher.at(table.alpha[row], table.sigma[row])
    move = [d[:, row] for d in run.nodes]
    if any(bool(d.any()) for d in move):
        by_alpha = _slope(lambda a: teacher.at(a, table.sigma[row]), table.alpha[row])
        by_sigma = _slope(lambda s: teacher.at(table.alpha[row], s), table.sigma[row])
        d_target = sum(_outer(d.to(state), slope) for d, slope in zip(move, (by_alpha, by_sigma)))
    else:
        d_target = torch.zeros_like(tangent)
    if not term.feature:
        return state - target, tangent - d_target
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        push = lambda x: vmap(lambda d: jvp(extractor, (x,), (d,)), out_dims=(None, 0))  # noqa: E731
        (own, d_own), (other, d_other) = push(state)(tangent), push(target)(d_target)
    return own - other, d_own - d_other


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return jvp(function, (at.detach(),), (torch.ones_like(at),))[1]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.reshape(-1, *[1] * right.ndim) * right


@dataclass(frozen=True)
class Damping:
    """State of Levenberg-Marquardt between steps: the damping and the factor it grows by at the next failure."""

    value: float = 1e-3
    growth: float = 2.0

    def accepted(self, gain: float) -> "Damping":
        """After a step whose loss fell by `gain` times what the quadratic promised (Nielsen's rule)."""
        return Damping(max(self.value * max(1 / 3, 1 - (2 * min(gain, 1.0) - 1) ** 3), 1e-12))

    def rejected(self) -> "Damping":
        """After a step that did not lower the loss."""
        return Damping(self.value * self.growth, self.growth * 2)


@dataclass(frozen=True)
class StepResult:
    """What a step did: the new theta, the damping, the loss there, and whether it moved."""

    theta: Tensor
    damping: Damping
    loss: float
    moved: bool


def lm_step(
    equations: NormalEquations,
    theta: Tensor,
    evaluate: Callable[[Tensor], float],
    project: Callable[[Tensor], Tensor],
    damping: Damping,
    tries: int = 6,
) -> StepResult:
    """One Levenberg-Marquardt step: shorten it until the loss falls.

    Args:
        equations: at theta, summed over batches and processes.
        theta: (K,) float64.
        evaluate: theta -> loss over the same samples; may be infinite, such a step is rejected.
        project: moves a theta inside its bounds.
        damping: relative to the diagonal of the matrix (Marquardt's scaling).
        tries: steps tried before theta is returned as it was.
    Returns:
        The step; where the equations are not finite none, and a loss that is not.
    """
    if not bool(torch.isfinite(equations.matrix).all() and torch.isfinite(equations.gradient).all()):
        return StepResult(theta, damping, float("nan"), False)
    diagonal = torch.diag(equations.matrix)
    scale = diagonal.clamp_min(float(diagonal.max()) * 1e-10)
    for _ in range(tries):
        step = -torch.linalg.lstsq(
            equations.matrix + damping.value * torch.diag(scale), equations.gradient[:, None], driver="gelsd"
        ).solution[:, 0]
        trial = project(theta + step)
        step = trial - theta
        promised = -float(2 * equations.gradient @ step + step @ equations.matrix @ step)
        loss = evaluate(trial)
        if loss < equations.loss:
            gain = (equations.loss - loss) / max(promised, 1e-300)
            return StepResult(trial, damping.accepted(gain), loss, True)
        damping = damping.rejected()
    return StepResult(theta, damping, equations.loss, False)
