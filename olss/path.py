"""Which of the teacher's states the student visits: path[0] = 0 < path[1] < ... < path[N-1] < M, and M at the end."""

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
        raise ValueError(f"a student of {nfe} evaluations cannot follow a teacher of {num_steps}: use 1 to {num_steps}")


def power_path(num_steps: int, nfe: int, power: float) -> list[int]:
    """Index M (i / N)^power, made distinct: below 1 dense towards the image, above 1 dense towards the noise."""
    check_nfe(nfe, num_steps)
    return distinct([num_steps * i**power / nfe**power for i in range(nfe)], num_steps)


def log_snr_path(table: SolverTable, nfe: int) -> list[int]:
    """Steps of equal size in log(alpha / sigma), from the first node where it is finite to the last evaluated one."""
    check_nfe(nfe, table.nfe)
    log_snr = (table.alpha / table.sigma).log()[:-1]
    finite = log_snr[torch.isfinite(log_snr)]
    wanted = torch.linspace(float(finite[0]), float(finite[-1]), nfe + 1, dtype=torch.float64)[1:-1]
    nearest = [int((log_snr - value).abs().argmin()) for value in wanted]
    return distinct([0, *nearest], table.nfe)


def distinct(positions: Sequence[float], num_steps: int, lowest: int = 0) -> list[int]:
    """Rounded positions, moved apart as little as an increasing path from `lowest` needs."""
    path: list[int] = []
    for index, position in enumerate(positions):
        highest = num_steps - (len(positions) - index)
        path.append(min(max(round(position), path[-1] + 1 if path else lowest), highest))
    return path


def greedy_path(factor: Factor, num_steps: int, nfe: int, ridge: float = 0.0) -> list[int]:
    """The paper's path: the smallest error bound per step that N steps can meet, found by bisection.

    From each state the path goes to the furthest one that the current state and all outputs so far approximate
    within the bound (binary search, as the error grows with the distance). The bound is bisected in its logarithm.
    Points that the search leaves over halve the steps with the largest errors.

    Args:
        factor: columns [X[0], F[0..M-1], X[1..M]] of the teacher's trajectories.
        num_steps: M.
        nfe: N, 1 <= N <= M.
        ridge: see `solve`.
    Returns:
        path, N indices.
    Source: arXiv 2305.14677, section 3.3; there the bound is bisected linearly in [0, 10].
    """
    check_nfe(nfe, num_steps)
    errors = _StepErrors(factor, num_steps, ridge)
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

    def __init__(self, factor: Factor, num_steps: int, ridge: float) -> None:
        self.factor, self.num_steps, self.ridge = factor, num_steps, ridge
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
        targets = [state_column(i, self.num_steps) for i in range(path[-1] + 1, self.num_steps + 1)]
        basis = [state_column(path[-1], self.num_steps), *(output_column(i) for i in path)]
        error = solve(self.factor, basis, targets, self.ridge).error
        return torch.cat([torch.zeros(path[-1], dtype=torch.float64), error])


def state_column(index: int, num_steps: int) -> int:
    """Column of teacher state `index` in [X[0], F[0..M-1], X[1..M]]."""
    return 0 if index == 0 else num_steps + index


def output_column(index: int) -> int:
    """Column of teacher output `index` in [X[0], F[0..M-1], X[1..M]]."""
    return 1 + index


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
