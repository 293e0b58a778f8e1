"""The only sequential sampling loop: it runs any table, in training and in inference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from solvers.noise import row_noise
from solvers.table import SolverTable

Denoiser = Callable[[Tensor, Tensor, Any], Tensor]
StepNoise = Tensor | Callable[[int], Tensor] | None


@dataclass(frozen=True)
class Trace:
    """All states (N+1) and outputs (N) of a run, each (batch, *shape)."""

    states: list[Tensor]
    outputs: list[Tensor]


def sample(
    denoiser: Denoiser,
    table: SolverTable,
    noise: Tensor,
    condition: Any = None,
    *,
    step_noise: StepNoise = None,
    seeds: Sequence[int] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run a solver table.

        state[i+1] = sum_j state_coef[i,j] state[j] + output_coef[i,j] output[j] + noise_coef[i,j] noise[j]

    States accumulate in the dtype of `noise`, or float32 when that is narrower, whatever the network runs in.
    Autograd flows through the table's coefficients, its timesteps and the network.

    Args:
        denoiser: `denoiser(x, timestep, condition) -> output`; x (batch, *shape), timestep a scalar float tensor. One
            that sets `needs_node = True` is also passed `node=(alpha, sigma)`, as thresholding requires.
        table: the solver; its noise columns need `step_noise` or `seeds`.
        noise: (batch, *shape), unit Gaussian.
        condition: passed through to the denoiser.
        step_noise: fresh unit noises, (N, batch, *shape), or a callable of the row that returns (batch, *shape).
        seeds: one integer per sample; row r's noise of sample k is drawn from (seeds[k], r).
        callback: called after each row with (row, new state).
    Returns:
        The final state, (batch, *shape), in the dtype of `noise`.
    Raises:
        ValueError: a stochastic table without `step_noise` or `seeds`, or noises of a wrong shape.
    """
    return (
        _run(denoiser, table, noise, condition, step_noise, seeds, callback, keep_all=False).states[-1].to(noise.dtype)
    )


def sample_trace(
    denoiser: Denoiser,
    table: SolverTable,
    noise: Tensor,
    condition: Any = None,
    *,
    step_noise: StepNoise = None,
    seeds: Sequence[int] | None = None,
) -> Trace:
    """Like `sample`, but returns all states and outputs, in the dtype states accumulate in."""
    return _run(denoiser, table, noise, condition, step_noise, seeds, None, keep_all=True)


def noise_source(
    table: SolverTable, noise: Tensor, step_noise: StepNoise, seeds: Sequence[int] | None
) -> Callable[[int], Tensor]:
    """A function of the row that returns its fresh unit noise, (batch, *shape), on the device of `noise`.

    Raises:
        ValueError: a stochastic table without `step_noise` or `seeds`, or noises of a wrong shape.
    """
    if not table.is_stochastic:
        return lambda row: torch.zeros_like(noise)
    if callable(step_noise):
        return lambda row: step_noise(row).to(noise.device)
    if step_noise is not None:
        if tuple(step_noise.shape) != (table.nfe, *noise.shape):
            raise ValueError(f"step_noise has shape {tuple(step_noise.shape)}: needed is {(table.nfe, *noise.shape)}")
        return lambda row: step_noise[row].to(noise.device)
    if seeds is None:
        raise ValueError("this table has noise columns: pass seeds (one per sample) or step_noise (N, batch, *shape)")
    if len(seeds) != len(noise):
        raise ValueError(f"{len(seeds)} seeds for a batch of {len(noise)}: needed is one per sample")
    return lambda row: row_noise(seeds, row, noise.shape[1:]).to(noise.device)


def _run(denoiser, table, noise, condition, step_noise, seeds, callback, keep_all) -> Trace:
    accumulate = torch.promote_types(noise.dtype, torch.float32)
    timesteps = table.timesteps.to(noise.device, accumulate).unbind()
    terms = _terms(table, noise.device, accumulate)
    dead = [[] for _ in terms] if keep_all else _dead(terms)
    draw = noise_source(table, noise, step_noise, seeds)
    call = row_call(denoiser, table)
    states = {0: noise.to(accumulate) * table.start_scale}
    history: tuple[dict[int, Tensor], ...] = (states, {}, {})
    for row in range(table.nfe):
        history[_OUTPUT][row] = call(states[row], timesteps[row], condition, row).to(accumulate)
        for block, column, _ in terms[row]:
            if block == _NOISE and column not in history[_NOISE]:
                history[_NOISE][column] = draw(column).to(accumulate)
        states[row + 1] = _combine(terms[row], history) if terms[row] else torch.zeros_like(states[row])
        for block, column in dead[row]:
            del history[block][column]
        if callback is not None:
            callback(row, states[row + 1])
    return Trace(list(states.values()), list(history[_OUTPUT].values()))


_STATE, _OUTPUT, _NOISE = range(3)
_Term = tuple[int, int, Tensor]


def _terms(table: SolverTable, device: torch.device, dtype: torch.dtype) -> list[list[_Term]]:
    """What each row combines, (block, column, weight), the newest output first; moved once, so that rows are not."""
    rows: list[list[_Term]] = [[] for _ in range(table.nfe)]
    for block, coef, support in (
        (_OUTPUT, table.output_coef, table.output_support),
        (_STATE, table.state_coef, table.state_support),
        (_NOISE, table.noise_coef, table.noise_coef.detach() != 0),
    ):
        places = support.nonzero().flip(0)
        weights = coef[places[:, 0], places[:, 1]].to(device, dtype).unbind()
        for (row, column), weight in zip(places.tolist(), weights):
            rows[row].append((block, column, weight))
    return rows


def _dead(terms: list[list[_Term]]) -> list[list[tuple[int, int]]]:
    """What may go after each row, (block, column): no later row uses it."""
    last = {(block, row): row for row in range(len(terms)) for block in (_STATE, _OUTPUT)}
    last |= {(block, column): row for row, row_terms in enumerate(terms) for block, column, _ in row_terms}
    dead: list[list[tuple[int, int]]] = [[] for _ in terms]
    for place, row in last.items():
        dead[row].append(place)
    return dead


def _combine(terms: list[_Term], history: tuple[dict[int, Tensor], ...]) -> Tensor:
    """One row of the table, each term one pass; in place where nothing is differentiated.

    The newest output comes first because under `vmap` it is batched whenever anything is.
    """
    add = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
    (block, column, weight), *others = terms
    total = weight * history[block][column]
    for block, column, weight in others:
        total = add(total, weight, history[block][column])
    return total


def row_call(denoiser: Denoiser, table: SolverTable) -> Callable[[Tensor, Tensor, Any, int], Tensor]:
    """(state, timestep, condition, row) -> output: the denoiser, told its node where it asks for one."""
    if not getattr(denoiser, "needs_node", False):
        return lambda state, timestep, condition, row: denoiser(state, timestep, condition)
    nodes = list(zip(table.alpha, table.sigma))
    told = cast(Callable[..., Tensor], denoiser)
    return lambda state, timestep, condition, row: told(state, timestep, condition, node=nodes[row])
