"""Plans judged by what counts: the fitted solver's images on trajectories it was not fitted on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from data.shards import Trajectories
from olss.plan import CallPlan, combined, moves, starting_plans
from olss.run import Run, end_errors, fit_run
from olss.store import Scores
from solvers.progress import progress_bar
from solvers.table import SolverTable

FEWEST = 8  # trajectories that screen plans
KEPT = 4  # one of so many plans is judged on so many times the trajectories
EQUATIONS = 64  # values to reach, at least, for each call


def _alone(scores: Tensor) -> Tensor:
    return scores


def _nothing() -> None:
    pass


@dataclass
class PlanSearch:
    """Scores plans by fitting a solver of numbers to each and running it on trajectories held out.

    The score is the mean over images of the root-mean-square difference to the teacher's image: where pictures are
    sharp, a mean square is ruled by the few that end elsewhere.

    Args:
        denoiser: the teacher's network.
        teacher: its table, M rows; its calls say which branches there are.
        fitted: trajectories to fit each candidate on.
        chosen: trajectories to judge it on.
        ridge, data_scale: see `fit_run`.
        rank, world_size: each process scores its share of the candidates.
        share: sums a tensor over processes.
        progress: show a progress bar over the candidates.
        kept: scores of an earlier run that was broken off; this one's are added.
        pause: called in all processes after each of them has scored a candidate, where nothing is lost.
        scored: the scores so far, by plan and number of trajectories.
    """

    denoiser: Callable
    teacher: SolverTable
    fitted: Trajectories
    chosen: Trajectories
    ridge: float = 0.0
    rank: int = 0
    world_size: int = 1
    share: Callable[[Tensor], Tensor] = _alone
    progress: bool = False
    kept: Scores | None = None
    pause: Callable[[], None] = _nothing
    data_scale: float | None = None
    scored: dict[tuple[CallPlan, int], float] = field(default_factory=dict)

    def best(self, calls: int, more: Sequence[CallPlan] = (), rounds: int = 3) -> tuple[CallPlan, float]:
        """The best plan of `calls` network calls: of several shapes and patterns, then by local moves.

        A round moves single points of the path both ways, a quarter of a step at first and half as far in each further
        round, and unconditional calls to other rows; then all points that gained at once.

        Args:
            calls: network calls.
            more: further plans to begin with.
            rounds: rounds of local moves.
        Returns:
            (plan, its score).
        """
        plan, score = self._minimum(self._survivors([*starting_plans(self.teacher, calls), *more]))
        distance = max(1, round(self.teacher.num_rows / len(plan.path) / 4))
        for _ in range(rounds):
            plan, score = self._improved(plan, score, distance)
            distance = max(1, distance // 2)
        return plan, score

    def scores(self, plans: Sequence[CallPlan], near: CallPlan | None = None, size: int | None = None) -> list[float]:
        """Scores of plans, each computed once, by one process.

        Args:
            plans: what to score.
            near: a plan most of them share their first rows with.
            size: trajectories to fit on and to judge on; all by default.
        """
        size = size or self._sizes(0)[-1]
        todo = [plan for plan in dict.fromkeys(plans) if (plan, size) not in self.scored]
        found, rounds = torch.zeros(len(todo), dtype=torch.float64), range(0, len(todo), self.world_size)
        known = cache(lambda: near and self._run(near, size, None))
        for first in progress_bar(rounds, "plans of calls", "round", show=self.progress and bool(todo), leave=False):
            if (mine := first + self.rank) < len(todo):
                found[mine] = self._score(todo[mine], size, known)
            self.pause()
        self.scored |= {(plan, size): score for plan, score in zip(todo, self.share(found).tolist())}
        return [self.scored[plan, size] for plan in plans]

    def _score(self, plan: CallPlan, size: int, known: Callable[[], Run | None]) -> float:
        if self.kept and (score := self.kept.load(plan, size)) is not None:
            return score
        run = self._run(plan, size, known())
        score = float(end_errors(self.chosen[:size], run.fit, run.parts[-1]).sqrt().mean())
        if self.kept:
            self.kept.save(plan, size, score)
        return score

    def _survivors(self, plans: Sequence[CallPlan], near: CallPlan | None = None) -> list[CallPlan]:
        """The plans that stay among the better ones on ever more trajectories.

        Source: successive halving, arXiv 1502.07943, with a quarter kept.
        """
        plans = list(dict.fromkeys(plans))
        for size in self._sizes(max(len(plan.calls) for plan in plans))[:-1]:
            scores = dict(zip(plans, self.scores(plans, near, size)))
            plans = sorted(plans, key=scores.__getitem__)[: max(len(plans) // KEPT, KEPT)]
        return plans

    def _sizes(self, calls: int) -> list[int]:
        """How many trajectories are used one time after the other: enough equations for the weights, and four times as
        many."""
        least, most = calls * EQUATIONS // self.fitted.states[0, 0].numel(), max(len(self.fitted), len(self.chosen))
        sizes = [max(FEWEST, least)]
        while sizes[-1] * KEPT < most:
            sizes.append(sizes[-1] * KEPT)
        return [*(size for size in sizes if size < most), most]

    def _improved(self, plan: CallPlan, score: float, distance: int) -> tuple[CallPlan, float]:
        moved, steps = moves(plan, self.teacher.num_rows, distance), self.teacher.num_rows
        if not moved:
            return plan, score
        first = self._sizes(len(plan.calls))[0]
        before, *scores = self.scores([plan, *moved], plan, first)
        gained = [new.path for new, value in zip(moved, scores) if value < before]
        together = CallPlan(combined(plan.path, gained, steps), plan.unconditional)
        return self._minimum([plan, together, *self._survivors(moved, plan)], plan)

    def _minimum(self, plans: Sequence[CallPlan], near: CallPlan | None = None) -> tuple[CallPlan, float]:
        scores = self.scores(plans, near)
        best = min(range(len(plans)), key=lambda index: scores[index])
        return plans[best], scores[best]

    def _run(self, plan: CallPlan, size: int, known: Run | None) -> Run:
        fitted, chosen = self.fitted[:size], self.chosen[:size]
        options = {"ridge": self.ridge, "data_scale": self.data_scale}
        return fit_run(self.denoiser, self.teacher, [fitted], plan, **options, watched=[chosen], known=known)
