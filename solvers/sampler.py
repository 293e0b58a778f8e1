"""The only sequential sampling loop: it runs any table, in training and in inference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    timesteps, coefs = _on(noise.device, accumulate, table)
    terms = _terms(table)
    last_use = table.last_use()
    draw = noise_source(table, noise, step_noise, seeds)
    call = row_call(denoiser, table)
    states = {0: noise.to(accumulate) * table.start_scale}
    history = (states, {}, {})
    for row in range(table.nfe):
        history[1][row] = call(states[row], timesteps[row], condition, row).to(accumulate)
        for column in terms[row][2]:
            if column not in history[2]:
                history[2][column] = draw(column).to(accumulate)
        states[row + 1] = _combine(row, coefs, terms[row], history)
        if not keep_all:
            _forget(history, last_use, row)
        if callback is not None:
            callback(row, states[row + 1])
    return Trace(list(states.values()), list(history[1].values()))


def _on(device: torch.device, dtype: torch.dtype, table: SolverTable) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Timesteps and coefficient blocks moved once, so that the loop holds no transfers."""
    coefs = (table.state_coef, table.output_coef, table.noise_coef)
    return table.timesteps.to(device, dtype), tuple(coef.to(device, dtype) for coef in coefs)


def _terms(table: SolverTable) -> list[tuple[list[int], list[int], list[int]]]:
    """The columns each row combines: (states, outputs, noises)."""
    supports = (table.state_support, table.output_support, table.noise_coef.detach() != 0)
    rows = zip(*(support.tolist() for support in supports))
    return [tuple([j for j, used in enumerate(block) if used] for block in row) for row in rows]


def _combine(row, coefs, terms, history) -> Tensor:
    """One row of the table; `addcmul` with a scalar tensor is one pass and keeps every kind of derivative."""
    total = None
    for coef, columns, values in zip(coefs, terms, history):
        for column in columns:
            weight, value = coef[row, column], values[column]
            total = weight * value if total is None else torch.addcmul(total, weight, value)
    return torch.zeros_like(history[0][row]) if total is None else total


def _forget(history, last_use, row) -> None:
    """Drop what no later row uses; the newest state is the next evaluation's input and always stays."""
    for values, last in zip(history, last_use):
        for column in [j for j in values if j <= row and last[j] <= row]:
            del values[column]


def row_call(denoiser: Denoiser, table: SolverTable) -> Callable[[Tensor, Tensor, Any, int], Tensor]:
    """(state, timestep, condition, row) -> output: the denoiser, told its node where it asks for one."""
    if not getattr(denoiser, "needs_node", False):
        return lambda state, timestep, condition, row: denoiser(state, timestep, condition)
    nodes = list(zip(table.alpha, table.sigma))
    return lambda state, timestep, condition, row: denoiser(state, timestep, condition, node=nodes[row])
