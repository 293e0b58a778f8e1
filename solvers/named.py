"""Solvers by name: `name[@spacing]:steps` or `name@[timesteps]`, as command lines and comparisons write them."""

import os.path
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from solvers.grids import GRIDS, grid_levels
from solvers.ipndm import ipndm
from solvers.named_tables import entries, listed_table, spaced_table, takes_list
from solvers.parameters import stretched
from solvers.schedule import NoiseSchedule
from solvers.table import SolverTable

_SPACED = re.compile(r"(\w+)(?:@(\w+))?:(\d+)")
_IPNDM_SPACINGS = {"edm": ("karras", "exponential")}
_ROUNDED = 0.02  # timesteps that published noise levels, of five digits, are off whole ones
_LISTED = re.compile(r"(\w+)@(sigma)?\[([^\[\]]*)\]")


def named_solver(text: str, schedule: NoiseSchedule) -> SolverTable:
    """The table that a text stands for: `name:steps`, `name@spacing:steps`, or `name@[...]` with the steps themselves.

    Trailing spacing (EDM: karras) unless stated, final alpha 1 where the scheduler has that choice, no clipping, and as
    many steps as give at most `steps` network evaluations. Everything but `ipndm` is a tabulated diffusers scheduler,
    so its end noise level and timestep rounding are those of diffusers (see `table.sigma[-1]`). `ddim` is DPM-Solver++
    of order 1, which is the same step; diffusers' DDIMScheduler steps back by T // n whatever the spacing, and so
    leaves the timesteps it tells the network unless n divides T and the spacing is trailing or leading. Solvers that
    take a list also have the spacings of `solvers.grids`, `karras`, `ays` and `dmn`: `ipndm@karras:8`.

    A list is that of a distilled model, from the noise on and without the image: timesteps in the schedule's units,
    `euler@[1000,937.5,833.3,625]`, or noise levels, `euler@sigma[14.6,6.5,2.9,1.1]`: sigma / alpha, for a flow sigma;
    a 0 that closes them is the image. No shift moves them.

    Args:
        text: such as `ddim:8`, `dpmpp@linspace:10`, `lcm@[999,759,499,259]`.
        schedule: the schedule of the network to be sampled.
    Raises:
        ValueError: unknown name, spacing that the solver does not have, steps that are too few or too many, or a list
            that does not fall, leaves the schedule's range, or that the solver does not take.
    """
    listed = _LISTED.fullmatch(text)
    if listed is not None:
        name = _known(listed[1], schedule)
        timesteps = _given_timesteps(listed[3], listed[2] is not None, schedule)
        build = partial(_listed, name, schedule, timesteps)
    else:
        name, spacing, steps = _parsed(text, schedule)
        build = partial(_named_table, name, schedule, steps, spacing)
    try:
        return build()
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{text!r} cannot be built for this schedule: {error}") from error


def resolve_solver(
    text: str,
    schedule: NoiseSchedule,
    *,
    denoiser: Any = None,
    guidance_scale: float | None = None,
    allow_mismatch: str | Sequence[str] = (),
) -> SolverTable:
    """A solver argument of a command line: the path of an artifact, or a name as `named_solver` takes it.

    Args:
        text: a path that exists or ends in `.json`, or a name.
        schedule: for the named solvers.
        denoiser, guidance_scale, allow_mismatch: what an artifact is checked against, as `load_solver` takes them.
    Raises:
        ValueError: no such file, an artifact that does not load or fit, or as `named_solver`.
    """
    if os.path.isfile(text) or text.endswith(".json"):
        from solvers.artifact import load_solver

        if not os.path.isfile(text):
            raise ValueError(f"there is no solver artifact {text!r}: give a file that exists, or name:steps")
        return load_solver(text, denoiser, guidance_scale, allow_mismatch)
    return named_solver(text, schedule)


def solver_names(schedule: NoiseSchedule) -> list[str]:
    """All names `named_solver` knows for a schedule."""
    return sorted([*entries(schedule), "ipndm"])


def baseline_names(schedule: NoiseSchedule) -> list[str]:
    """The solvers a learned one is compared with, without their steps: `f"{name}:{steps}"` is a solver argument."""
    if schedule.kind == "discrete_vp":
        names = ("ddim", "dpmpp", "unipc", "deis", "ipndm")
        return [f"{name}@{spacing}" for name in names for spacing in ("linspace", "trailing")]
    if schedule.kind == "flow":
        return ["euler", "ipndm", "unipc", "dpmpp", "heun", "heun@linspace"]
    if schedule.kind == "edm":
        return ["euler", "dpmpp", "dpmpp3m", "ipndm"]
    return ["ipndm@linspace", "ipndm@trailing"]


def default_solver(schedule: NoiseSchedule, steps: int = 100) -> str:
    """The teacher, and the reference of comparisons, where none is named: DDIM, or what stands for it.

    Args:
        schedule: Euler is the same step for a flow schedule and EDM; a continuous VP one has iPNDM alone.
        steps: of the solver.
    """
    name = {"flow": "euler", "edm": "euler", "continuous_vp": "ipndm"}.get(schedule.kind, "ddim")
    return f"{name}:{steps}"


