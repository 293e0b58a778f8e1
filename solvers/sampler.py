"""The only sequential sampling loop: it runs any table, in training and in inference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.executor import NOISE, OUTPUT, STATE, Denoiser, Executor, Key, evaluator
from solvers.noise import row_noise
from solvers.table import SolverTable

StepNoise = Tensor | Callable[[int], Tensor] | None


@dataclass(frozen=True)
class Trace:
    """All states (N+1) and the outputs of all calls of a run, each (batch, *shape)."""

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
        if tuple(step_noise.shape) != (table.num_rows, *noise.shape):
            needed = (table.num_rows, *noise.shape)
            raise ValueError(f"step_noise has shape {tuple(step_noise.shape)}: needed is {needed}")
        return lambda row: step_noise[row].to(noise.device)
    if seeds is None:
        raise ValueError("this table has noise columns: pass seeds (one per sample) or step_noise (N, batch, *shape)")
    if len(seeds) != len(noise):
        raise ValueError(f"{len(seeds)} seeds for a batch of {len(noise)}: needed is one per sample")
    return lambda row: row_noise(seeds, row, noise.shape[1:]).to(noise.device)


def _run(denoiser, table, noise, condition, step_noise, seeds, callback, keep_all) -> Trace:
    accumulate = torch.promote_types(noise.dtype, torch.float32)
    state = noise.to(accumulate) * table.start_scale
    run, draw = Executor(table, state), noise_source(table, noise, step_noise, seeds)
    evaluate = evaluator(denoiser, table, condition)
    states, outputs = [state], []
    history: dict[Key, Tensor] = {(STATE, 0): run.space.split(state)}
    for row in run.rows:
        for column, output in zip(row.calls, evaluate(state, run.timesteps[row.index], row)):
            outputs += [output.to(accumulate)] * keep_all
            history[OUTPUT, column] = run.space.split(output.to(accumulate))
        history |= {(NOISE, column): run.space.split(draw(column).to(accumulate)) for column in row.noises}
        total = run.combine(row.index, history)
        state = torch.zeros_like(state) if total is None else run.space.merge(total)
        history[STATE, row.index + 1] = run.space.split(state) if total is None else total
        for key in row.dead:
            del history[key]
        states = [*states, state] if keep_all else [state]
        if callback is not None:
            callback(row.index, state)
    return Trace(states, outputs)
