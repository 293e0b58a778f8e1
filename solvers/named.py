"""Solvers by name: `name[@spacing]:steps`, as the command line and the comparisons write them."""

import inspect
import os.path
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from solvers.ipndm import ipndm
from solvers.parameters import stretched, training_betas
from solvers.schedule import NoiseSchedule
from solvers.table import SolverTable
from solvers.tabulate import tabulate

SPACINGS = ("trailing", "linspace", "leading")


def _same(steps: int) -> int:
    return steps


def _halved(steps: int) -> int:
    """n of a two-stage scheduler, which has 2n - 1 rows."""
    return (steps + 1) // 2


def _warmed(steps: int) -> int:
    """n of PNDM, which has n + 9 rows and needs four timesteps for its warm-up."""
    return steps - 9 if steps >= 13 else 0


def _repeated(steps: int) -> int:
    """n of PNDM without its warm-up, which has n + 1 rows from n = 2 on."""
    return steps - 1 if steps >= 3 else 0


@dataclass(frozen=True)
class _Named:
    """One named scheduler: class name in diffusers, settings, spacings it knows, and n as a function of the rows."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    spacings: tuple[str, ...] = SPACINGS
    num_steps: Callable[[int], int] = _same


_STRIDING = ("trailing", "leading")  # PNDM steps back by T // n whatever the spacing, so linspace would end far off
_VP = {
    "ddim": _Named("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "ddpm": _Named("DDPMScheduler", {"clip_sample": False}),
    "euler": _Named("EulerDiscreteScheduler"),
    "euler_ancestral": _Named("EulerAncestralDiscreteScheduler"),
    "heun": _Named("HeunDiscreteScheduler", num_steps=_halved),
    "kdpm2": _Named("KDPM2DiscreteScheduler", num_steps=_halved),
    "lms": _Named("LMSDiscreteScheduler"),
    "dpmpp": _Named("DPMSolverMultistepScheduler"),
    "dpmpp3m": _Named("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_sde": _Named("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": _Named("UniPCMultistepScheduler"),
    "deis": _Named("DEISMultistepScheduler"),
    "pndm": _Named("PNDMScheduler", {"set_alpha_to_one": True}, _STRIDING, _warmed),
    "plms": _Named("PNDMScheduler", {"set_alpha_to_one": True, "skip_prk_steps": True}, _STRIDING, _repeated),
    "sa": _Named("SASolverScheduler"),
    "lcm": _Named("LCMScheduler", spacings=("trailing",)),
    "tcd": _Named("TCDScheduler", spacings=("trailing",)),
}
_FLOW = {
    "euler": _Named("FlowMatchEulerDiscreteScheduler", spacings=("trailing", "linspace")),
    "heun": _Named("FlowMatchHeunDiscreteScheduler", spacings=("trailing", "linspace"), num_steps=_halved),
    "lcm": _Named("FlowMatchLCMScheduler", spacings=("trailing", "linspace")),
    "dpmpp": _Named("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, ("trailing",)),
    "unipc": _Named("UniPCMultistepScheduler", {"use_flow_sigmas": True}, ("trailing",)),
}


def named_solver(text: str, schedule: NoiseSchedule) -> SolverTable:
    """The table `name[@spacing]:steps` stands for.

    Trailing spacing unless stated, final alpha 1 where the scheduler has that choice, no clipping, and as many steps as
    give at most `steps` network evaluations. Everything but `ipndm` is a tabulated diffusers scheduler, so its end
    noise level and timestep rounding are those of diffusers (see `table.sigma[-1]`). `ddim` is DPM-Solver++ of order
    1, which is the same step; diffusers' DDIMScheduler steps back by T // n whatever the spacing, and so leaves the
    timesteps it tells the network unless n divides T and the spacing is trailing or leading.

    Args:
        text: such as `ddim:8`, `dpmpp@linspace:10`.
        schedule: the schedule of the network to be sampled.
    Raises:
        ValueError: unknown name, spacing that the solver does not have, or steps that are too few or too many.
    """
    name, spacing, steps = _parsed(text, schedule)
    if name == "ipndm":
        return ipndm(schedule, _timesteps(schedule, steps, spacing))
    entry = _entries(schedule)[name]
    n = _num_steps(entry, schedule, steps, spacing)
    if n < 1:
        raise ValueError(f"{text!r} has too few steps: {name} needs at least {_fewest(entry)}")
    build = _flow_table if schedule.kind == "flow" else _vp_table
    try:
        return build(entry, schedule, n, spacing)
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
    """A solver argument of a command line: the path of an artifact, or `name[@spacing]:steps`.

    Args:
        text: a path that exists or ends in `.json`, or a name as `named_solver` takes it.
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
    return sorted([*_entries(schedule), "ipndm"])


def baseline_names(schedule: NoiseSchedule) -> list[str]:
    """The solvers a learned one is compared with, without their steps: `f"{name}:{steps}"` is a solver argument."""
    if schedule.kind == "discrete_vp":
        names = ("ddim", "dpmpp", "unipc", "deis", "ipndm")
        return [f"{name}@{spacing}" for name in names for spacing in ("linspace", "trailing")]
    if schedule.kind == "flow":
        return ["euler", "ipndm", "unipc", "dpmpp", "heun", "heun@linspace"]
    return ["ipndm@linspace", "ipndm@trailing"]


def default_solver(schedule: NoiseSchedule, steps: int = 100) -> str:
    """The teacher, and the reference of comparisons, where none is named: DDIM, or what stands for it.

    Args:
        schedule: Euler is the same step for a flow schedule; a continuous VP one has iPNDM alone.
        steps: of the solver.
    """
    name = {"flow": "euler", "continuous_vp": "ipndm"}.get(schedule.kind, "ddim")
    return f"{name}:{steps}"


