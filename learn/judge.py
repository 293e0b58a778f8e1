"""Solvers judged on trajectories that were held out: one half chooses, the other only reports."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.shards import Trajectories
from data.sources import split
from data.trajectories import TrajectoryCache
from learn.candidates import TITLES, Candidate, classical, named, yardstick_name
from learn.subject import Subject
from solvers import sample

PICTURES = 12
TOLERANCE = 1.5  # errors on unseen trajectories, relative to those fitted on, beyond which more of them would help


@dataclass(frozen=True, eq=False)
class Judged:
    """A candidate with its errors: root-mean-square differences to the teacher's image, one for each trajectory.

    Args:
        candidate: the solver.
        chosen, reported: errors on the half that chooses, and on the half that reports; float64.
        images: the first of the half that reports.
        seconds: of an image.
    """

    candidate: Candidate
    chosen: Tensor
    reported: Tensor
    images: Tensor
    seconds: float

    @property
    def error(self) -> float:
        """What is reported: the mean over images."""
        return float(self.reported.mean())

    @property
    def standard_error(self) -> float:
        """Of `error`."""
        count = len(self.reported)
        return float(self.reported.std(correction=0)) / max(count - 1, 1) ** 0.5


@dataclass(frozen=True)
class Choice:
    """What is handed out for a number of calls.

    Args:
        calls: what was asked for.
        judged: everything that was tried.
        taken: what is handed out, of `judged`.
        reason: why it is no learned solver; empty where it is.
        equal: calls of the yardstick that come as near to the teacher; None where as many as the teacher's do not.
    """

    calls: int
    judged: tuple[Judged, ...]
    taken: Judged
    reason: str
    equal: int | None

    @property
    def rival(self) -> Judged:
        """The best classical solver, on all that is held out."""
        return min((one for one in self.judged if not one.candidate.is_learned), key=_all_held, default=self.taken)


class Judge:
    """Measures solvers on the trajectories held out, each part in memory by itself.

    Args:
        subject: the model.
        cache: its trajectories; the second half of them is held out.
        batch_size: trajectories in memory at once.
    """

    def __init__(self, subject: Subject, cache: TrajectoryCache, batch_size: int) -> None:
        self.subject, self.cache, self.batch_size = subject, cache, batch_size
        _, self.choosing, self.reporting = split(len(cache), None, len(cache) // 2, cache.folder)
        self._yardstick: dict[int, tuple[int, float]] = {}

    @property
    def yardstick_name(self) -> str:
        """The classical solver that others are told by."""
        return yardstick_name(self.subject)

    @property
    def yardstick_title(self) -> str:
        """For people."""
        return TITLES[self.yardstick_name]

    def judge(self, candidate: Candidate) -> Judged:
        """A candidate with its errors."""
        begin = time.perf_counter()
        chosen, _ = self._errors(candidate, self.choosing)
        reported, images = self._errors(candidate, self.reporting)
        seconds = time.perf_counter() - begin
        return Judged(candidate, chosen, reported, images, seconds / (len(chosen) + len(reported)))

    def choose(self, calls: int, learned: Sequence[Candidate]) -> Choice:
        """Of learned and classical solvers the best one that is nowhere worse than a classical one."""
        judged = [self.judge(candidate) for candidate in [*classical(self.subject, calls), *learned]]
        taken, reason = _chosen(judged, len(self.choosing))
        return Choice(calls, tuple(judged), taken, reason, self._equal(taken))

    def curve(self) -> list[tuple[int, float]]:
        """(calls, error) of the yardstick wherever it was measured, on the half that reports."""
        return sorted(self._yardstick.values())

    def shown(self) -> Trajectories:
        """The first of the half that reports."""
        return self.cache.take(self.reporting[:PICTURES]).ends()

    def _equal(self, taken: Judged) -> int | None:
        """The fewest calls of the yardstick whose error is no larger, found by halving."""
        low, high = taken.candidate.calls // self.subject.row_calls - 1, self.subject.teacher.num_rows
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._yardstick_error(middle) <= taken.error else (middle, high)
        self._yardstick_error(high)
        return min((calls for calls, error in self.curve() if error <= taken.error), default=None)

    def _yardstick_error(self, rows: int) -> float:
        if rows not in self._yardstick:
            candidate = named(self.subject, self.yardstick_name, rows)
            if candidate is None:
                return float("inf")
            self._yardstick[rows] = (candidate.calls, float(self._errors(candidate, self.reporting)[0].mean()))
        return self._yardstick[rows][1]

    @torch.no_grad()
    def _errors(self, candidate: Candidate, numbers: range) -> tuple[Tensor, Tensor]:
        """Errors of some trajectories, and the first images."""
        errors, images = [], []
        for start in range(0, len(numbers), self.batch_size):
            part = self.cache.take(numbers[start : start + self.batch_size]).ends().to(self.subject.device)
            found = self._sample(candidate, part)
            errors.append((found - part.end).double().flatten(1).square().mean(1).sqrt().cpu())
            if start < PICTURES:
                images.append(found.cpu())
        return torch.cat(errors), torch.cat(images)[:PICTURES]

    def _sample(self, candidate: Candidate, part: Trajectories) -> Tensor:
        return sample(self.subject.denoiser, candidate.table, part.noise, part.condition)


def _chosen(judged: Sequence[Judged], count: int) -> tuple[Judged, str]:
    """(what is handed out, why it is no learned solver)."""
    learned = [one for one in judged if one.candidate.is_learned]
    usual = [one for one in judged if not one.candidate.is_learned]
    if not usual:
        return min(learned, key=_choosing), ""
    best, rival = min(learned, key=_choosing), min(usual, key=_all_held)
    worst_of = (_choosing, lambda one: one.error)
    if all(measure(best) <= min(map(measure, usual)) for measure in worst_of):
        return best, ""
    return rival, _reason(best, rival, count)


def _reason(best: Judged, rival: Judged, count: int) -> str:
    """Why a learned solver could not beat a classical one, as far as the figures show."""
    validation = best.candidate.table.info["validation"]
    fitted = (validation.get("row_errors") or [0.0])[-1]
    beaten = f"the learned solver has error {_all_held(best):.4f}, {rival.candidate.title} {_all_held(rival):.4f}"
    if _all_held(best) > TOLERANCE * fitted > 0:
        return (
            f"{beaten}: it follows what it was fitted on ({fitted:.4f}) better than new noises: use more --trajectories"
        )
    if best.candidate.table.num_rows <= 2:
        return f"{beaten}: {best.candidate.calls} calls are too few to follow this teacher"
    return f"{beaten}, on {2 * count} trajectories held out: little is left to gain at so many calls"


def _choosing(one: Judged) -> float:
    return float(one.chosen.mean())


def _all_held(one: Judged) -> float:
    return float(torch.cat([one.chosen, one.reported]).mean())
