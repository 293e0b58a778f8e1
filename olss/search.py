"""Paths judged by what counts: the end-point error of the fitted student on trajectories it was not fitted on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from data.shards import Trajectories
from olss.path import log_snr_path, power_path, uniform_path
from olss.student import Run, end_error, run_student
from solvers.table import SolverTable

POWERS = (0.85, 1.2, 1.5)


def _alone(scores: Tensor) -> Tensor:
    return scores


@dataclass
class PathSearch:
    """Scores paths of on-policy students.

    Args:
        denoiser: the teacher's network.
        teacher: its table, M rows.
        fitted: trajectories to fit each candidate on.
        held_out: trajectories to judge it on.
        ridge: see `olss.fit.solve`.
        rank, world_size: each process scores its share of the candidates.
        share: sums a tensor over processes.
        progress: show a progress bar over the candidates.
    """

    denoiser: Callable
    teacher: SolverTable
    fitted: Trajectories
    held_out: Trajectories
    ridge: float = 0.0
    rank: int = 0
    world_size: int = 1
    share: Callable[[Tensor], Tensor] = _alone
    progress: bool = False

    def best(self, nfe: int, more: Sequence[Sequence[int]] = (), rounds: int = 1) -> tuple[list[int], float]:
        """The best path found: of several shapes, then by local moves of single points.

        A round moves each point by the same distance both ways, a quarter of a step at first and half as far in each
        further round, and then all points that gained at once.

        Args:
            nfe: N.
            more: further paths to begin with.
            rounds: rounds of local moves; one costs 2 (N-1) fits.
        Returns:
            (path, its error on the held-out trajectories).
        """
        paths = _distinct([*starting_paths(self.teacher, nfe), *(list(path) for path in more)])
        path, error = _minimum(paths, self.scores(paths))
        distance = max(1, round(self.teacher.nfe / nfe / 4))
        for _ in range(rounds):
            path, error = self._improved(path, error, distance)
            distance = max(1, distance // 2)
        return path, error

    def scores(self, paths: Sequence[list[int]], known: Run | None = None) -> list[float]:
        """Errors of paths, each computed by one process."""
        found = torch.zeros(len(paths), dtype=torch.float64)
        mine = range(self.rank, len(paths), self.world_size)
        for index in tqdm(mine, f"paths of {len(paths[0])} evaluations", disable=not self.progress, leave=False):
            found[index] = self._score(self._run(paths[index], known))
        return self.share(found).tolist()

    def _improved(self, path: list[int], error: float, distance: int) -> tuple[list[int], float]:
        moved = moves(path, self.teacher.nfe, distance)
        if not moved:
            return path, error
        known = self._run(path, None)
        scores = self.scores(moved, known)
        together = combined(path, [new for new, score in zip(moved, scores) if score < error], self.teacher.nfe)
        paths = [path, *moved, together]
        return _minimum(paths, [error, *scores, *self.scores([together], known)])

    def _run(self, path: list[int], known: Run | None) -> Run:
        return run_student(self.denoiser, self.teacher, [self.fitted], path, self.ridge, [self.held_out], known)

    def _score(self, run: Run) -> float:
        return end_error(self.held_out, run.fit, run.outputs[-1])


def starting_paths(teacher: SolverTable, nfe: int) -> list[list[int]]:
    """Uniform in the index, in its powers, and in log(alpha / sigma)."""
    steps = teacher.nfe
    return [uniform_path(steps, nfe), *(power_path(steps, nfe, power) for power in POWERS), log_snr_path(teacher, nfe)]


def moves(path: Sequence[int], num_steps: int, distance: int) -> list[list[int]]:
    """The path with one point moved by `distance`, either way, where that keeps it a path."""
    moved = []
    for index in range(1, len(path)):
        low, high = path[index - 1], [*path, num_steps][index + 1]
        for position in (path[index] - distance, path[index] + distance):
            if low < position < high:
                moved.append([*path[:index], position, *path[index + 1 :]])
    return moved


def combined(path: Sequence[int], improved: Sequence[Sequence[int]], num_steps: int) -> list[int]:
    """All single moves of `improved` in one path; those that would break its order are left out."""
    result = list(path)
    for new in improved:
        changed = [b if b != a else c for a, b, c in zip(path, new, result)]
        if all(low < high for low, high in zip(changed, [*changed[1:], num_steps])):
            result = changed
    return result


def _distinct(paths: Sequence[list[int]]) -> list[list[int]]:
    return [list(path) for path in dict.fromkeys(map(tuple, paths))]


def _minimum(paths: Sequence[list[int]], scores: Sequence[float]) -> tuple[list[int], float]:
    best = min(range(len(paths)), key=lambda index: scores[index])
    return paths[best], scores[best]