def _parsed(text: str, schedule: NoiseSchedule) -> tuple[str, str, int]:
    match = _SPACED.fullmatch(text)
    if match is None:
        known = ", ".join(solver_names(schedule))
        raise ValueError(
            f"{text!r} is no solver: write name:steps, name@spacing:steps, name@[timesteps] or name@sigma[noise "
            f"levels] with a name of {known}"
        )
    name, steps = _known(match[1], schedule), int(match[3])
    allowed = _IPNDM_SPACINGS.get(schedule.kind, ("trailing", "linspace"))
    if name != "ipndm":
        allowed = entries(schedule)[name].spacings
    if schedule.kind != "edm" and (name == "ipndm" or takes_list(entries(schedule)[name])):
        allowed = (*allowed, *GRIDS)
    spacing = match[2] or allowed[0]
    if spacing not in allowed:
        raise ValueError(f"{name} has no spacing {spacing!r}: use one of {', '.join(allowed)}")
    most = int(schedule.t_max) + 1 if schedule.kind == "discrete_vp" else 1000
    if not 1 <= steps <= most:
        raise ValueError(f"{text!r} has {steps} steps: allowed are 1 to {most}")
    return name, spacing, steps


def _known(name: str, schedule: NoiseSchedule) -> str:
    known = solver_names(schedule)
    if name not in known:
        raise ValueError(f"unknown solver {name!r}: for this {schedule.kind} schedule use one of {', '.join(known)}")
    return name


def _given_timesteps(text: str, are_levels: bool, schedule: NoiseSchedule) -> Tensor:
    """The timesteps of a written list, (N,).

    Raises:
        ValueError: no numbers, ones that do not fall, or beyond the schedule's range.
    """
    try:
        values = torch.tensor([float(part) for part in text.split(",")], dtype=torch.float64)
    except ValueError as error:
        raise ValueError(f"[{text}] is no list of steps: write numbers with commas between them, no spaces") from error
    if are_levels and len(values) > 1 and values[-1] == 0:
        values = values[:-1]
    if not bool((values.diff() < 0).all()) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"the steps [{text}] do not fall: write them from the noise to the image")
    if not are_levels:
        schedule.alpha_sigma(values)
        return values
    alpha = 1 - values if schedule.kind == "flow" else torch.ones_like(values)
    timesteps = _whole(schedule.timestep(alpha, values), schedule)
    _check_levels(values, timesteps, schedule)
    return timesteps


def _whole(timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Timesteps that rounded noise levels have put beside whole ones, of a schedule that has no others."""
    if schedule.kind != "discrete_vp":
        return timesteps
    return torch.where((timesteps - timesteps.round()).abs() < _ROUNDED, timesteps.round(), timesteps)


def _listed(name: str, schedule: NoiseSchedule, timesteps: Tensor) -> SolverTable:
    """A solver whose rows are at given timesteps."""
    if name == "ipndm":
        return ipndm(schedule, timesteps)
    return listed_table(entries(schedule)[name], schedule, timesteps)


def _check_levels(levels: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> None:
    alpha, sigma = schedule.alpha_sigma(timesteps)
    found = sigma if schedule.kind == "flow" else sigma / alpha
    if not torch.allclose(found, levels, rtol=1e-4, atol=1e-6):
        ends = schedule.alpha_sigma(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
        low, high = (ends[1] if schedule.kind == "flow" else ends[1] / ends[0]).tolist()
        raise ValueError(f"noise levels {levels.tolist()} leave the schedule's range [{low:.4g}, {high:.4g}]")


def _named_table(name: str, schedule: NoiseSchedule, steps: int, spacing: str) -> SolverTable:
    """A solver with so many steps of its own."""
    if spacing in GRIDS and schedule.kind != "edm":
        levels = grid_levels(spacing, schedule, steps)
        first, others = levels.new_tensor([schedule.t_max]), schedule.timestep(1 / (1 + levels), levels / (1 + levels))
        return _listed(name, schedule, torch.cat([first, _whole(others, schedule)]))
    if name == "ipndm":
        return ipndm(schedule, _timesteps(schedule, steps, spacing))
    return spaced_table(entries(schedule)[name], schedule, steps=steps, spacing=spacing)


def _timesteps(schedule: NoiseSchedule, n: int, spacing: str) -> Tensor:
    """Timesteps of our own solvers, spaced as diffusers spaces them, (n,)."""
    line = partial(torch.linspace, dtype=torch.float64)
    if schedule.kind == "discrete_vp":
        total = schedule.t_max + 1
        if spacing == "linspace":
            return line(total - 1, 0, n + 1)[:-1].round()
        return (total - torch.arange(n, dtype=torch.float64) * (total / n)).round() - 1
    if schedule.kind == "edm":
        first, last = schedule.at_time(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
        return schedule.at_time(line(1, 0, n)) if spacing == "karras" else line(first, last, n)
    sigma = line(1, 1e-3, n) if spacing == "linspace" else line(1, 1 / n, n)
    if schedule.kind == "flow":
        shift = schedule.shift_at(n)
        sigma = stretched(shift * sigma / (1 + (shift - 1) * sigma), schedule.parameters.get("shift_terminal"))
    return schedule.at_time(sigma)
