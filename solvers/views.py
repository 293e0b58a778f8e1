"""Other views of a table: canonical form, rows that reach back further, and where perfect outputs would lead.

All of it is algebra of weights, done on their matrices (`Space.matrix`), so it holds for numbers and for operators.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from solvers.prediction import output_weights

if TYPE_CHECKING:
    from solvers.table import SolverTable


@dataclass(frozen=True)
class CanonicalTable:
    """States 1..N in the unit start noise (N, *ops), the outputs (N, K, *ops) and the fresh noises (N, N, *ops)."""

    start: Tensor
    output: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Consistency:
    """Differences to the nodes of states 1..N: alpha_error (N,), sigma_error (N,)."""

    alpha_error: Tensor
    sigma_error: Tensor

    @property
    def worst(self) -> float:
        """Largest absolute difference."""
        return float(torch.cat([self.alpha_error, self.sigma_error]).abs().max())


def canonical(table: "SolverTable") -> CanonicalTable:
    """Every state in the start noise, the outputs and the fresh noises alone, by forward substitution."""
    n, k, matrix = table.num_rows, table.nfe, table.space.matrix
    state = matrix(table.state_coef)
    size = state.shape[-1] // n  # numbers of a weight's side
    start = matrix(table.space.embed(torch.tensor([[table.start_scale]], dtype=torch.float64)))
    fresh = torch.cat([matrix(table.output_coef), matrix(table.noise_coef)], -1)
    known = torch.cat([start, torch.zeros(*start.shape[:-1], fresh.shape[-1], dtype=torch.float64)], -1)
    for i in range(n):
        row = slice(i * size, (i + 1) * size)
        mixed = state[..., row, : (i + 1) * size] @ known
        own = torch.cat([torch.zeros_like(start), fresh[..., row, :]], -1)
        known = torch.cat([known, mixed + own], -2)
    found = table.space.weights(known[..., size:, :])
    return CanonicalTable(found[:, 0], found[:, 1 : k + 1], found[:, k + 1 :])


def local(table: "SolverTable", order: int, start: int = 0) -> "SolverTable":
    """See `SolverTable.local`."""
    n = table.num_rows
    if not 1 <= order <= n:
        raise ValueError(f"order is {order}: a table of {n} rows has orders 1 to {n}")
    if not 0 <= start < n:
        raise ValueError(f"start is {start}: the frozen states of a table of {n} rows are 0 to {n - 1}")
    blocks = (table.state_coef, table.output_coef, table.noise_coef)
    own = torch.cat([block.detach() for block in blocks], 1)  # columns: states, outputs, noises
    rows = own.clone()
    if order >= n - start:  # nothing but `start` stops the substitution: one triangular system
        rows[start:] = _substituted(table, rows[start:], start)
    else:
        for back in range(order - 1):
            row = torch.arange(start + 1 + back, n)  # state row - back, all rows at once
            weight = rows[row, row - back]
            rows[row, row - back] = 0
            rows[row] += table.space.scale(weight, own[row - back - 1])
    state_coef, output_coef, noise_coef = (part.contiguous() for part in rows.split([n, table.nfe, n], 1))
    return replace(
        table,
        state_coef=state_coef,
        output_coef=output_coef,
        noise_coef=noise_coef,
        state_support=None,
        output_support=None,
    )


def consistency(table: "SolverTable") -> Consistency:
    """See `SolverTable.consistency`."""
    data, noise = propagate(table, (table.alpha, table.sigma))
    return Consistency(data[1:] - table.alpha[1:], noise[1:] - table.sigma[1:])


def propagate(table: "SolverTable", nodes: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Data part and noise norm of all states under perfect outputs, (N+1,) each; of an operator table its scalar part.

    Args:
        table: the rows; its alpha[0] and sigma[0] are where state 0 starts.
        nodes: (alpha, sigma), (N+1,) each, at which outputs are read; by default the propagated ones (induction),
            which is how the nodes of a table are found when only its rows are known.
    """
    n, table = table.num_rows, table.scalar_part()
    state_coef, output_coef, noise_coef = (c.detach() for c in (table.state_coef, table.output_coef, table.noise_coef))
    states = torch.zeros(n + 1, n + 2, dtype=torch.float64)  # columns: data, start noise, fresh noises
    outputs = torch.zeros(table.nfe, n + 2, dtype=torch.float64)
    states[0, :2] = torch.stack([table.alpha[0], table.sigma[0]]).detach()
    for row in table.plan:
        i = row.index
        norm = states[i, 1:].norm()
        alpha, sigma = (states[i, 0], norm) if nodes is None else (nodes[0][i].detach(), nodes[1][i].detach())
        on_data, on_noise = output_weights(table.prediction_type, alpha, sigma)
        for call in row.calls:
            outputs[call, 0] = on_data
            outputs[call, 1:] = on_noise * states[i, 1:] / norm.clamp_min(1e-300)
        states[i + 1] = state_coef[i] @ states[:n] + output_coef[i] @ outputs
        states[i + 1, 2:] += noise_coef[i]
    return states[:, 0], states[:, 1:].norm(dim=1)


def _substituted(table: "SolverTable", rows: Tensor, start: int) -> Tensor:
    """Rows start to N - 1, (N - start, 2 N + K, *ops), without the states after `start`."""
    n, known = table.num_rows, rows.clone()
    known[:, start + 1 : n] = 0
    unknown = table.space.matrix(rows[:, start + 1 : n])
    matrix = torch.eye(unknown.shape[-2], dtype=rows.dtype).expand(*unknown.shape[:-2], -1, -1).clone()
    matrix[..., : unknown.shape[-1]] -= unknown
    right = table.space.matrix(known)
    return table.space.weights(torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True))
