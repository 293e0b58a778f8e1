"""Least squares for OLSS: a running triangular factor of the trajectories, and tiny solves on its columns.

The columns of a trajectory matrix are states and outputs, its rows all elements of all samples. Only the triangular
factor R of its QR decomposition is kept, so memory does not grow with the number of trajectories, and every
least-squares problem among the columns is one among the columns of R, with the accuracy of QR.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONDITION_LIMIT = 1e8
_CHUNK, _LARGE_CHUNK = 2**12, 2**16  # rows factored at a time: enough for fast matrix products on a CPU, on a GPU
_RCOND = 1e-14  # singular values below this, relative to the largest, are rounding errors


@dataclass
class Factor:
    """R of the columns of a matrix whose rows arrive in blocks.

    Args:
        r: (k, k) float64, upper triangular; zeros at the start.
        num_rows: rows seen so far.
    """

    r: Tensor
    num_rows: int = 0

    @classmethod
    def empty(cls, num_columns: int) -> "Factor":
        """Before any row."""
        return cls(torch.zeros(num_columns, num_columns, dtype=torch.float64))

    def add(self, columns: Sequence[Tensor]) -> None:
        """Append rows, given as equally shaped tensors, one per column; every element is a row."""
        flat = [column.reshape(-1) for column in columns]
        self.r = self.r.to(flat[0].device)
        rows = _CHUNK if flat[0].device.type == "cpu" else _LARGE_CHUNK
        for start in range(0, len(flat[0]), rows):
            block = torch.stack([column[start : start + rows] for column in flat]).double()
            self.r = _triangle(torch.cat([self.r.T, block], 1).T)  # column by column, as LAPACK wants it
        self.num_rows += len(flat[0])

    def merge(self, factors: Tensor, num_rows: int) -> None:
        """Replace R by that of all `factors`, (processes, k, k), which saw `num_rows` rows together."""
        self.r, self.num_rows = _triangle(factors.reshape(-1, factors.shape[-1])), num_rows


@dataclass(frozen=True)
class Solution:
    """Coefficients (basis, targets), root-mean-square residual (targets,), and the condition number of the basis."""

    coef: Tensor
    error: Tensor
    condition: float


def solve(
    factor: Factor, basis: Sequence[int], targets: Sequence[int], ridge: float = 0.0, prior: Tensor | None = None
) -> Solution:
    """Best approximation of some columns by others.

        minimise mean |sum_j coef[j] column[basis[j]] - column[target]|^2 + ridge sum_j (coef[j] - prior[j])^2

    LAPACK's gelsd with a fixed cut-off: gelsy and the default cut-offs decide the rank by the number of rows.

    Args:
        factor: of all columns, with at least one row.
        basis: indices of the columns to combine.
        targets: indices of the columns to approximate.
        ridge: penalty on the coefficients, in units of squared column elements.
        prior: (basis, targets), what the penalty draws to; default zero.
    Returns:
        Solution; its error is without the penalty.
    Raises:
        ValueError: columns that are not finite.
    """
    if not bool(torch.isfinite(factor.r).all()):
        raise ValueError("trajectories or outputs of the network hold NaN or infinity: there is nothing to fit to them")
    rows = max(factor.num_rows, 1)
    scale = rows**-0.5
    r = factor.r.cpu()
    matrix, wanted = (r[:, list(columns)] * scale for columns in (basis, targets))
    prior = torch.zeros(len(basis), len(targets), dtype=torch.float64) if prior is None else prior
    wanted = wanted - matrix @ prior
    penalty = ridge**0.5 * torch.eye(len(basis) if ridge else 0, len(basis), dtype=torch.float64)
    zeros = torch.zeros(len(penalty), wanted.shape[1], dtype=torch.float64)
    stacked = torch.cat([matrix, penalty]), torch.cat([wanted, zeros])
    found = torch.linalg.lstsq(*stacked, rcond=_RCOND, driver="gelsd")
    values = found.singular_values
    condition = float(values[0] / values[-1]) if values[-1] > 0 else float("inf")
    error = (matrix @ found.solution - wanted).norm(dim=0)
    return Solution(found.solution + prior, error, condition)


def warn_if_ill_conditioned(condition: float, row: int) -> None:
    """Say so when coefficients are no longer determined by the trajectories."""
    if condition > CONDITION_LIMIT:
        warnings.warn(
            f"row {row}: the condition number of the basis is {condition:.1e} (above {CONDITION_LIMIT:.0e}), so its "
            "coefficients are not well determined: use more trajectories, fewer steps or a ridge such as 1e-8",
            stacklevel=2,
        )


def _triangle(matrix: Tensor) -> Tensor:
    """Upper triangle with a non-negative diagonal, which makes it unique."""
    r = torch.linalg.qr(matrix, mode="r").R
    return r * torch.where(r.diagonal() < 0, -1.0, 1.0)[:, None]
