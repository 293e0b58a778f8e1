"""Plans judged by what counts: the fitted solver's images on trajectories it was not fitted on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from data.shards import Trajectories
from olss.plan import CallPlan, combined, moves, starting_plans
from olss.run import Run, end_errors, fit_run
from solvers.table import SolverTable


def _alone(scores: Tensor) -> Tensor:
    return scores


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
        ridge: see `fit_run`.
        rank, world_size: each process scores its share of the candidates.
        share: sums a tensor over processes.
        progress: show a progress bar over the candidates.
        scored: the scores so far.
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
    scored: dict[CallPlan, float] = field(default_factory=dict)

    def best(self, calls: int, more: Sequence[CallPlan] = (), rounds: int = 2) -> tuple[CallPlan, float]:
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
        plan, score = self._minimum([*starting_plans(self.teacher, calls), *more])
        distance = max(1, round(self.teacher.num_rows / len(plan.path) / 4))
        for _ in range(rounds):
            plan, score = self._improved(plan, score, distance)
            distance = max(1, distance // 2)
        return plan, score

    def scores(self, plans: Sequence[CallPlan], known: Run | None = None) -> list[float]:
        """Scores of plans, each computed once, by one process."""
        todo = [plan for plan in dict.fromkeys(plans) if plan not in self.scored]
        found = torch.zeros(len(todo), dtype=torch.float64)
        mine = range(self.rank, len(todo), self.world_size)
        for index in tqdm(mine, "plans of calls", disable=not self.progress or not todo, leave=False):
            run = self._run(todo[index], known)
            found[index] = end_errors(self.chosen, run.fit, run.parts[-1]).sqrt().mean()
        self.scored |= dict(zip(todo, self.share(found).tolist()))
        return [self.scored[plan] for plan in plans]

    def _improved(self, plan: CallPlan, score: float, distance: int) -> tuple[CallPlan, float]:
        moved, steps = moves(plan, self.teacher.num_rows, distance), self.teacher.num_rows
        if not moved:
            return plan, score
        scores = self.scores(moved, self._run(plan, None))
        gained = [new.path for new, value in zip(moved, scores) if value < score]
        return self._minimum([plan, *moved, CallPlan(combined(plan.path, gained, steps), plan.unconditional)])

    def _minimum(self, plans: Sequence[CallPlan]) -> tuple[CallPlan, float]:
        scores = self.scores(plans)
        best = min(range(len(plans)), key=lambda index: scores[index])
        return plans[best], scores[best]

    def _run(self, plan: CallPlan, known: Run | None) -> Run:
        return fit_run(
            self.denoiser, self.teacher, [self.fitted], plan, ridge=self.ridge, watched=[self.chosen], known=known
        )
