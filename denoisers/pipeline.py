"""Any diffusers pipeline as a denoiser, without an adapter for its network."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from denoisers.diffusers_base import read_schedule
from denoisers.pipeline_arguments import batch_of, described, entries_of
from denoisers.proxies import Ender, Injector, Recorder, Recording, scheduler_replaced
from solvers.identity import hash_modules
from solvers.schedule import NoiseSchedule
from solvers.standalone.table_scheduler import pipeline_guidance
from solvers.table import SolverTable
from solvers.tabulate import tabulate

PROBE_STEPS = 10  # some schedulers refuse very few
MOST_STEPS = 50  # of a solver whose shift is known where it depends on the number of steps


class PipelineDenoiser(nn.Module):
    """What a pipeline hands its scheduler, as a function of state and timestep.

    Prompts, guidance, sizes and everything else are the pipeline's own business, so pipelines this project has never
    heard of work too, as long as they call `scheduler.step(model_output, timestep, sample)` once a step. A call costs
    two evaluations of the network (the first is of the pipeline's own noise, see `Injector`) and no decoding; it has no
    gradients. Guidance that changes from step to step is evaluated as in the second of two steps.

    A condition is int64 (batch, 2): which prompt, and the seed of the generator that the pipeline draws from (its start
    noise, and in some pipelines a part of the condition, such as an encoded picture).

    Args:
        pipe: the pipeline; its scheduler is only read, and replaced while it runs.
        prompts: a list of prompts; or of mappings of arguments, such as {"prompt": "a cat", "image": picture}; None for
            a pipeline without prompts.
        prompt_argument: the argument of the pipeline's call that takes a list of prompts (DiT: class_labels).
        batch_size: prompts in one call.
        call: further arguments of every call, such as guidance_scale, height, num_frames; the denoiser's own
            `guidance_scale` is what that means here, see `pipeline_guidance`.
    Raises:
        ValueError: an empty list of prompts, or arguments the pipeline does not take.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Any] | None = None,
        *,
        prompt_argument: str = "prompt",
        batch_size: int = 1,
        **call: Any,
    ) -> None:
        super().__init__()
        self.entries = entries_of(prompts, prompt_argument)
        self.are_arguments = prompts is not None and isinstance(prompts[0], Mapping)
        known = inspect.signature(type(pipe).__call__).parameters
        unknown = sorted({"num_inference_steps", *self.entries[0], *call} - known.keys())
        if unknown:
            allowed = ", ".join(name for name in known if name != "self")
            raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: its arguments are {allowed}")
        self.pipe, self.batch_size, self.call = pipe, batch_size, call
        self.counts_samples = not self.entries[0] and "batch_size" in known
        defaults = {name: parameter.default for name, parameter in known.items()}
        self.guidance_scale = pipeline_guidance(pipe, defaults | call | self.entries[0])
        self.name = type(pipe).__name__
        self.settings = {"prompts": described(self.entries), "call": described(call)}
        self._probes: dict[tuple[int, int], Recording] = {}

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the pipeline's scheduler, at the shift the pipeline gives it.

        Where the pipeline's shift depends on the number of steps, it is listed for up to MOST_STEPS, see `shift_at`.
        """
        first, other = (self._schedule_at(steps) for steps in (PROBE_STEPS, PROBE_STEPS + 1))
        if first == other:
            return first
        shifts = [self._schedule_at(steps).parameters["shift"] for steps in range(1, MOST_STEPS + 1)]
        return replace(first, parameters=first.parameters | {"step_shifts": shifts})

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one state, as the scheduler sees it; found by one evaluation."""
        return tuple(self._probe(PROBE_STEPS).states[0].shape[1:])

    @property
    def thresholding(self) -> dict[str, Any] | None:
        """What else acts on outputs: arguments of guidance beside its scale, such as a second one; None for nothing."""
        return self._probe(PROBE_STEPS).guidance or None

    @property
    def weight_hash(self) -> str:
        """SHA-256 of the weights, as they are now, of all modules that the pipeline calls in a step.

        At its first or at its last one; text encoders and autoencoders are not among them.
        """
        return hash_modules({name: self.pipe.components[name] for name in self._networks})

    @cached_property
    def _networks(self) -> set[str]:
        """Names of the modules that the pipeline calls in a step, found by two evaluations."""
        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        first, last = self._probe(PROBE_STEPS).timesteps[[0, -1]]
        return self._called(modules, first) | self._called(modules, last) or set(modules)

    def table(self, num_inference_steps: int) -> SolverTable:
        """The pipeline's own scheduler as a table, with all arguments the pipeline gives it.

        Raises:
            ValueError: a scheduler that is not linear, see `solvers.tabulate`, or one that draws noise at its steps.
        """
        probe = self._probe(num_inference_steps)
        arguments = {key: value for key, value in probe.set_timesteps.items() if value is not None}
        steps = arguments.pop("num_inference_steps", None)
        if told := [name for name, value in probe.step.items() if isinstance(value, Tensor)]:
            raise ValueError(
                f"{self.name} tells its scheduler {' and '.join(told)} at each step, which no table knows: take a "
                "pipeline that does not, such as one for text alone"
            )
        table = tabulate(self.pipe.scheduler, steps, set_timesteps=arguments, step=probe.step)
        if table.is_stochastic:
            raise ValueError(
                f"the {type(self.pipe.scheduler).__name__} of {self.name} draws fresh noise at its steps, which its "
                f"runs do not show: {_instead(table, probe.set_timesteps)}"
            )
        return table

    def condition_of(self, seeds: Sequence[int]) -> Tensor:
        """The condition that belongs to each seed: prompt seed % len(prompts), and the seed itself; (len(seeds), 2)."""
        return torch.tensor([(seed % len(self.entries), seed) for seed in seeds], dtype=torch.int64).reshape(-1, 2)

    def to(self, *args: Any, **kwargs: Any) -> "PipelineDenoiser":
        """Move the pipeline."""
        self.pipe.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """What the pipeline's scheduler would be given, (batch, *sample_shape).

        Args:
            x: (batch, *sample_shape), as the network sees it.
            timestep: scalar or (batch,).
            condition: int64 (batch, 2), prompts and seeds; see `condition_of`.
        """
        timestep, output = timestep.detach().expand(len(x)), torch.empty_like(x)
        for value in timestep.unique():
            for rows in (timestep == value).nonzero().flatten().split(self.batch_size):
                output[rows] = self._evaluate(x[rows], value, condition[rows.to(condition.device)]).to(x)
        return output

    def record(self, num_inference_steps: int, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Run the pipeline as it is, and keep everything its scheduler sees.

        Args:
            num_inference_steps: as the pipeline takes it.
            condition: int64 (batch, 2), prompts and seeds; at most `batch_size`.
        Returns:
            (states (batch, M+1, *shape), outputs (batch, M, *shape)), as the network saw and said them.
        Raises:
            ValueError: the pipeline did not make all steps of its scheduler.
        """
        recording = Recording(len(condition))
        scheduler = Recorder(copy.deepcopy(self.pipe.scheduler), recording=recording)
        self._run(scheduler, num_inference_steps, condition)
        if len(recording.states) != len(recording.outputs) + 1:
            raise ValueError(self._stopped(len(recording.outputs), len(scheduler.timesteps)))
        return torch.stack(recording.states, 1), torch.stack(recording.outputs, 1)

    def pictures(self, states: Tensor, condition: Tensor) -> Tensor:
        """What the pipeline makes of final states, one by one: two evaluations each, and its decoding.

        Args:
            states: (batch, *sample_shape).
            condition: int64 (batch, 2), prompts and seeds.
        Returns:
            Pictures (batch, channels, height, width) or videos (batch, channels, frames, height, width) in [-1, 1];
            sound as the pipeline gives it; the states where its `call` says `output_type: latent`.
        """
        if self.call.get("output_type") == "latent":
            return states
        timestep = self._probe(PROBE_STEPS).timesteps[0]
        made = []
        for state, one in zip(states.split(1), condition.split(1)):
            scheduler = Ender(copy.deepcopy(self.pipe.scheduler), state=state, timestep=timestep)
            made.append(_planes(self._run(scheduler, 2, one, output_type="np")[0]))
        return torch.cat(made)

    def _evaluate(self, x: Tensor, timestep: Tensor, condition: Tensor, **watch: Any) -> Tensor:
        outputs: list[Tensor] = []
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler = Injector(scheduler, state=x, timestep=timestep, outputs=outputs, **watch)
        self._run(scheduler, 2, condition)
        if not outputs or outputs[0] is None:
            raise ValueError(self._stopped(len(outputs), 2))
        return outputs[0]

    def _stopped(self, done: int, steps: int) -> str:
        """Why a run is no whole one, and what to do."""
        starts_later = "strength" in inspect.signature(type(self.pipe).__call__).parameters
        whole = "strength=1.0, which starts from noise" if starts_later else "arguments that let it make all its steps"
        return (
            f"{self.name} makes {done} of {steps} steps as it is called, and solvers are fitted to whole runs: record "
            f"it with {whole}"
        )

    def _called(self, modules: dict[str, nn.Module], timestep: Tensor) -> set[str]:
        """Names of the modules that the pipeline calls between two steps."""
        called: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in modules.items()
        ]
        try:
            state = self._probe(PROBE_STEPS).states[0]
            self._evaluate(state, timestep, self.condition_of([0]), begin=called.clear)
        finally:
            for hook in hooks:
                hook.remove()
        return called

    def _schedule_at(self, num_inference_steps: int) -> NoiseSchedule:
        """At the shift of a number of steps; a scheduler that does not shift by mu has one schedule."""
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return read_schedule(self.pipe.scheduler)
        return read_schedule(self.pipe.scheduler, mu=self._probe(num_inference_steps, 0).set_timesteps.get("mu"))

    def _probe(self, num_inference_steps: int, limit: int = 1) -> Recording:
        """A call that ends at its first step, or before: how the pipeline addresses its scheduler."""
        key = num_inference_steps, limit
        if key not in self._probes:
            recording = Recording(1, limit)
            scheduler = Recorder(copy.deepcopy(self.pipe.scheduler), recording=recording)
            self._run(scheduler, num_inference_steps, self.condition_of([0]))
            if not recording.set_timesteps or len(recording.outputs) < min(limit, 1):
                raise ValueError(
                    f"{self.name} does not step its scheduler itself: it runs other pipelines (take the one that makes "
                    "the picture, such as pipe.decoder_pipe), or a copy of it for each frame (no table knows that)"
                )
            self._probes[key] = recording
        return self._probes[key]

    def _run(self, scheduler: Any, steps: int, condition: Tensor, **changed: Any) -> Any:
        """One generator stays outside a list, which not every pipeline takes, and so do arguments of one sample."""
        indices, seeds = condition.unbind(1)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        entries = [self.entries[index] for index in indices.tolist()]
        arguments = dict(entries[0]) if len(entries) == 1 and self.are_arguments else batch_of(entries)
        if self.counts_samples:
            arguments["batch_size"] = len(condition)
        arguments |= {"num_inference_steps": steps, "generator": generators if len(seeds) > 1 else generators[0]}
        with scheduler_replaced(self.pipe, scheduler), torch.no_grad(), self._seeded(seeds.tolist()):
            return self.pipe(**arguments, **self.call | changed)

    @contextmanager
    def _seeded(self, seeds: list[int]) -> Iterator[None]:
        """For pipelines that draw some of their condition from torch's global generator, such as an encoded picture.

        Raises:
            ValueError: such a pipeline, called for several samples, whose condition would depend on their company.
        """
        device = torch.device(getattr(self.pipe, "device", "cpu"))
        on_gpu = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu):
            torch.manual_seed(seeds[0])
            before = _generators(on_gpu)
            try:
                yield
            finally:
                if len(seeds) > 1 and not all(map(torch.equal, before, _generators(on_gpu))):
                    raise ValueError(
                        f"{self.name} draws from torch's global generator, which knows no seed of each sample: record "
                        "it with batch_size=1"
                    )


def _generators(devices: list[torch.device]) -> list[Tensor]:
    """States of torch's global generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _instead(table: SolverTable, arguments: Mapping[str, Any]) -> str:
    """What to do about a scheduler that draws noise, in a pipeline that sets its timesteps with these arguments."""
    kind = FlowMatchEulerDiscreteScheduler if table.prediction_type == "flow_prediction" else DDIMScheduler
    if others := arguments.keys() - inspect.signature(kind.set_timesteps).parameters.keys():
        return (
            f"the pipeline takes no other, which it would tell {' and '.join(sorted(others))}; give its parts to "
            "another pipeline of the same network, with a deterministic scheduler"
        )
    return (
        "give the pipeline a deterministic scheduler first, such as "
        f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config)"
    )


def _planes(output: Any) -> Tensor:
    """Channels first and in [-1, 1], of a pipeline's pictures or videos as arrays; sound as it is."""
    values = torch.as_tensor(np.asarray(output))
    return 2 * values.float().movedim(-1, 1) - 1 if values.ndim > 3 else values.float()
