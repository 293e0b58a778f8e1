"""Time grids that other works recommend for few steps, on any schedule: each is a list of noise levels sigma / alpha.

The first level is always the schedule's own noise, and the image follows the last one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.schedule import NoiseSchedule

_RHO, _LOWEST, _HIGHEST = 7, 0.002, 80.0  # arXiv 2206.00364, table 1
_AYS = (14.61464, 6.47458, 3.86367, 2.69462, 1.88419, 1.39438, 0.96426, 0.65237, 0.39775, 0.15152, 0.02917)


def karras(n: int, low: float, high: float) -> Tensor:
    """Even in the seventh root, (n,): `polynomial-7` of arXiv 2206.00364, whose last of n + 1 levels is the image here.

    Args:
        n: evaluations.
        low, high: levels of the schedule, which the ends of EDM's, 0.002 and 80, are moved into.
    """
    ends = [min(max(end, low), high) ** (1 / _RHO) for end in (_HIGHEST, _LOWEST)]
    return torch.linspace(*ends, n + 1, dtype=torch.float64)[:-1] ** _RHO


def ays(n: int, low: float, high: float) -> Tensor:
    """Align your steps for Stable Diffusion 1.5, (n,): ten levels and an end, other numbers even in their logarithms.

    Args:
        n: evaluations.
        low, high: levels of the schedule, for which these are not made if it is not Stable Diffusion's.
    Source: arXiv 2404.14507; figures from its authors' guide.
    """
    known = torch.tensor(_AYS, dtype=torch.float64).log()
    place = torch.linspace(0, len(_AYS) - 1, n + 1, dtype=torch.float64)[:-1]
    before = place.floor().long()
    return known[before].lerp(known[before + 1], place - before).exp().clamp(low, high)


GRIDS: dict[str, Callable[[int, float, float], Tensor]] = {"karras": karras, "ays": ays}


def grid_levels(name: str, schedule: NoiseSchedule, n: int) -> Tensor:
    """The levels of a grid below the schedule's own noise, (n - 1,): sigma / alpha, falling.

    Raises:
        ValueError: a schedule whose noise levels are not above the grid's.
    """
    ends = schedule.alpha_sigma(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    low, high = (ends[1] / ends[0]).tolist()
    levels = GRIDS[name](n, low, high)[1:]
    if not bool((levels.diff() < 0).all()) or (n > 1 and float(levels[0]) >= high):
        raise ValueError(f"the grid {name} does not lie in the schedule's noise levels, {low:.4g} to {high:.4g}")
    return levels
