"""What learning costs: said before it starts, and counted to the end."""

import time
from dataclasses import dataclass

import torch

from learn.options import LearnOptions
from learn.subject import Subject
from olss.plan import starting_plans

ROUNDS = 2  # of local moves of a plan
SEARCHED = 16  # trajectories, at most, that a plan is fitted on, and judged on
REFINED = 16  # trajectories, at most, that derivatives are taken on
STEPS = 3  # of Levenberg-Marquardt


@dataclass(frozen=True)
class Cost:
    """Network calls, and bytes.

    Args:
        recording: calls of the teacher.
        fitting: calls of the search for the best solvers, at most.
        judging: calls on what is held out, about.
        disk: of the trajectories.
        memory: beside the network, at most.
    """

    recording: int
    fitting: int
    judging: int
    disk: int
    memory: int

    @property
    def calls(self) -> int:
        """All network calls."""
        return self.recording + self.fitting + self.judging

    @classmethod
    def of(cls, subject: Subject, options: LearnOptions) -> "Cost":
        """Of learning all counts."""
        count, elements = options.trajectories, torch.Size(subject.denoiser.sample_shape).numel()
        size = 4 * elements * (subject.teacher.num_rows + 1 + subject.teacher.nfe)
        searched = min(count, SEARCHED) + min(count // 2, SEARCHED)
        refines = options.method == "auto" and subject.is_differentiable
        refining = STEPS * min(count, REFINED) * refines  # all derivatives of a step: about calls (calls + 3) / 2 a row
        plans = {calls: _plans(subject, calls) for calls in options.calls}
        return cls(
            2 * count * subject.teacher_calls,
            sum(plans[calls] * searched * calls + refining * calls**2 * (calls + 3) // 2 for calls in options.calls),
            4 * count * sum(options.calls),
            2 * count * size,
            2 * searched * size,
        )

    def __str__(self) -> str:
        return (
            f"{self.recording:,} network calls to record the teacher, at most {self.fitting:,} to fit, "
            f"{self.judging:,} to judge; {_bytes(self.disk)} of disk, {_bytes(self.memory)} of memory for trajectories"
        )


def _plans(subject: Subject, calls: int) -> int:
    """Plans that a search tries: those it starts with, and moves of every row and call."""
    rows = calls if subject.teacher.has_branches else calls // subject.row_calls
    return len(starting_plans(subject.teacher, rows)) + 2 * ROUNDS * calls


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.1f} MB"


class Progress:
    """What has been spent, and what is left.

    Args:
        subject: whose network is counted.
        cost: what was expected.
    """

    def __init__(self, subject: Subject, cost: Cost) -> None:
        self.subject, self.cost = subject, cost
        self.begin, self.has_told = time.perf_counter(), False

    @property
    def calls(self) -> int:
        """Network calls so far."""
        return self.subject.network.calls

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.begin

    def tell_time(self) -> None:
        """After the first work: how long all of it will take, once."""
        if self.has_told or not self.calls:
            return
        self.has_told = True
        speed = self.calls / self.seconds
        print(f"{speed:,.0f} network calls a second: at most {duration(self.cost.calls / speed)} in all", flush=True)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
