"""Which of several samplers of a student is taken: the one whose images are nearest to the data."""

from collections.abc import Callable, Sequence
from typing import Any

from evaluation.evaluate import evaluate_table
from evaluation.metrics import Measure
from solvers import SolverTable
from solvers.progress import progress_bar

FIRST_SEED = 2**30  # far from those of figures (0, 1, ...) and of fits (from 2^31 on)
Shares = tuple[float, ...]


def choice_seeds(num_images: int) -> list[int]:
    """The half-open range of seeds that is chosen on."""
    return [FIRST_SEED, FIRST_SEED + num_images]


def distance_of(student: Any, table: SolverTable, num_images: int, measure: Measure) -> float:
    """Frechet distance to the data of a table's images; every process calls it, and gets the same.

    Args:
        student: the network.
        table: its sampler.
        num_images: from the noises of `choice_seeds`.
        measure: with the Frechet distance.
    """
    return evaluate_table(student, table, num_images=num_images, seed=FIRST_SEED, measure=measure)["fd"]


def choose(
    distance: Callable[[Shares], float], shares: Sequence[float], count: int, progress: bool = False
) -> tuple[Shares, dict[Shares, float]]:
    """The share of noise to keep at each of `count` steps, and the distances of all that were tried.

    First one share for all steps; from the best of them each step in turn, the first one first, gets its own.

    Args:
        distance: of the shares of all steps; the least is best.
        shares: that a step may have.
        count: at least 1.
        progress: show how far it is.
    """
    found: dict[Shares, float] = {}
    total = len(shares) + count * (len(shares) - 1) * (count > 1)
    with progress_bar(desc="kept noise", unit="choice", total=total, show=progress) as bar:

        def nearest(candidates: Sequence[Shares]) -> Shares:
            for candidate in candidates:
                if candidate not in found:
                    found[candidate] = distance(candidate)
                    bar.update()
            return min(candidates, key=found.__getitem__)

        best = nearest([(share,) * count for share in shares])
        for step in range(count):
            best = nearest([(*best[:step], share, *best[step + 1 :]) for share in shares])
    return best, found
