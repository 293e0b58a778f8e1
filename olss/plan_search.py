"""Where to call the network, for a budget of calls: path and unconditional calls judged on trajectories held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from data.shards import Trajectories
from olss.path import distinct, log_snr_path
from olss.run import CallPlan, Run, end_error, fit_run
from solvers.calls import UNCONDITIONAL
from solvers.space import Plain, Space
from solvers.table import SolverTable

POWERS = (0.85, 1.0, 1.25, 1.5)
FIRST = (0, 1, 2)  # teacher indices at which a path is tried to begin


def _alone(scores: Tensor) -> Tensor:
    return scores


@dataclass
class PlanSearch:
    """Scores plans of calls by fitting a solver to each and running it on trajectories held out.

    The score is the mean over images of the root-mean-square difference to the teacher's image: where pictures are
    sharp, a plain mean square is ruled by the few that end elsewhere.

    Args:
        denoiser: the teacher's network.
        teacher: its table, M rows; its calls say which branches there are.
        fitted: trajectories to fit each candidate on.
        chosen: trajectories to judge it on.
        ridge: see `fit_run`.
        rank, world_size: each process scores its share of the candidates.
        share: sums a tensor over processes.
        progress: show a progress bar over the candidates.
    """

    denoiser: Callable
    teacher: SolverTable
    fitted: Trajectories
    chosen: Trajectories
    space: Space = Plain()  # noqa: RUF009 - frozen
    ridge: float = 0.0
    rank: int = 0
    world_size: int = 1
    share: Callable[[Tensor], Tensor] = _alone
    progress: bool = False
    scored: dict[CallPlan, float] = field(default_factory=dict)

    def best(self, calls: int, rounds: int = 2) -> tuple[CallPlan, float]:
        """The best plan of `calls` network calls: of several shapes and patterns, then by local moves.

        A round moves single points of the path both ways, and unconditional calls to other rows, a quarter of a step
        at first and half as far in each further round, then all moves of the path that gained at once.

        Returns:
            (plan, its score).
        """
        plan, score = self._minimum(starting_plans(self.teacher, calls))
        distance = max(1, round(self.teacher.num_rows / len(plan.path) / 4))
        for _ in range(rounds):
            before = score
            moved = moves(plan, self.teacher.num_rows, distance)
            known = self._run(plan, None)
            scores = self.scores(moved, known)
            gained = [
                new.path for new, value in zip(moved, scores) if value < before and len(new.path) == len(plan.path)
            ]
            together = CallPlan(combined(plan.path, gained, self.teacher.num_rows), plan.unconditional)
            plan, score = self._minimum([plan, *moved, together])
            distance = max(1, distance // 2)
        return plan, score

    def scores(self, plans: Sequence[CallPlan], known: Run | None = None) -> list[float]:
        """Scores of plans, each computed by one process, once."""
        todo = [plan for plan in dict.fromkeys(plans) if plan not in self.scored]
        found = torch.zeros(len(todo), dtype=torch.float64)
        mine = range(self.rank, len(todo), self.world_size)
        for index in tqdm(mine, "plans of calls", disable=not self.progress, leave=False):
            found[index] = self._score(self._run(todo[index], known))
        self.scored |= dict(zip(todo, self.share(found).tolist()))
        return [self.scored[plan] for plan in plans]

    def _minimum(self, plans: Sequence[CallPlan]) -> tuple[CallPlan, float]:
        scores = self.scores(plans)
        best = min(range(len(plans)), key=lambda index: scores[index])
        return plans[best], scores[best]

    def _run(self, plan: CallPlan, known: Run | None) -> Run:
        return fit_run(self.denoiser, self.teacher, [self.fitted], plan, self.space, self.ridge, [self.chosen], known)

    def _score(self, run: Run) -> float:
        return float(end_error(self.chosen, run.fit, run.parts[-1]).sqrt().mean())


def starting_plans(teacher: SolverTable, calls: int) -> list[CallPlan]:
    """Paths of several shapes and beginnings, each with unconditional calls in the first rows, or in every m-th.

    Raises:
        ValueError: fewer calls than one, or more rows than the teacher has.
    """
    if not calls >= 1:
        raise ValueError(f"a solver of {calls} network calls makes no sense: ask for at least 1")
    plans = []
    for rows, pattern in _patterns(teacher, calls):
        plans += [CallPlan(path, pattern) for path in _paths(teacher, rows)]
    if not plans:
        raise ValueError(f"{calls} network calls are more than the teacher's {teacher.num_rows} rows can use")
    return list(dict.fromkeys(plans))


def _patterns(teacher: SolverTable, calls: int) -> list[tuple[int, tuple[int, ...]]]:
    """(rows, unconditional rows) of a budget: none without guidance, else one to half of the calls."""
    if all(call.branch != UNCONDITIONAL for call in teacher.calls):
        return [(calls, ())] if calls <= teacher.num_rows else []
    found = []
    for extra in range(1, calls // 2 + 1):
        rows = calls - extra
        spread = tuple(sorted({round(index * rows / extra) for index in range(extra)}))
        found += [(rows, pattern) for pattern in dict.fromkeys([tuple(range(extra)), spread]) if len(pattern) == extra]
    return [(rows, pattern) for rows, pattern in found if rows <= teacher.num_rows]


def _paths(teacher: SolverTable, rows: int) -> list[tuple[int, ...]]:
    steps = teacher.num_rows
    found = [log_snr_path(teacher, rows)]
    for first in FIRST[: max(1, steps // rows // 2)]:
        for power in POWERS:
            shape = [first + (steps - first) * (i / rows) ** power for i in range(rows)]
            found.append([first, *distinct(shape[1:], steps, first + 1)] if rows > 1 else [first])
    return [tuple(path) for path in found]


def moves(plan: CallPlan, num_steps: int, distance: int) -> list[CallPlan]:
    """The plan with one point of the path moved, one unconditional call moved to another row, or one more or less."""
    path, pattern, moved = plan.path, plan.unconditional, []
    for index, point in enumerate(path):
        low, high = path[index - 1] if index else -1, [*path, num_steps][index + 1]
        for position in (point - (distance if index else 1), point + (distance if index else 1)):
            if low < position < high:
                moved.append(CallPlan((*path[:index], position, *path[index + 1 :]), pattern))
    for index, row in enumerate(pattern):
        others = [*pattern[:index], *pattern[index + 1 :]]
        for new in (row - 1, row + 1):
            if 0 <= new < len(path) and new not in others:
                moved.append(CallPlan(path, tuple(sorted([*others, new]))))
    return moved


def combined(path: Sequence[int], improved: Sequence[Sequence[int]], num_steps: int) -> tuple[int, ...]:
    """All single moves of `improved` in one path; those that would break its order are left out."""
    result = list(path)
    for new in improved:
        changed = [b if b != a else c for a, b, c in zip(path, new, result)]
        if changed[0] >= 0 and all(low < high for low, high in zip(changed, [*changed[1:], num_steps])):
            result = changed
    return tuple(result)
