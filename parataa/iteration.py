"""The iteration of one sample: init, step and terminate over explicit state."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parataa.acceleration import triangular_anderson
from parataa.equations import Coefs, Equations
from parataa.settings import ParallelSettings
from solvers.executor import NOISE

Kept = dict[int, Tensor]
Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class History:
    """What earlier rounds leave to the next, for the rows of the window; rows that are new have zero differences.

    Args:
        states: the last new states of the rows, (old rows, *shape).
        residual: their residuals, of the same shape.
        moved: differences of successive states, the newest first, (memory - 1 or fewer, rows, *shape).
        changed: differences of successive residuals, of the same shape.
    """

    states: Tensor
    residual: Tensor
    moved: Tensor
    changed: Tensor


@dataclass(frozen=True)
class Iterate:
    """One sample between two rounds.

    Args:
        start: states 0 to start are final; the window's rows begin here.
        states: states from `start` to the end of the window, (rows + 1, *shape).
        kept: earlier states and outputs that the window's rows use, and their noises, by index.
        history: of the last rounds; None at first and in plain iteration.
    """

    start: int
    states: Tensor
    kept: tuple[Kept, Kept, Kept] = ({}, {}, {})
    history: History | None = None


@dataclass(frozen=True)
class Progress:
    """How far a round went, in root mean squares over a sample's elements.

    Args:
        residual: first-order residuals of the window's rows before the round, (rows,).
        moved: how far the newest state moved, or would have moved in a plain step if that is farther, ().
    """

    residual: Tensor
    moved: Tensor


def init(equations: Equations, first: Tensor, draw: Draw, guess: Tensor | None = None) -> Iterate:
    """Begin at state 0, (*shape), with a guess of the states, (N+1, *shape), or copies of state 0."""
    return _refill(equations, Iterate(0, first[None].clone()), draw, guess)


def step(
    equations: Equations,
    iterate: Iterate,
    outputs: Tensor,
    settings: ParallelSettings,
    draw: Draw,
    guess: Tensor | None = None,
) -> tuple[Iterate, Progress]:
    """One round: finish rows from the noise end on, improve the others, slide the window.

    A row is finished when it hardly moves any more and all rows before it are finished; its last move is made. The row
    after it is finished as well, in its newest state. The first row of the window has final inputs, so that its own
    step is exact: N rounds always suffice.

    Args:
        equations: of the table.
        iterate: the sample.
        outputs: of the network calls at the rows of the window, (calls, *shape).
        settings: memory, regularization and safeguard of the acceleration.
        draw: a row's noise, (*shape).
        guess: states of rows that enter the window, (N+1, *shape); by default copies of the newest state.
    Returns:
        The next iterate, and how far the round went.
    """
    now = equations.at(iterate.start)
    shifted = outputs - _each(now.slope, outputs) * iterate.states[now.seen]
    exact = _combine(now.plain, equations, iterate, outputs)
    plain = _combine(now.reaching, equations, iterate, shifted)
    finished = int((_rms(plain - iterate.states[1:]) <= now.tolerance).long().cumprod(0).sum())
    improved, history = _improve(iterate, plain, settings)
    states = torch.cat([iterate.states[:1], exact[:1], improved[1:]])
    following = replace(iterate, states=states, history=history)
    following = _slide(equations, following, outputs, min(finished + 1, len(plain)))
    moves = torch.stack([states[-1], plain[-1]]) - iterate.states[-1]
    return _refill(equations, following, draw, guess), Progress(_rms(exact - iterate.states[1:]), _rms(moves).max())


def terminate(equations: Equations, iterate: Iterate) -> bool:
    """Whether every row is finished."""
    return iterate.start == equations.table.num_rows


def _combine(coefs: Coefs, equations: Equations, iterate: Iterate, outputs: Tensor) -> Tensor:
    """New states of the window's rows, (rows, *shape)."""
    columns, space = equations.at(iterate.start).columns, equations.space
    inside = (iterate.states[:-1], outputs, outputs[:0])
    values = [_stacked(*kind) for kind in zip(columns, iterate.kept, inside)]
    batches = ((coef, value[:, None]) for coef, value in zip(coefs, values) if len(value))  # of one sample each
    return space.merge(sum(space.mix(coef, space.split(batch)) for coef, batch in batches))[:, 0]


