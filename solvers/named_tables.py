"""Tables of diffusers' schedulers by our names, on a spacing of theirs or on given steps."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from solvers.parameters import training_betas
from solvers.prediction import velocity_scale
from solvers.schedule import NoiseSchedule
from solvers.table import SolverTable
from solvers.tabulate import tabulate

SPACINGS = ("trailing", "linspace", "leading")
_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
_BELOW_NOISE = 1 - 1e-6  # of a flow: pure noise has no logarithm, and UniPC's own first step lies there
_OFF = 5e-5  # of the schedule's range: what a scheduler may differ from the steps it is given (it interpolates anew)


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
class Named:
    """One named scheduler: class name in diffusers, settings, spacings it knows, and n as a function of the rows."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    spacings: tuple[str, ...] = SPACINGS
    num_steps: Callable[[int], int] = _same

    @property
    def fewest(self) -> int:
        """Rows of the shortest table."""
        return next(steps for steps in range(1, 100) if self.num_steps(steps) >= 1)


_STRIDING = ("trailing", "leading")  # PNDM steps back by T // n whatever the spacing, so linspace would end far off
_VP = {
    "ddim": Named("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "ddpm": Named("DDPMScheduler", {"clip_sample": False}),
    "euler": Named("EulerDiscreteScheduler"),
    "euler_ancestral": Named("EulerAncestralDiscreteScheduler"),
    "heun": Named("HeunDiscreteScheduler", num_steps=_halved),
    "kdpm2": Named("KDPM2DiscreteScheduler", num_steps=_halved),
    "lms": Named("LMSDiscreteScheduler"),
    "dpmpp": Named("DPMSolverMultistepScheduler"),
    "dpmpp3m": Named("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_sde": Named("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Named("UniPCMultistepScheduler"),
    "deis": Named("DEISMultistepScheduler"),
    "pndm": Named("PNDMScheduler", {"set_alpha_to_one": True}, _STRIDING, _warmed),
    "plms": Named("PNDMScheduler", {"set_alpha_to_one": True, "skip_prk_steps": True}, _STRIDING, _repeated),
    "sa": Named("SASolverScheduler"),
    "lcm": Named("LCMScheduler", spacings=("trailing",)),
    "tcd": Named("TCDScheduler", spacings=("trailing",)),
}
_FLOW = {
    "euler": Named("FlowMatchEulerDiscreteScheduler", spacings=("trailing", "linspace")),
    "heun": Named("FlowMatchHeunDiscreteScheduler", spacings=("trailing", "linspace"), num_steps=_halved),
    "lcm": Named("FlowMatchLCMScheduler", spacings=("trailing", "linspace")),
    "dpmpp": Named("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, ("trailing",)),
    "unipc": Named("UniPCMultistepScheduler", {"use_flow_sigmas": True}, ("trailing",)),
}
_EDM_SPACINGS = ("karras", "exponential")
_EDM = {
    "euler": Named("EDMEulerScheduler", spacings=_EDM_SPACINGS),
    "dpmpp": Named("EDMDPMSolverMultistepScheduler", spacings=_EDM_SPACINGS),
    "dpmpp3m": Named("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, _EDM_SPACINGS),
}


def entries(schedule: NoiseSchedule) -> dict[str, Named]:
    """The named schedulers of a schedule."""
    return {"discrete_vp": _VP, "flow": _FLOW, "edm": _EDM}.get(schedule.kind, {})


def spaced_table(entry: Named, schedule: NoiseSchedule, steps: int, spacing: str) -> SolverTable:
    """The table of at most `steps` rows on one of the scheduler's own spacings.

    Raises:
        ValueError: too few steps, or settings that the scheduler does not take.
    """
    n = _num_steps(entry, schedule, steps, spacing)
    if n < 1:
        raise ValueError(f"too few steps: it needs at least {entry.fewest}")
    build = {"flow": _spaced_flow, "edm": _spaced_edm}.get(schedule.kind, _spaced_vp)
    return build(entry, schedule, n, spacing)


def takes_list(entry: Named) -> bool:
    """Whether its rows, one for each, can be put at given timesteps."""
    named = set(inspect.signature(_class(entry).set_timesteps).parameters)
    return entry.num_steps is _same and (entry.scheduler in _MULTISTEP or bool({"sigmas", "timesteps"} & named))


def listed_table(entry: Named, schedule: NoiseSchedule, timesteps: Tensor) -> SolverTable:
    """The table whose rows are at given timesteps, (N,), falling; no shift moves them.

    Raises:
        ValueError: a scheduler that takes no list, or whose states would lie elsewhere (whole timesteps only).
    """
    table = _listed(entry, schedule, timesteps)
    found = schedule.timestep(table.alpha[:-1], table.sigma[:-1])
    off = (found[:, None] - timesteps).abs() / (schedule.t_max - schedule.t_min)
    if float(torch.cat([off.amin(0), off.amin(1)]).max()) > _OFF:
        at = ", ".join(f"{value:.2f}" for value in found.tolist())
        raise ValueError(f"{entry.scheduler} takes whole timesteps only and would be at {at}: use euler or ipndm")
    return replace(table, timesteps=timesteps[off.argmin(1)])


def _listed(entry: Named, schedule: NoiseSchedule, timesteps: Tensor) -> SolverTable:
    if entry.scheduler in _MULTISTEP and schedule.kind != "edm":
        return tabulate(_placed(entry, schedule, timesteps), len(timesteps))
    scheduler, name, values = _list_taker(entry, schedule, timesteps)
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{entry.scheduler} takes no list of steps: use euler or ipndm")
    return tabulate(scheduler, None, set_timesteps={name: values})


def _placed(entry: Named, schedule: NoiseSchedule, timesteps: Tensor) -> Any:
    """A multistep scheduler whose steps lie where its own `set_timesteps` would not put them."""
    is_flow = schedule.kind == "flow"
    scheduler = _flow_scheduler(entry, {}, 1.0) if is_flow else _vp_scheduler(entry, schedule, "trailing")
    alpha, sigma = schedule.alpha_sigma(timesteps)
    levels = sigma.clamp_max(_BELOW_NOISE) if is_flow else sigma / alpha

    class Placed(type(scheduler)):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps, self.sigmas = timesteps, torch.cat([levels.float(), self.sigmas[-1:]])

    Placed.__name__ = type(scheduler).__name__
    scheduler.__class__ = Placed
    return scheduler


def _list_taker(entry: Named, schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Any, str, Any]:
    """A scheduler, and the name and value of the argument that puts its steps at `timesteps`."""
    if schedule.kind == "flow":
        return _flow_scheduler(entry, {}, 1.0), "sigmas", (timesteps / schedule.t_max).numpy()
    if schedule.kind == "discrete_vp":
        return _vp_scheduler(entry, schedule, "trailing"), "timesteps", timesteps.numpy()
    scheduler = _edm_scheduler(entry, schedule, "karras")
    low, high = (schedule.parameters[name] ** (1 / schedule.parameters["rho"]) for name in ("sigma_min", "sigma_max"))
    place = ((4 * timesteps / schedule.parameters["rho"]).exp() - high) / (low - high)  # what it takes for sigmas
    return scheduler, "sigmas", place


def _num_steps(entry: Named, schedule: NoiseSchedule, steps: int, spacing: str) -> int:
    """The largest n whose rows do not exceed `steps`; one that divides the training steps where that matters."""
    n = entry.num_steps(steps)
    if entry.scheduler == "PNDMScheduler" and spacing == "trailing":
        while steps and (n < 1 or (schedule.t_max + 1) % n):
            steps -= 1
            n = entry.num_steps(steps)
    return n


def _spaced_vp(entry: Named, schedule: NoiseSchedule, n: int, spacing: str) -> SolverTable:
    table = tabulate(_vp_scheduler(entry, schedule, spacing), n)
    if n == 1 and table.timesteps[0] == 0:
        raise ValueError("one step of linspace spacing lies at timestep 0, not at the noise: use trailing spacing")
    return table


def _vp_scheduler(entry: Named, schedule: NoiseSchedule, spacing: str) -> Any:
    config = schedule.parameters | entry.config | {"prediction_type": schedule.prediction_type}
    config["timestep_spacing"] = spacing
    if config.pop("snr_shift_scale", 1) != 1:  # a parameter of two classes; all take betas
        config = {name: value for name, value in config.items() if name not in ("beta_start", "beta_end")}
        config |= {"trained_betas": training_betas(schedule.parameters).tolist()}
    if "trained_betas" in config:
        config["num_train_timesteps"] = len(config["trained_betas"])
    if not config.get("rescale_betas_zero_snr"):
        config.pop("rescale_betas_zero_snr", None)  # half of the classes do not know it
    return _scheduler(entry, config)


def _spaced_flow(entry: Named, schedule: NoiseSchedule, n: int, spacing: str) -> SolverTable:
    if schedule.prediction_type != "flow_prediction":
        raise ValueError(f"it has prediction type {schedule.prediction_type!r}, and diffusers needs flow_prediction")
    terminal = {name: schedule.parameters[name] for name in ("shift_terminal",) if name in schedule.parameters}
    scheduler = _flow_scheduler(entry, terminal, schedule.shift_at(n))
    arguments = {}
    if spacing == "linspace":
        scheduler.sigma_min = float(torch.tensor(1e-3))  # its own is shifted already, and would be once more
    elif entry.scheduler == "FlowMatchHeunDiscreteScheduler":
        scheduler.sigma_min = 1 / n  # its set_timesteps takes no sigmas, but spreads n of them down to this one
    elif entry.scheduler != "DPMSolverMultistepScheduler":
        arguments["sigmas"] = torch.linspace(1, 1 / n, n, dtype=torch.float64).numpy()  # UniPC takes no list
    table = tabulate(scheduler, n, set_timesteps=arguments)
    return replace(table, timesteps=table.timesteps * (schedule.parameters["timestep_scale"] / 1000))


def _flow_scheduler(entry: Named, terminal: dict[str, Any], shift: float) -> Any:
    if entry.config.get("use_flow_sigmas"):
        return _scheduler(entry, entry.config | {"prediction_type": "flow_prediction", "flow_shift": shift} | terminal)
    return _scheduler(entry, {"shift": shift} | terminal)


def _spaced_edm(entry: Named, schedule: NoiseSchedule, n: int, spacing: str) -> SolverTable:
    return tabulate(_edm_scheduler(entry, schedule, spacing), n)


def _edm_scheduler(entry: Named, schedule: NoiseSchedule, spacing: str) -> Any:
    scale = velocity_scale(schedule.prediction_type)
    if scale is None or abs(scale) != schedule.parameters["sigma_data"]:
        raise ValueError(
            f"it has prediction type {schedule.prediction_type!r}, and diffusers needs EDM's own: use ipndm"
        )
    own = {"prediction_type": "epsilon" if scale > 0 else "v_prediction", "sigma_schedule": spacing}
    return _scheduler(entry, schedule.parameters | entry.config | own)


def _class(entry: Named) -> Any:
    import diffusers  # takes seconds, and an artifact does without it

    return getattr(diffusers, entry.scheduler)


def _scheduler(entry: Named, config: dict[str, Any]) -> Any:
    scheduler_class = _class(entry)
    unknown = sorted(set(config) - set(inspect.signature(scheduler_class).parameters))
    if unknown:
        raise ValueError(f"{entry.scheduler} knows no {', '.join(unknown)}")
    return scheduler_class(**config)
