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
    first, last = (min(max(end, low), high) ** (1 / _RHO) for end in (_HIGHEST, _LOWEST))
    return torch.linspace(first, last, n + 1, dtype=torch.float64)[:-1] ** _RHO


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


_DMN = {
    2: (0.4,),
    3: (1.0727, 0.23687),
    4: (2.4605, 0.68026, 0.091662),
    5: (3.0628, 1.1135, 0.3737, 0.072273),
    6: (4.4559, 1.3025, 0.64618, 0.2176, 0.052023),
    7: (6.1111, 2.0203, 0.98093, 0.31473, 0.11229, 0.03472),
    8: (8.2952, 2.6566, 1.6793, 0.40295, 0.13351, 0.046481, 0.015173),
    9: (11.339, 4.53, 2.6428, 0.70038, 0.22833, 0.078303, 0.034074, 0.013371),
    10: (13.814, 5.9224, 3.5329, 1.1786, 0.41893, 0.13981, 0.052836, 0.024571, 0.01013),
}


def dmn(n: int, low: float, high: float) -> Tensor:
    """DM-NonUniform, (n,), for 2 to 10 evaluations: least bound on the error of a multistep solver from 80 to 0.002.

    Args:
        n: evaluations.
        low, high: levels of the schedule.
    Raises:
        ValueError: another number of evaluations.
    Source: arXiv 2402.17376; what the authors' `step_optim.py` (commit 95d4ac6) finds from even log-SNR with the error
        that it says is better for pixels.
    """
    if n not in _DMN:
        raise ValueError(f"the grid dmn is known for {min(_DMN)} to {max(_DMN)} evaluations, not for {n}")
    return torch.tensor([high, *_DMN[n]], dtype=torch.float64).clamp_min(low)


GRIDS: dict[str, Callable[[int, float, float], Tensor]] = {"karras": karras, "ays": ays, "dmn": dmn}


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