def _stacked(columns: tuple[int, ...], kept: Kept, own: Tensor) -> Tensor:
    """The states, outputs or noises that enter the window's rows, its `own` last, (columns, *shape)."""
    earlier = [kept[j] for j in columns[: len(columns) - len(own)]]
    return torch.cat([torch.stack(earlier), own]) if earlier else own


def _improve(iterate: Iterate, plain: Tensor, settings: ParallelSettings) -> tuple[Tensor, History | None]:
    """New states of all rows, accelerated where the last round brought the residual down, and what to remember."""
    if settings.memory == 1:
        return plain, None
    residual = plain - iterate.states[1:]
    history = _remember(iterate.history, iterate.states[1:], residual, settings.memory)
    if iterate.history is None:
        return plain, history
    moved, changed = history.moved.flatten(2), history.changed.flatten(2)
    correction = triangular_anderson(residual.flatten(1), moved, changed, settings.regularization)
    trusted = _trusted(residual, iterate.history.residual, settings.safeguard)
    correction = torch.where(_each(trusted, plain), correction.reshape(plain.shape), 0.0)
    return plain + correction, history


def _trusted(residual: Tensor, before: Tensor, safeguard: float) -> Tensor:
    """Rows up to which the residual fell below `safeguard` times that of the last round, bool (rows,)."""
    now, last = (values.flatten(1).square().sum(1).cumsum(0).sqrt() for values in (residual[: len(before)], before))
    new = torch.zeros(len(residual) - len(before), dtype=torch.bool, device=residual.device)
    return torch.cat([now < safeguard * last, new])


def _remember(history: History | None, states: Tensor, residual: Tensor, memory: int) -> History:
    """The history with one more difference in front, the oldest dropped."""
    if history is None:
        none = states.new_zeros(0, *states.shape)
        return History(states, residual, none, none)
    return History(
        states,
        residual,
        torch.cat([_difference(states, history.states)[None], history.moved])[: memory - 1],
        torch.cat([_difference(residual, history.residual)[None], history.changed])[: memory - 1],
    )


def _difference(new: Tensor, old: Tensor) -> Tensor:
    return torch.cat([new[: len(old)] - old, torch.zeros_like(new[len(old) :])])


def _slide(equations: Equations, iterate: Iterate, outputs: Tensor, rows: int) -> Iterate:
    """Drop the first rows of the window, keeping what later rows use."""
    start = iterate.start + rows
    states = dict(zip(range(iterate.start, start), iterate.states))
    fresh = (states, dict(zip(equations.calls(iterate.start, start), outputs)), {})
    kept = tuple(
        {j: value.clone() for j, value in {**old, **new}.items() if equations.keeps(kind, j, start)}
        for kind, (old, new) in enumerate(zip(iterate.kept, fresh))
    )
    history = iterate.history
    if history is not None:
        added = equations.stop(start) - equations.stop(iterate.start)
        moved, changed = (_shifted(values, rows, added) for values in (history.moved, history.changed))
        history = History(history.states[rows:], history.residual[rows:], moved, changed)
    return Iterate(start, iterate.states[rows:], kept, history)


def _shifted(values: Tensor, rows: int, added: int) -> Tensor:
    """(memory, rows, *shape) without its first rows and with new rows of zeros."""
    return torch.cat([values[:, rows:], values.new_zeros(len(values), added, *values.shape[2:])], dim=1)


def _refill(equations: Equations, iterate: Iterate, draw: Draw, guess: Tensor | None) -> Iterate:
    """Let new rows into the window: their states from the guess, their noises drawn."""
    if terminate(equations, iterate):
        return iterate
    stop, states = equations.stop(iterate.start), iterate.states
    missing = stop + 1 - iterate.start - len(states)
    fresh = states[-1:].expand(missing, *states.shape[1:]) if guess is None else guess[stop + 1 - missing : stop + 1]
    noises = {
        j: iterate.kept[NOISE][j] if j in iterate.kept[NOISE] else draw(j)
        for j in equations.at(iterate.start).columns[NOISE]
    }
    return replace(iterate, states=torch.cat([states, fresh]), kept=(*iterate.kept[:2], noises))


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(rows,) shaped to broadcast over (rows, *shape)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _rms(values: Tensor) -> Tensor:
    """Root mean square of each row, (rows,)."""
    return values.flatten(1).square().mean(1).sqrt()
