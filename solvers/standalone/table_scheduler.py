"""A solver table as a diffusers scheduler. Needs torch and diffusers only.

    state[i+1] = sum_j state_coef[i,j] state[j] + sum_k output_coef[i,k] output[k] + sum_j noise_coef[i,j] noise[j],
                 j <= i, row of call k <= i

States are what the network receives, so `scale_model_input` changes nothing; steps are counted, never looked up by
the timestep's value; a state is the sample that `step` receives. A table makes one network call a row, whose output
is what `step` receives, or says which `calls` it makes: those outputs are given to `receive`. Its weights are numbers,
or, with a `space`, one channel matrix per band of spatial frequencies.
"""

import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

SEED_LIMIT = 2**32
CONDITIONAL = "conditional"
STEP_CHECKS = ("sigmas", "timesteps", "shift", "guidance scale")  # made at every call
SCHEDULERS = {  # of diffusers, by the kind of their noise schedule
    "vp": [kind.name for kind in KarrasDiffusionSchedulers if not kind.name.startswith("EDM")],
    "flow": ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"],
    "edm": ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"],
}
OTHERS = ["CogVideoXDDIMScheduler", "LCMScheduler"]  # whose configs are known too
TRAINING = ("alphas", "alphas_cumprod", "betas", "final_alpha_cumprod", "sigma_max", "sigma_min")


@dataclass
class TableSchedulerOutput(BaseOutput):
    """prev_sample: the next state, (batch, *shape)."""

    prev_sample: Tensor


