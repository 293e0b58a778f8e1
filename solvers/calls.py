"""Which network calls a table makes: at which row, and for which branch of the condition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.conditions import concatenate_conditions

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"


@dataclass(frozen=True)
class Call:
    """One network call: output = network(state[row], timesteps[row], `branch` of the condition)."""

    row: int
    branch: str = CONDITIONAL


def one_call_a_row(num_rows: int) -> tuple[Call, ...]:
    """The calls of a table that does not state any."""
    return tuple(Call(row) for row in range(num_rows))


def check_calls(calls: Sequence[Call], num_rows: int) -> None:
    """ValueError unless calls come in the order of their rows, each (row, branch) once, inside the table."""
    if not calls:
        raise ValueError("a table needs at least one network call")
    for call in calls:
        if type(call.row) is not int or not 0 <= call.row < num_rows:
            raise ValueError(f"a call is made at row {call.row}: this table has rows 0 to {num_rows - 1}")
        if not (isinstance(call.branch, str) and call.branch):
            raise ValueError(f"a call has branch {call.branch!r}: give its name, such as {UNCONDITIONAL!r}")
    rows = [call.row for call in calls]
    if rows != sorted(rows) or len(set(calls)) < len(calls):
        raise ValueError("calls must come in the order of their rows, each branch once a row")


def branch_condition(denoiser: Any, condition: Any, branch: str) -> Any:
    """The condition of a branch: `condition` itself, the null condition, or one the denoiser names in `branches`.

    Args:
        denoiser: with `null_condition(condition)` for the unconditional branch, and perhaps `branches`, a mapping
            from further names to functions of the condition.
    Raises:
        ValueError: a branch the denoiser does not have.
    """
    if branch == CONDITIONAL:
        return condition
    known = dict(getattr(denoiser, "branches", {}))
    if callable(getattr(denoiser, "null_condition", None)):
        known[UNCONDITIONAL] = denoiser.null_condition
    if branch not in known:
        name = getattr(denoiser, "name", None) or type(denoiser).__name__
        found = ", ".join([CONDITIONAL, *known])
        raise ValueError(
            f"the solver calls the branch {branch!r}, {name} has {found}: give the denoiser a method "
            "null_condition(condition), or use a solver without such calls"
        )
    if branch == UNCONDITIONAL and condition is None:
        raise ValueError("an unconditional call needs a condition beside it: pass labels or prompt embeddings")
    return known[branch](condition)


def call_branches(
    denoiser: Callable[..., Tensor], x: Tensor, timestep: Tensor, conditions: Sequence[Any], **options: Any
) -> tuple[Tensor, ...]:
    """Outputs for several conditions of the same states, from one batch.

    Args:
        denoiser: see `solvers.sample`.
        x: (batch, *shape).
        timestep: scalar or (batch,).
        conditions: one per branch, of one structure.
    Returns:
        One output (batch, *shape) per condition, without a learned variance.
    """
    count = len(conditions)
    if count == 1:
        return (denoiser(x, timestep, conditions[0], **options),)
    repeated = timestep.repeat(count) if timestep.ndim else timestep
    output = denoiser(torch.cat([x] * count), repeated, concatenate_conditions(conditions), **options)
    return drop_learned_variance(output, x).chunk(count)


def drop_learned_variance(output: Tensor, x: Tensor) -> Tensor:
    """The first half of an output with twice the channels of `x` (learned variance); any other as it is."""
    channels = x.shape[1]
    return output[:, :channels] if output.shape[1] == 2 * channels else output