def _parsed(text: str, schedule: NoiseSchedule) -> tuple[str, str, int]:
    match = re.fullmatch(r"(\w+)(?:@(\w+))?:(\d+)", text)
    known = ", ".join(solver_names(schedule))
    if match is None:
        raise ValueError(f"{text!r} is no solver: write name:steps or name@spacing:steps with a name of {known}")
    name, spacing, steps = match[1], match[2] or "trailing", int(match[3])
    if name not in solver_names(schedule):
        raise ValueError(f"unknown solver {name!r}: for this {schedule.kind} schedule use one of {known}")
    allowed = ("trailing", "linspace") if name == "ipndm" else _entries(schedule)[name].spacings
    if spacing not in allowed:
        raise ValueError(f"{name} has no spacing {spacing!r}: use one of {', '.join(allowed)}")
    most = int(schedule.t_max) + 1 if schedule.kind == "discrete_vp" else 1000
    if not 1 <= steps <= most:
        raise ValueError(f"{text!r} has {steps} steps: allowed are 1 to {most}")
    return name, spacing, steps


def _entries(schedule: NoiseSchedule) -> dict[str, _Named]:
    return {"discrete_vp": _VP, "flow": _FLOW}.get(schedule.kind, {})


def _num_steps(entry: _Named, schedule: NoiseSchedule, steps: int, spacing: str) -> int:
    """The largest n whose rows do not exceed `steps`; one that divides the training steps where that matters."""
    n = entry.num_steps(steps)
    if entry.scheduler == "PNDMScheduler" and spacing == "trailing":
        while steps and (n < 1 or (schedule.t_max + 1) % n):
            steps -= 1
            n = entry.num_steps(steps)
    return n


def _fewest(entry: _Named) -> int:
    return next(steps for steps in range(1, 100) if entry.num_steps(steps) >= 1)


def _vp_table(entry: _Named, schedule: NoiseSchedule, n: int, spacing: str) -> SolverTable:
    config = schedule.parameters | entry.config | {"prediction_type": schedule.prediction_type}
    config["timestep_spacing"] = spacing
    if config.pop("snr_shift_scale", 1) != 1:  # a parameter of two classes; all take betas
        config = {name: value for name, value in config.items() if name not in ("beta_start", "beta_end")}
        config |= {"trained_betas": training_betas(schedule.parameters).tolist()}
    if "trained_betas" in config:
        config["num_train_timesteps"] = len(config["trained_betas"])
    if not config.get("rescale_betas_zero_snr"):
        config.pop("rescale_betas_zero_snr", None)  # half of the classes do not know it
    table = tabulate(_scheduler(entry, config), n)
    if n == 1 and table.timesteps[0] == 0:
        raise ValueError("one step of linspace spacing lies at timestep 0, not at the noise: use trailing spacing")
    return table


def _flow_table(entry: _Named, schedule: NoiseSchedule, n: int, spacing: str) -> SolverTable:
    shift = schedule.parameters["shift"]
    if schedule.prediction_type != "flow_prediction":
        raise ValueError(f"it has prediction type {schedule.prediction_type!r}, and diffusers needs flow_prediction")
    terminal = {name: schedule.parameters[name] for name in ("shift_terminal",) if name in schedule.parameters}
    if entry.config.get("use_flow_sigmas"):
        config = entry.config | {"prediction_type": "flow_prediction", "flow_shift": shift}
    else:
        config = {"shift": shift}
    scheduler = _scheduler(entry, config | terminal)
    arguments = {}
    if spacing == "linspace":
        scheduler.sigma_min = float(torch.tensor(1e-3))  # its own is shifted already, and would be once more
    elif entry.scheduler == "FlowMatchHeunDiscreteScheduler":
        scheduler.sigma_min = 1 / n  # its set_timesteps takes no sigmas, but spreads n of them down to this one
    elif entry.scheduler != "DPMSolverMultistepScheduler":
        arguments["sigmas"] = torch.linspace(1, 1 / n, n, dtype=torch.float64).numpy()  # UniPC takes no list
    table = tabulate(scheduler, n, set_timesteps=arguments)
    return replace(table, timesteps=table.timesteps * (schedule.parameters["timestep_scale"] / 1000))


def _scheduler(entry: _Named, config: dict[str, Any]) -> Any:
    import diffusers  # takes seconds, and an artifact does without it

    scheduler_class = getattr(diffusers, entry.scheduler)
    unknown = sorted(set(config) - set(inspect.signature(scheduler_class).parameters))
    if unknown:
        raise ValueError(f"{entry.scheduler} knows no {', '.join(unknown)}")
    return scheduler_class(**config)


def _timesteps(schedule: NoiseSchedule, n: int, spacing: str) -> torch.Tensor:
    """Timesteps of our own solvers, spaced as diffusers spaces them, (n,)."""
    line = partial(torch.linspace, dtype=torch.float64)
    if schedule.kind == "discrete_vp":
        total = schedule.t_max + 1
        if spacing == "linspace":
            return line(total - 1, 0, n + 1)[:-1].round()
        return (total - torch.arange(n, dtype=torch.float64) * (total / n)).round() - 1
    sigma = line(1, 1e-3, n) if spacing == "linspace" else line(1, 1 / n, n)
    if schedule.kind == "flow":
        shift = schedule.parameters["shift"]
        sigma = stretched(shift * sigma / (1 + (shift - 1) * sigma), schedule.parameters.get("shift_terminal"))
    return sigma * schedule.parameters["timestep_scale"]