class TableScheduler(SchedulerMixin, ConfigMixin):
    """Runs the solver tables of its config in any diffusers pipeline.

    Its config holds the noise schedule in diffusers' words too: `from_config(pipe.scheduler.config)` of another one
    takes it from there, and so do `alphas_cumprod`, `betas`, `sigma_min` and their like, where a schedule has them.

    Args:
        tables: one dict per number of steps: timesteps (N,), alpha and sigma (N+1,), state_coef and noise_coef
            (N, N, *weight) and output_coef (N, calls, *weight) as nested lists, start_scale, prediction_type, perhaps
            calls, [row, branch of the condition] each, and space: band edges in cycles per pixel, and channels.
        schedule: the noise schedule the tables were made for, None where unknown.
        guidance_scale: the scale (or [lowest, highest]) they were made at, None where unknown.
        seed: row r's noise of sample k is drawn from (seed + k, r), or from (seed[k], r) for a list. Without it noise
            comes from the pipeline's generator, or from torch's global one where the pipeline passes none.
        scale_start: multiply the first model input by start_scale, for a pipeline that ignores `init_noise_sigma`.
        allow_mismatch: names of STEP_CHECKS that are not made: `sigmas` and `timesteps` other than the tables' own, a
            `shift` (mu) or `guidance scale` other than what they were made for.
        num_train_timesteps, prediction_type: what pipelines read from a scheduler's config.
        further_guidance: other arguments of a pipeline's guidance that they were made at, see `further_guidance`.
        later_tables: tables that begin at less noise, for `set_begin_index`; never chosen by their number of steps.
    Raises:
        ValueError: no table, or two with the same number of steps.
    """

    order = 1
    _compatibles = [name for names in (*SCHEDULERS.values(), OTHERS) for name in names]
    _module = "table_scheduler"  # what saved pipelines call the file beside the config

    @register_to_config
    def __init__(
        self,
        tables: list[dict[str, Any]] | None = None,
        schedule: dict[str, Any] | None = None,
        guidance_scale: float | list[float] | None = None,
        seed: int | list[int] | None = None,
        scale_start: bool = False,
        allow_mismatch: list[str] | None = None,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        later_tables: list[dict[str, Any]] | None = None,
        further_guidance: dict[str, Any] | None = None,
    ) -> None:
        plans = [_Plan(table) for table in self._checked(tables or [])]
        self._plans = {len(plan): plan for plan in plans}
        if not self._plans or len(self._plans) < len(plans):
            raise ValueError("TableScheduler needs tables, each with another number of steps: load it with from_solver")
        self._later = [_Plan(table) for table in self._checked(later_tables or [])]
        self.register_to_config(tables=_Tables(tables or []), later_tables=_Tables(later_tables or []))
        self._checks = [name for name in STEP_CHECKS if name not in (allow_mismatch or [])]
        self.__module__ = self._module
        self.seed = seed
        self._select(next(iter(self._plans)), None)

    @staticmethod
    def _checked(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return tables

    @property
    def available_steps(self) -> list[int]:
        """The numbers of inference steps this scheduler has a table for."""
        return sorted(self._plans)

    @property
    def init_noise_sigma(self) -> float:
        """Scale of the first state against unit noise."""
        return 1.0 if self.config["scale_start"] else self._plan.start_scale

    @property
    def step_index(self) -> int:
        """Place in `timesteps` of the row that the next `step` computes."""
        return self._row + len(self.timesteps) - len(self._plan)

    @property
    def begin_index(self) -> int:
        """Place in `timesteps` of the row the run began with."""
        return self._begin

    @property
    def takes_one_output(self) -> bool:
        """Whether the current table makes one call a row, whose output is what `step` receives."""
        return self._plan.takes_one_output

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches of the condition that the network is called with at the current row."""
        return tuple(branch for _, branch in self._plan.calls[self._row]) if self._row < len(self._plan) else ()

    @property
    def all_branches(self) -> set[str]:
        """Branches of the condition that the network is called with at any row."""
        return {branch for calls in self._plan.calls for _, branch in calls}

    @property
    def compatibles(self) -> list[type]:
        """Scheduler classes that `from_config(self.config)` gives the same noise schedule."""
        found = [getattr(diffusers, name, None) for name in SCHEDULERS[self._kind]]
        return [kind for kind in found if kind is not None and "dummy" not in kind.__module__]

    def __getattr__(self, name: str) -> Any:
        """Numbers of the training schedule, as diffusers' own schedulers have them; None of them where unknown."""
        if name in TRAINING and self._training is not None and hasattr(self._training, name):
            return getattr(self._training, name)
        return super().__getattr__(name)

    @cached_property
    def _training(self) -> Any:
        """A scheduler of diffusers on the same noise schedule; None where diffusers has no words for it."""
        known = {name for name in ("beta_schedule", "trained_betas") if self.config.get(name) is not None}
        if self._kind == "edm" or (self._kind == "vp" and not known):
            return None
        vp = "CogVideoXDDIMScheduler" if self.config.get("snr_shift_scale") is not None else "DDIMScheduler"
        kind = getattr(diffusers, vp if self._kind == "vp" else SCHEDULERS["flow"][0])
        names = inspect.signature(kind.__init__).parameters.keys() & self.config.keys()
        return kind(**{name: self.config[name] for name in names})

    @property
    def _kind(self) -> str:
        """Of the noise schedule, as of SCHEDULERS."""
        known = (self.config["schedule"] or {}).get("kind")
        is_flow = known == "flow" or (known is None and self._plan.prediction_type == "flow_prediction")
        return "flow" if is_flow else "edm" if known == "edm" else "vp"

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
        **further: Any,
    ) -> None:
        """Choose the table and forget the last run.

        Args:
            num_inference_steps: network evaluations; None is the length of `sigmas` or `timesteps`, or the only table.
            device: where `timesteps` and `sigmas` go.
            sigmas, timesteps: pipelines pass them; they must be evenly spaced from 1 or the table's own.
            mu: the pipeline's dynamic shift, compared with the schedule's shift.
            original_inference_steps: LCM pipelines pass it on; it asks for steps of its own.
            further: what pipelines tell other schedulers; only None is taken.
        Raises:
            ValueError: a number of steps without a table, or sigmas, timesteps, mu or guidance of the calling pipeline
                that the table was not made for.
        """
        _check_told("set_timesteps", further)
        given = sigmas if sigmas is not None else timesteps
        count = num_inference_steps if given is None else len(given)
        if count is None and len(self._plans) == 1:
            count = self.available_steps[0]
        if count not in self._plans:
            raise ValueError(
                f"num_inference_steps is {count}: this solver has tables for {self.available_steps} steps only; "
                "pass one of these"
            )
        self._select(count, device)
        if original_inference_steps is not None:
            raise ValueError(
                f"original_inference_steps is {original_inference_steps}: this solver has its own steps; leave it out"
            )
        self._check_steps(sigmas, timesteps, mu)
        self._check_guidance()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later row, as image-to-image pipelines do.

        The table of `set_timesteps` does so where no row from there on needs what came before; otherwise one with the
        same timesteps from there on that does, among all tables and later ones.

        Raises:
            ValueError: no such table.
        """
        rest = self.timesteps[begin_index:].cpu()
        chosen = self._plans[self.num_inference_steps]
        plans = (chosen, *self._plans.values(), *self._later)
        plan = next((plan for plan in plans if plan.begins(rest)), None)
        if plan is None:
            raise ValueError(
                f"this {len(chosen)}-step solver cannot start at row {begin_index}: later rows use earlier results, or "
                "there are none; start at 0 (strength 1), or take a one-step solver, or add one for these timesteps"
            )
        self._plan, self._begin, self._row = plan, begin_index, len(plan) - len(rest)
        self.sigmas = torch.cat([self.sigmas[:begin_index], plan.sigmas[self._row :].to(self.sigmas.device)])
        self._history: tuple[dict, dict, dict] = ({}, {}, {})
        self._received: dict[str, Tensor | None] = {}
        self._returned: Tensor | None = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample itself: states are what the network receives (with `scale_start`, row 0 is scaled here)."""
        if self.config["scale_start"] and self.step_index == 0:
            return sample * self._plan.start_scale
        return sample

    def receive(self, outputs: dict[str, Tensor | None]) -> None:
        """Outputs of the current row, which the next `step` takes instead of its model_output.

        Args:
            outputs: by branch of the condition, (batch, *shape); None where the pipeline asked for one that the table
                does not take here.
        Raises:
            ValueError: a second output of one branch.
        """
        if twice := sorted(outputs.keys() & self._received.keys()):
            raise ValueError(
                f"the pipeline calls its network twice for the {twice[0]} output of row {self._row}: use it without "
                "further guidance (such as skip-layer guidance), which this solver does not know"
            )
        self._received |= outputs

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        eta: float | None = 0.0,
        use_clipped_model_output: bool | None = None,
        **further: Any,
    ) -> TableSchedulerOutput | tuple[Tensor, ...]:
        """The next state. States accumulate in float32 or better, whatever the pipeline's dtype.

        Args:
            model_output: (batch, *shape), of the tables' prediction type; not used where the table says its calls.
            timestep: not used, rows are counted.
            sample: the state the network received, (batch, *shape).
            generator: source of fresh noises when the scheduler has no seed.
            return_dict: False returns a tuple.
            eta, use_clipped_model_output: DDIM's; only what switches them off is taken.
            further: what pipelines tell other schedulers; only None is taken.
        Raises:
            ValueError: more steps than rows, outputs missing, or samples that the weights do not act on.
        """
        if eta or use_clipped_model_output:
            raise ValueError(f"eta is {eta}: this solver's noises stand in its table; call the pipeline without eta")
        _check_told("step", further)
        row, rows = self._row, self._plan.rows
        if row >= len(rows):
            raise ValueError(f"all {len(self.timesteps)} steps are done: call set_timesteps before the next run")
        state, space = self._unrounded(sample), _space(self._plan.space, sample)
        states, outputs, noises = self._history
        states[row] = space.split(state)
        outputs |= {column: space.split(_wide(value)) for column, value in self._outputs(model_output, sample)}
        for column, _ in rows[row][2]:
            if column not in noises:
                noises[column] = space.split(self._noise(column, sample, generator).to(state))
        total = torch.zeros_like(states[row])
        for terms, values in zip(rows[row], self._history):
            for column, weight in terms:
                total = space.add(total, weight, values[column])
        self._forget(row)
        self._row, self._received, self._returned = row + 1, {}, space.merge(total)
        result = self._returned.to(sample.dtype)
        if return_dict:
            return TableSchedulerOutput(prev_sample=result)
        return (result, result) if len(rows) == 1 else (result,)  # PixArt reads a one-step image from place 1

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * original_samples + sigma * noise at the node of the given timesteps.

        A timestep of the table means the node of its row: of a repeated one the current row's or the next after it.

        Args:
            original_samples, noise: (batch, *shape).
            timesteps: scalar or (batch,).
        Raises:
            ValueError: timesteps whose node is not known.
        """
        alpha, sigma = (_broadcast(value, original_samples) for value in self._nodes(torch.as_tensor(timesteps)))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by the name and in the order of flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network predicts as velocity: noise - sample of a flow, else alpha * noise - sigma * sample."""
        if self._kind == "flow":
            return noise - sample
        alpha, sigma = (_broadcast(value, sample) for value in self._nodes(torch.as_tensor(timesteps)))
        return alpha * noise - sigma * sample

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """The config and, beside it, this file, by which a pipeline loads with `trust_remote_code=True`.

        Raises:
            ValueError: saved with a pipeline that would not load it, see `check_keeps_scheduler`.
        """
        pipe, _ = calling_pipeline(self, "save_pretrained")
        check_keeps_scheduler(None if pipe is None else type(pipe))
        path = Path(save_directory, f"{self.__module__}.py")
        source = Path(__file__).read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(source, encoding="utf-8")
        temporary.replace(path)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def _nodes(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float64: the table's at its own timesteps, the schedule's at others."""
        timesteps, count = timesteps.detach().reshape(-1).cpu(), len(self._plan)
        matches = timesteps.float()[:, None] == self._plan.timesteps
        order = (torch.arange(count) - min(self._row, count - 1)) % count
        rows = torch.where(matches, order, count).argmin(1)
        alpha, sigma = self._plan.alpha[rows], self._plan.sigma[rows]
        others = ~matches.any(1)
        if others.any():
            alpha[others], sigma[others] = self._schedule_nodes(timesteps[others].double())
        return alpha, sigma

    def _schedule_nodes(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes of any timesteps; between those of training the angle atan2(sigma, alpha) is interpolated."""
        if self._kind == "flow":
            sigma = timesteps / self.config["num_train_timesteps"]
            return 1 - sigma, sigma
        if self._training is None:
            own = self._plan.timesteps.tolist()
            raise ValueError(f"add_noise knows the timesteps {own} of this solver only: pass one of them")
        angles = self._training.alphas_cumprod.double().sqrt().acos()
        lower = timesteps.floor().long().clamp(0, len(angles) - 2)
        angle = torch.lerp(angles[lower], angles[lower + 1], timesteps - lower)
        return angle.cos(), angle.sin()

    def _select(self, count: int, device: str | torch.device | None) -> None:
        plan = self._plans[count]
        self.num_inference_steps = count
        self.timesteps, self.sigmas = plan.timesteps.to(device, copy=True), plan.sigmas.to(device, copy=True)
        self.set_begin_index(0)

    def _check_steps(self, sigmas: Any, timesteps: Any, mu: float | None) -> None:
        """Refuse what would ask for other steps than the table's; what pipelines pass by themselves asks for nothing.

        That is linspace(1, 1 / n, n), or in CogView 4 down to the last timestep of training, as timesteps too.
        """
        n, trained = len(self.timesteps), self.config["num_train_timesteps"]
        even = [torch.linspace(1, 1 / last, n) for last in (n, trained)]
        given = {"sigmas": sigmas, "timesteps": timesteps, "shift": mu}
        given = {name: value for name, value in given.items() if value is not None and name in self._checks}
        if "sigmas" in given and not any(_close(sigmas, own) for own in (*even, self.sigmas[:-1], self.sigmas)):
            raise ValueError(f"sigmas are {list(sigmas)}: this solver has its own steps; pass num_inference_steps={n}")
        own_steps = ((self.timesteps, 1e-3), (even[1] * trained, 1.0))  # the latter are cut to whole numbers
        if "timesteps" in given and not any(_close(timesteps, own, slack) for own, slack in own_steps):
            raise ValueError(f"timesteps are {list(timesteps)}: this solver's own are {self.timesteps.tolist()}")
        if "shift" in given:
            self._check_shift(float(given["shift"]))

    def _check_guidance(self) -> None:
        """Refuse guidance other than the tables', as far as the call of the pipeline shows it."""
        made_for, (pipe, arguments) = self.config["guidance_scale"], calling_pipeline(self)
        if pipe is None or made_for is None or "guidance scale" not in self._checks:
            return
        found = pipeline_guidance(pipe, arguments)
        low, high = made_for if isinstance(made_for, Sequence) else (made_for, made_for)
        slack = 1e-9 * max(1.0, abs(low), abs(high))
        if not low - slack <= found <= high + slack:
            raise ValueError(
                f"the pipeline is called at guidance scale {found}, this solver was made for {made_for}: call it at "
                "that scale, or use a solver for this one"
            )
        made_at, further = self.config["further_guidance"] or {}, further_guidance(pipe, arguments)
        for name in sorted(made_at.keys() | further.keys()):
            if made_at.get(name) != further.get(name):
                made = f"at {made_at[name]}" if name in made_at else "without"
                raise ValueError(
                    f"the pipeline is called with {name} {further.get(name, 'as it is by default')}, this solver was "
                    f"made {made}: call it as the solver was made for"
                )

    def _check_shift(self, mu: float) -> None:
        parameters, steps = (self.config["schedule"] or {}).get("parameters") or {}, len(self.timesteps)
        listed = parameters.get("step_shifts") or []  # of a pipeline whose shift depends on the number of steps
        made_for = listed[steps - 1] if steps <= len(listed) else parameters.get("shift")
        shift = mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        if made_for is not None and abs(shift - made_for) > 1e-3 * made_for:
            raise ValueError(
                f"the pipeline's shift is {shift:.4f} (mu = {mu:.4f}), this solver was made for {made_for:.4f}: "
                "use the image size it was made for, or allow_mismatch='shift'"
            )

    def _outputs(self, model_output: Tensor, sample: Tensor) -> list[tuple[int, Tensor]]:
        """(column, output) of the calls of the current row."""
        if self._plan.takes_one_output:
            return [(self._row, model_output)]
        return [(column, self._output(branch, sample)) for column, branch in self._plan.calls[self._row]]

    def _output(self, branch: str, sample: Tensor) -> Tensor:
        output = self._received.get(branch)
        if output is None:
            raise ValueError(
                f"row {self._row} of this solver takes the {branch} output of the network apart, which was not given: "
                "use solvers.accelerate_pipeline(pipe, solver), and call the pipeline with guidance"
            )
        if output.shape != sample.shape:
            raise ValueError(
                f"the {branch} output has shape {tuple(output.shape)}, the sample {tuple(sample.shape)}: call the "
                f"pipeline {'with' if len(output) < len(sample) else 'without'} guidance, as the solver was made for"
            )
        return output

    def _unrounded(self, sample: Tensor) -> Tensor:
        """The state in float32 or better: where a half-precision pipeline hands back what it was given, unrounded."""
        kept = self._returned
        if kept is None or kept.dtype == sample.dtype or kept.shape != sample.shape:
            return _wide(sample)
        return torch.where(kept.to(sample.dtype) == sample, kept, _wide(sample))

    def _noise(self, row: int, sample: Tensor, generator: Any) -> Tensor:
        if self.seed is None:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        seeds = [self.seed + k for k in range(len(sample))] if isinstance(self.seed, int) else list(self.seed)
        if not seeds or len(sample) % len(seeds):
            raise ValueError(f"{len(seeds)} seeds for a batch of {len(sample)}: give one per sample, or one integer")
        if not all(0 <= seed < SEED_LIMIT for seed in seeds):
            raise ValueError(f"seeds {seeds} are outside 0 to 2^32 - 1")
        generators = [np.random.Generator(np.random.Philox(key=[seed, row])) for seed in seeds]
        draws = [torch.as_tensor(source.standard_normal(sample.shape[1:], np.float32)) for source in generators]
        return torch.stack(draws * (len(sample) // len(seeds))).to(sample.device)

    def _forget(self, row: int) -> None:
        """Drop what no later row uses."""
        for values, last_use in zip(self._history, self._plan.last_use):
            for column in [j for j in values if last_use[j] <= row]:
                del values[column]


def pipeline_guidance(pipe: Any, arguments: Mapping[str, Any]) -> float:
    """The guidance scale, as it is meant here, of a diffusers pipeline that is called with some arguments.

    Here it is uncond + scale (cond - uncond) at any scale: 0 is the unconditional output, 1 the conditional one. A
    pipeline guides above 1 only; below, it gives the conditional output, too. One whose network is told the scale
    (Flux, latent consistency models) keeps it. Where there is a `true_cfg_scale`, it is that of guidance, which a
    negative prompt switches on. A pipeline with a `guider` has the scale there.
    """
    if (guider := _guiders(pipe).get("guider")) is not None:
        config = guider.config
        scale = float(config.get("guidance_scale", 1.0)) + bool(config.get("use_original_formulation"))
        return scale if guider._enabled else 1.0
    scale = arguments.get("guidance_scale")
    if _is_told(pipe):
        return 1.0 if scale is None else float(scale)
    if "true_cfg_scale" in arguments:
        scale = _true_scale(arguments)
    return 1.0 if scale is None else max(1.0, float(scale))


def _is_told(pipe: Any) -> bool:
    """Whether the network is told the guidance scale."""
    networks = (getattr(pipe, name, None) for name in ("transformer", "unet"))
    configs = [network.config for network in networks if network is not None]
    return any(config.get("guidance_embeds") or config.get("time_cond_proj_dim") for config in configs)


def _true_scale(arguments: Mapping[str, Any]) -> float:
    """`true_cfg_scale`, which does nothing without a negative prompt, nor below 1."""
    negative = (arguments.get(name) for name in ("negative_prompt", "negative_prompt_embeds"))
    return max(1.0, float(arguments.get("true_cfg_scale") or 1.0)) if any(n is not None for n in negative) else 1.0


def further_guidance(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a call says about guidance beside its scale, such as a second scale: arguments other than the defaults."""
    second = _true_scale(arguments) if _is_told(pipe) else 1.0  # a distilled Flux can be guided on top
    found: dict[str, Any] = {} if second == 1.0 else {"true_cfg_scale": second}
    for name, parameter in inspect.signature(type(pipe).__call__).parameters.items():
        value = arguments.get(name) if is_guidance(name) else None
        value = list(value) if isinstance(value, tuple) else value
        usual = (None, parameter.default, [parameter.default], arguments.get("guidance_scale"))
        if isinstance(value, int | float | str | list) and value not in usual:
            found[name] = value
    return found | {name: text for name, guider in _guiders(pipe).items() if (text := _described(name, guider))}


def _guiders(pipe: Any) -> dict[str, Any]:
    """Objects of a pipeline that guide, by name; `guider` is the one of its scale."""
    parts = getattr(pipe, "__dict__", {})  # a folder's path has none
    return {name: part for name, part in parts.items() if name.endswith("guider") and hasattr(part, "config")}


def _described(name: str, guider: Any) -> str:
    """What a guider does beside plain guidance by its scale; empty where it does nothing else."""
    told = {key: parameter.default for key, parameter in inspect.signature(type(guider).__init__).parameters.items()}
    by_scale = ("guidance_scale", "use_original_formulation", "enabled") if name == "guider" else ()
    more = {key: value for key, value in guider.config.items() if key in told and value != told[key]}
    more = {key: value for key, value in more.items() if key not in by_scale}
    kind = type(guider).__name__
    return "" if kind == "ClassifierFreeGuidance" and not more and name == "guider" else f"{kind} {more or ''}".strip()


def is_guidance(name: str) -> bool:
    """Whether an argument of a pipeline is about guidance, but not its scale: by words, attention, frames or sound."""
    is_known = re.search(r"guidance|cfg|(^|_)(pag|sag|stg)_|modality_scale", name)
    return is_known is not None and name not in ("guidance_scale", "true_cfg_scale")


def check_keeps_scheduler(pipeline_class: type | None) -> None:
    """Refuse the class of a pipeline that, whenever it is loaded, makes a scheduler of diffusers of its scheduler.

    Raises:
        ValueError: such a class.
    """
    if pipeline_class is None:
        return
    try:
        source = inspect.getsource(pipeline_class.__init__)
    except (OSError, TypeError):  # there is no source to look at
        return
    if re.search(r"\bscheduler = \w+\.from_config\(", source):
        raise ValueError(
            f"a saved {pipeline_class.__name__} makes a scheduler of diffusers of its own when it is loaded, so this "
            "solver would be lost: save the scheduler alone, pipe.scheduler.save_pretrained(folder), and after loading "
            "set pipe.scheduler = TableScheduler.from_pretrained(folder)"
        )


def calling_pipeline(scheduler: Any, name: str = "__call__") -> tuple[Any, Mapping[str, Any]]:
    """The pipeline whose call, or method of this name, leads here, and its arguments; (None, {}) without one."""
    frame = inspect.currentframe()
    while frame is not None:
        pipe = frame.f_locals.get("self")
        if frame.f_code.co_name == name and getattr(pipe, "scheduler", None) is scheduler:
            return pipe, frame.f_locals
        frame = frame.f_back
    return None, {}


class _Plan:
    """A table as it is run: what each row calls, adds up and is the last to use."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.timesteps = torch.tensor(table["timesteps"], dtype=torch.float32)
        self.alpha, self.sigma = (torch.tensor(table[name], dtype=torch.float64) for name in ("alpha", "sigma"))
        self.prediction_type = table["prediction_type"]
        scale = self.alpha + self.sigma if self.prediction_type == "flow_prediction" else self.alpha
        self.sigmas = (self.sigma / scale).float()
        self.start_scale, self.space = float(table["start_scale"]), table.get("space")
        blocks = (table["state_coef"], table["output_coef"], table["noise_coef"])
        self.rows = [tuple(_terms(block[row]) for block in blocks) for row in range(len(self))]
        self.last_use = [_last_use([row[kind] for row in self.rows], len(blocks[kind][0])) for kind in range(3)]
        self.calls, self.takes_one_output = _calls(table.get("calls"), len(self)), "calls" not in table

    def __len__(self) -> int:
        return len(self.timesteps)

    def begins(self, rest: Tensor) -> bool:
        """Whether the last rows tell the network `rest`, one timestep or more, and use nothing from before."""
        first = len(self) - len(rest)
        if first < 0 or not len(rest) or not torch.allclose(rest, self.timesteps[first:], rtol=1e-5):
            return False
        made = [row for row, calls in enumerate(self.calls) for _ in calls]
        origins = (range(len(self)), made, range(len(self)))
        used = [
            origin[column] for row in self.rows[first:] for terms, origin in zip(row, origins) for column, _ in terms
        ]
        return all(row >= first for row in used)


class _Tables(list):
    """Tables of a config, short where diffusers prints a config that another scheduler does not take whole."""

    def __repr__(self) -> str:
        return f"<tables of {[len(table['timesteps']) for table in self]} steps>"


class _Numbers:
    """Weights are numbers."""

    def split(self, x: Tensor) -> Tensor:
        return x

    def merge(self, parts: Tensor) -> Tensor:
        return parts

    def add(self, total: Tensor, weight: Any, parts: Tensor) -> Tensor:
        return torch.add(total, parts, alpha=weight)


class _Bands:
    """Weights are one channel matrix per band of the frequencies sqrt(fy^2 + fx^2) over the last two axes.

    `split` gives the real numbers of the half spectrum band after band; the sample itself where there is one band.
    """

    def __init__(self, edges: Sequence[float], size: torch.Size, device: torch.device) -> None:
        self.edges, self.size = edges, size
        vertical = torch.fft.fftfreq(size[0], dtype=torch.float64)[:, None]
        radius = (vertical**2 + torch.fft.rfftfreq(size[1], dtype=torch.float64) ** 2).sqrt().flatten()
        band = torch.bucketize(radius, torch.tensor(edges, dtype=torch.float64), right=True)
        self.order = torch.argsort(band, stable=True).to(device)
        counts = 2 * torch.bincount(band, minlength=len(edges) + 1)
        self.counts = counts.tolist() if edges else [size.numel()]

    def split(self, x: Tensor) -> Tensor:
        if not self.edges:
            return x.flatten(-2)
        spectrum = torch.fft.rfft2(x, norm="ortho").flatten(-2)
        return torch.view_as_real(spectrum[..., self.order]).flatten(-2)

    def merge(self, parts: Tensor) -> Tensor:
        if not self.edges:
            return parts.unflatten(-1, self.size)
        spectrum = torch.view_as_complex(parts.unflatten(-1, (-1, 2)).contiguous())[..., self.order.argsort()]
        return torch.fft.irfft2(spectrum.unflatten(-1, (self.size[0], -1)), s=self.size, norm="ortho")

    def add(self, total: Tensor, weight: Any, parts: Tensor) -> Tensor:
        bands = zip(weight.to(parts), parts.split(self.counts, -1))
        return total + torch.cat([torch.einsum("ab,nb...->na...", matrix, band) for matrix, band in bands], -1)


def _space(space: dict[str, Any] | None, sample: Tensor) -> _Numbers | _Bands:
    """How weights act on samples of this shape."""
    if space is None:
        return _Numbers()
    if sample.ndim < 4 or sample.shape[1] != space["channels"]:
        raise ValueError(
            f"this solver's weights are matrices of {space['channels']} channels, the samples have shape "
            f"{tuple(sample.shape)}: it runs on (batch, channels, height, width), not on packed tokens"
        )
    return _Bands(space["edges"], sample.shape[-2:], sample.device)


def _calls(calls: list[list[Any]] | None, rows: int) -> list[list[tuple[int, str]]]:
    """(column, branch) of the network calls of each row."""
    calls = [[row, CONDITIONAL] for row in range(rows)] if calls is None else calls
    return [[(column, branch) for column, (at, branch) in enumerate(calls) if at == row] for row in range(rows)]


def _terms(row: list[Any]) -> list[tuple[int, Any]]:
    """(column, weight) of what is not zero; a weight is a number, or (bands, channels, channels)."""
    weights = enumerate(torch.tensor(row, dtype=torch.float64))
    return [(column, weight if weight.ndim else weight.item()) for column, weight in weights if weight.any()]


def _last_use(rows: list[list[tuple[int, Any]]], columns: int) -> list[int]:
    return [max((i for i, row in enumerate(rows) if any(j == c for c, _ in row)), default=-1) for j in range(columns)]


def _wide(value: Tensor) -> Tensor:
    """A copy in float32 or better: what is given may be written over by the pipeline later."""
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _broadcast(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _check_told(method: str, arguments: Mapping[str, Any]) -> None:
    if told := sorted(name for name, value in arguments.items() if value is not None):
        raise ValueError(
            f"the pipeline passes {' and '.join(told)} to the {method} of its scheduler, which no solver table knows: "
            "use this solver in the pipeline it was made for"
        )


def _close(given: Any, own: Tensor, slack: float = 1e-3) -> bool:
    given = torch.as_tensor(given, dtype=torch.float32).cpu()
    return given.shape == own.shape and torch.allclose(given, own.cpu(), rtol=1e-3, atol=slack)
