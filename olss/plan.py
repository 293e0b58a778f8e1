"""Where a solver calls the network: which of the teacher's states it visits, and where for both branches."""

from collections.abc import Sequence
from dataclasses import dataclass

from olss.path import distinct, log_snr_path
from solvers.calls import CONDITIONAL, UNCONDITIONAL, Call
from solvers.table import SolverTable

POWERS = (0.85, 1.0, 1.25, 1.5)
FIRST = (0, 1, 2)  # teacher indices at which a path is tried to begin


@dataclass(frozen=True)
class CallPlan:
    """Where a solver calls the network.

    Args:
        path: (N,) increasing teacher indices; M follows. Index 0 is pure noise; a path that begins later leaves the
            first calls out, and its first state is start noise times a weight.
        unconditional: rows, indices into `path`, that make an unconditional call beside the conditional one.
    Raises:
        ValueError: rows outside the path, twice or out of order.
    """

    path: tuple[int, ...]
    unconditional: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rows = list(self.unconditional)
        if rows != sorted(set(rows)) or any(not 0 <= row < len(self.path) for row in rows):
            raise ValueError(
                f"unconditional calls at rows {rows}: they must be distinct, in order, and among the "
                f"{len(self.path)} rows of the path"
            )

    @classmethod
    def of(cls, path: Sequence[int], teacher: SolverTable) -> "CallPlan":
        """All of the teacher's branches at every row of a path."""
        return cls(tuple(path), tuple(range(len(path))) if teacher.has_branches else ())

    @property
    def calls(self) -> tuple[Call, ...]:
        """The network calls in the order of their rows."""
        return tuple(Call(row, branch) for row in range(len(self.path)) for branch in self.at(row))

    def at(self, row: int) -> tuple[str, ...]:
        """Branches called at a row."""
        return (CONDITIONAL, UNCONDITIONAL)[: 1 + (row in self.unconditional)]

    def columns(self, row: int) -> int:
        """How many values that row may combine: state 0, and the outputs up to its own."""
        return 1 + sum(len(self.at(earlier)) for earlier in range(row + 1))


def starting_plans(teacher: SolverTable, calls: int) -> list[CallPlan]:
    """Paths of several shapes and beginnings, each with unconditional calls in the first rows, or spread evenly.

    Raises:
        ValueError: fewer calls than one, or more than the teacher's rows can use.
    """
    plans = [CallPlan(path, rows) for count, rows in patterns(teacher, calls) for path in _paths(teacher, count)]
    if not plans:
        raise ValueError(f"a solver of {calls} network calls cannot follow a teacher of {teacher.num_rows} rows")
    return list(dict.fromkeys(plans))


def moves(plan: CallPlan, num_steps: int, distance: int) -> list[CallPlan]:
    """The plan with one point of the path moved both ways, or one unconditional call moved to a neighbouring row."""
    path, moved = plan.path, []
    for index, point in enumerate(path):
        low, high, step = path[index - 1] if index else -1, [*path, num_steps][index + 1], distance if index else 1
        for position in (point - step, point + step):
            if low < position < high:
                moved.append(CallPlan((*path[:index], position, *path[index + 1 :]), plan.unconditional))
    for row in plan.unconditional:
        others = set(plan.unconditional) - {row}
        for new in (row - 1, row + 1):
            if 0 <= new < len(path) and new not in others:
                moved.append(CallPlan(path, tuple(sorted({*others, new}))))
    return moved


def combined(path: Sequence[int], improved: Sequence[Sequence[int]], num_steps: int) -> tuple[int, ...]:
    """All single moves of `improved` in one path; those that would break its order are left out."""
    result = list(path)
    for new in improved:
        changed = [b if b != a else c for a, b, c in zip(path, new, result)]
        if all(low < high for low, high in zip(changed, [*changed[1:], num_steps])):
            result = changed
    return tuple(result)


def patterns(teacher: SolverTable, calls: int) -> list[tuple[int, tuple[int, ...]]]:
    """(rows, unconditional rows) of a budget: without branches none, else for one to half of the calls."""
    if not teacher.has_branches:
        return [(calls, ())] if 1 <= calls <= teacher.num_rows else []
    found: list[tuple[int, tuple[int, ...]]] = []
    for extra in range(1, calls // 2 + 1):
        rows = calls - extra
        spread = tuple(index * rows // extra for index in range(extra))
        found += [(rows, pattern) for pattern in dict.fromkeys([tuple(range(extra)), spread])]
    return [(rows, pattern) for rows, pattern in found if rows <= teacher.num_rows]


def _paths(teacher: SolverTable, rows: int) -> list[tuple[int, ...]]:
    steps = teacher.num_rows
    found = [tuple(log_snr_path(teacher, rows))]
    for first in [first for first in FIRST if first == 0 or first < steps / rows / 2]:
        for power in POWERS:
            shape = [first + (steps - first) * (i / rows) ** power for i in range(1, rows)]
            found.append((first, *distinct(shape, steps, first + 1)))
    return found
