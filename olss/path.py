"""Which of the teacher's states a solver visits: 0 <= path[0] < path[1] < ... < path[N-1] < M, and M at the end."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from olss.fit import Factor, solve
from solvers.table import SolverTable


def check_path(path: Sequence[int], num_steps: int) -> list[int]:
    """`path` as a list, or ValueError when it is not 0 <= path[0] < ... < path[N-1] < num_steps."""
    path = list(path)
    if not path or path[0] < 0 or path[-1] >= num_steps or any(a >= b for a, b in pairwise(path)):
        raise ValueError(f"path {path} must increase from 0 or later, and stay below the teacher's {num_steps} steps")
    return path


def uniform_path(num_steps: int, nfe: int) -> list[int]:
    """Index round(i M / N)."""
    check_nfe(nfe, num_steps)
    return [round(i * num_steps / nfe) for i in range(nfe)]


def check_nfe(nfe: int, num_steps: int) -> None:
    """ValueError unless 1 <= nfe <= num_steps."""
    if not 1 <= nfe <= num_steps:
        raise ValueError(f"a solver of {nfe} rows cannot follow a teacher of {num_steps}: use 1 to {num_steps}")


def log_snr_path(table: SolverTable, nfe: int) -> list[int]:
    """Steps of equal size in log(alpha / sigma), from the first node where it is finite to the last evaluated one."""
    check_nfe(nfe, table.num_rows)
    log_snr = (table.alpha / table.sigma).log()[:-1]
    finite = log_snr[torch.isfinite(log_snr)]
    wanted = torch.linspace(float(finite[0]), float(finite[-1]), nfe + 1, dtype=torch.float64)[1:-1]
    nearest = [int((log_snr - value).abs().argmin()) for value in wanted]
    return distinct([0, *nearest], table.num_rows)


def distinct(positions: Sequence[float], num_steps: int, lowest: int = 0) -> list[int]:
    """Rounded positions, moved apart as little as an increasing path from `lowest` needs."""
    path: list[int] = []
    for index, position in enumerate(positions):
        highest = num_steps - (len(positions) - index)
        path.append(min(max(round(position), path[-1] + 1 if path else lowest), highest))
    return path


def greedy_path(factor: Factor, teacher: SolverTable, nfe: int, ridge: float = 0.0) -> list[int]:
    """The paper's path: the smallest error bound per step that N steps can meet, found by bisection.

    From each state the path goes to the furthest one that the current state and all outputs so far approximate
    within the bound (binary search, as the error grows with the distance). The bound is bisected in its logarithm.
    Points that the search leaves over halve the steps with the largest errors.

    Args:
        factor: columns [X[0], F[0..K-1], X[1..M]] of the teacher's trajectories.
        teacher: its table.
        nfe: N rows, 1 <= N <= M.
        ridge: see `solve`.
    Returns:
        path, N indices.
    Source: arXiv 2305.14677, section 3.3; there the bound is bisected linearly in [0, 10].
    """
    check_nfe(nfe, teacher.num_rows)
    errors = _StepErrors(factor, teacher, ridge)
    low, high = errors.range()
    for _ in range(40):
        middle = (low + high) / 2
        if _walk(errors, math.exp(middle), nfe) is None:
            low = middle
        else:
            high = middle
    path = _walk(errors, math.exp(high), nfe) or [0]
    return _fill(errors, path, nfe)


class _StepErrors:
    """Errors of single steps, remembered by the path walked so far."""

    def __init__(self, factor: Factor, teacher: SolverTable, ridge: float) -> None:
        self.factor, self.teacher, self.num_steps, self.ridge = factor, teacher, teacher.num_rows, ridge
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, path: Sequence[int]) -> Tensor:
        """Error of the step from path[-1] to each state 1..M; those at or before path[-1] are 0."""
        key = tuple(path)
        if key not in self._known:
            self._known[key] = self._solve(key)
        return self._known[key]

    def range(self) -> tuple[float, float]:
        """Logarithms of bounds: no step meets the first, every step meets the second."""
        return math.log(1e-16), math.log(max(float(self([0]).max()), 1e-12)) + 1

    def _solve(self, path: tuple[int, ...]) -> Tensor:
        targets = [state_column(i, self.teacher) for i in range(path[-1] + 1, self.num_steps + 1)]
        outputs = [column for point in path for column in output_columns(point, self.teacher)]
        basis = [state_column(path[-1], self.teacher), *outputs]
        error = solve(self.factor, basis, targets, self.ridge).error
        return torch.cat([torch.zeros(path[-1], dtype=torch.float64), error])


def state_column(index: int, teacher: SolverTable) -> int:
    """Column of teacher state `index` in [X[0], F[0..K-1], X[1..M]]."""
    return 0 if index == 0 else teacher.nfe + index


def output_columns(index: int, teacher: SolverTable) -> list[int]:
    """Columns of the calls at teacher state `index` in [X[0], F[0..K-1], X[1..M]]."""
    return [1 + column for column, call in enumerate(teacher.calls) if call.row == index]


def _walk(errors: _StepErrors, bound: float, nfe: int) -> list[int] | None:
    """The greedy path under a bound, or None when it needs more than `nfe` steps."""
    path = [0]
    while True:
        target = _furthest(errors(path), path[-1], bound)
        if target == errors.num_steps:
            return path
        if len(path) == nfe:
            return None
        path.append(target)


def _furthest(error: Tensor, start: int, bound: float) -> int:
    """Furthest state within the bound by binary search; the next one where none is."""
    low, high = start + 1, len(error)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if error[middle - 1] <= bound else (low, middle - 1)
    return low


def _fill(errors: _StepErrors, path: list[int], nfe: int) -> list[int]:
    """Halve the step of largest error that can be halved, until there are `nfe` points."""
    while len(path) < nfe:
        ends = [*path[1:], errors.num_steps]
        steps = [(float(errors(path[: i + 1])[end - 1]), i) for i, end in enumerate(ends) if end - path[i] > 1]
        _, widest = max(steps)
        path = sorted([*path, (path[widest] + ends[widest]) // 2])
    return path
