"""Which of several samplers of a student is taken: the one whose images are nearest to the data."""

from collections.abc import Mapping
from typing import Any

from evaluation.evaluate import evaluate_table
from evaluation.metrics import Measure
from solvers import SolverTable

FIRST_SEED = 2**30  # far from those of figures (0, 1, ...) and of fits (from 2^31 on)


def choice_seeds(num_images: int) -> list[int]:
    """The half-open range of seeds that is chosen on."""
    return [FIRST_SEED, FIRST_SEED + num_images]


def distances(
    student: Any, tables: Mapping[float, SolverTable], num_images: int, measure: Measure
) -> dict[float, float]:
    """Frechet distance to the data of the images of each table; every process calls it, and gets the same.

    Args:
        student: the network.
        tables: by the share of noise that they keep.
        num_images: of each, from the noises of `choice_seeds`.
        measure: with the Frechet distance.
    """
    options: dict[str, Any] = {"num_images": num_images, "seed": FIRST_SEED, "measure": measure}
    return {share: evaluate_table(student, table, **options)["fd"] for share, table in tables.items()}
