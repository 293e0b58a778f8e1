"""How a row of a table is computed: the one place that combines states, outputs and noises.

`plan_rows` says, from the supports alone, what each row evaluates, combines and forgets; `Executor` binds a table to
samples, so that a row is a few weighted sums, term by term. The sampler and the searches run it; what has many rows at
once (the tuner, the parallel sampler) adds them up by the space's `mix`, the same sums as one product of matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from solvers.calls import Call, branch_condition, call_branches

if TYPE_CHECKING:
    from solvers.table import SolverTable

Denoiser = Callable[..., Tensor]
Key = tuple[int, int]  # (block, column)
STATE, OUTPUT, NOISE = range(3)


@dataclass(frozen=True)
class Row:
    """What happens at one row of a table.

    Args:
        index: which row.
        calls: columns of the outputs evaluated here, as one batch.
        branches: branch of the condition of each.
        terms: (block, column) combined into the next state, the newest output first: under `vmap` it is batched
            whenever anything is.
        noises: columns of the noises first used here.
        dead: (block, column) that no later row uses.
    """

    index: int
    calls: tuple[int, ...]
    branches: tuple[str, ...]
    terms: tuple[Key, ...]
    noises: tuple[int, ...]
    dead: tuple[Key, ...]


def plan_rows(calls: Sequence[Call], supports: tuple[Tensor, Tensor, Tensor]) -> tuple[Row, ...]:
    """The rows of a table with these calls and these supports of states, outputs and noises."""
    terms: list[list[Key]] = [[] for _ in supports[STATE]]
    for block in (OUTPUT, STATE, NOISE):
        for row, column in supports[block].nonzero().flip(0).tolist():
            terms[row].append((block, column))
    first = {key: row for row, keys in reversed(list(enumerate(terms))) for key in keys}
    last = {(STATE, row): row for row in range(len(terms))} | {(OUTPUT, k): c.row for k, c in enumerate(calls)}
    last |= {key: row for row, keys in enumerate(terms) for key in keys}
    made = [[k for k, call in enumerate(calls) if call.row == row] for row in range(len(terms))]
    return tuple(
        Row(
            row,
            tuple(made[row]),
            tuple(calls[k].branch for k in made[row]),
            tuple(keys),
            tuple(column for block, column in keys if block == NOISE and first[block, column] == row),
            tuple(key for key, end in last.items() if end == row),
        )
        for row, keys in enumerate(terms)
    )


class Executor:
    """A table at work on samples of one shape, device and dtype.

    Args:
        table: the solver; autograd flows through its coefficients and timesteps.
        like: (batch, *shape), of the dtype that states accumulate in.
    Raises:
        ValueError: samples that the table's weights do not act on.
    """

    def __init__(self, table: "SolverTable", like: Tensor) -> None:
        self.table, self.rows = table, table.plan
        self.space = table.space.bind(like.shape[1:], like.device)
        self.timesteps = table.timesteps.to(like.device, like.dtype).unbind()
        self.weights = _row_weights(table, like)

    def combine(self, row: int, history: Mapping[Key, Tensor]) -> Tensor | None:
        """State row + 1 from the split values its row uses; None where it uses none."""
        total = None
        for key, weight in zip(self.rows[row].terms, self.weights[row]):
            total = self.space.add(total, weight, history[key])
        return total


def _row_weights(table: "SolverTable", like: Tensor) -> list[tuple[Tensor, ...]]:
    """Weight of each term of each row; moved to the device once, so that rows are not."""
    blocks = (table.state_coef, table.output_coef, table.noise_coef)
    weights: list[dict[Key, Tensor]] = [{} for _ in table.plan]
    for block, coef in enumerate(blocks):
        places = [(row.index, column) for row in table.plan for kind, column in row.terms if kind == block]
        rows, columns = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).unbind(1)
        for (row, column), weight in zip(places, coef[rows, columns].to(like.device, like.dtype).unbind()):
            weights[row][block, column] = weight
    return [tuple(weights[row.index][key] for key in row.terms) for row in table.plan]


def evaluator(denoiser: Denoiser, table: "SolverTable", condition: Any) -> Callable[..., tuple[Tensor, ...]]:
    """(state, timestep, row) -> the outputs of the calls of that row; see `called` and `branch_conditions`."""
    denoiser = called(denoiser, table)
    conditions = branch_conditions(denoiser, table, condition)

    def evaluate(state: Tensor, timestep: Tensor, row: Row) -> tuple[Tensor, ...]:
        if not row.calls:
            return ()
        chosen = [conditions[branch] for branch in row.branches]
        return call_branches(denoiser, state, timestep, chosen, **told_node(denoiser, table, row.index))

    return evaluate


def called(denoiser: Denoiser, table: "SolverTable") -> Denoiser:
    """The network a table calls: inside a guided denoiser, where the table makes the calls of guidance itself."""
    return getattr(denoiser, "unguided", denoiser) if table.has_branches else denoiser


def branch_conditions(denoiser: Denoiser, table: "SolverTable", condition: Any) -> dict[str, Any]:
    """The condition of each branch that the table calls.

    Args:
        denoiser: see `solvers.sample`.
        table: the solver.
        condition: of the samples.
    Raises:
        ValueError: a branch that the denoiser does not have, or several of one whose outputs are not linear.
    """
    branches = sorted({call.branch for call in table.calls})
    if getattr(denoiser, "needs_node", False) and table.has_branches:
        raise ValueError(
            "the denoiser thresholds its outputs, which is not linear in the calls that the solver combines: "
            "switch thresholding off, or use a solver for the guided denoiser"
        )
    return {branch: branch_condition(denoiser, condition, branch) for branch in branches}


def told_node(denoiser: Denoiser, table: "SolverTable", row: int | Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(alpha, sigma) of a row or of several, as the keyword `node`, for a denoiser that sets `needs_node`."""
    return {"node": (table.alpha[row], table.sigma[row])} if getattr(denoiser, "needs_node", False) else {}
