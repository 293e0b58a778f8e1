"""Any diffusers pipeline as a denoiser, without an adapter for its network."""

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.diffusers_base import NETWORKS, read_schedule
from denoisers.proxies import Injector, Recorder, Recording, scheduler_replaced
from solvers.identity import weight_hash
from solvers.schedule import NoiseSchedule
from solvers.standalone.table_scheduler import pipeline_guidance
from solvers.table import SolverTable
from solvers.tabulate import tabulate

PROBE_STEPS = 10  # some schedulers refuse very few


class PipelineDenoiser(nn.Module):
    """What a pipeline hands its scheduler, as a function of state and timestep.

    Prompts, guidance, sizes and everything else are the pipeline's own business, so pipelines this project has never
    heard of work too, as long as they call `scheduler.step(model_output, timestep, sample)` once a step. A call costs
    two evaluations of the network (the first is of the pipeline's own noise, see `Injector`) and no decoding; it has no
    gradients. Guidance that changes from step to step is evaluated as in the second of two steps.

    Args:
        pipe: the pipeline; its scheduler is only read, and replaced while it runs.
        prompts: what `condition` indexes.
        prompt_argument: the argument of the pipeline's call that takes a list of prompts (DiT: class_labels).
        batch_size: prompts in one call.
        call: further arguments of every call, such as guidance_scale, height, num_frames; the denoiser's own
            `guidance_scale` is what that means here, see `pipeline_guidance`.
    Raises:
        ValueError: no prompts, or arguments the pipeline does not take.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        *,
        prompt_argument: str = "prompt",
        batch_size: int = 1,
        **call: Any,
    ) -> None:
        super().__init__()
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts is {prompts!r}: give a list of at least one prompt")
        known = inspect.signature(type(pipe).__call__).parameters
        unknown = sorted({prompt_argument, "num_inference_steps", *call} - known.keys())
        if unknown:
            allowed = ", ".join(known)
            raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: its arguments are {allowed}")
        self.pipe, self.prompts, self.prompt_argument = pipe, list(prompts), prompt_argument
        self.batch_size, self.call = batch_size, call
        defaults = {name: parameter.default for name, parameter in known.items()}
        self.guidance_scale = pipeline_guidance(pipe, defaults | call)
        self.name = type(pipe).__name__
        self.conditions = torch.arange(len(self.prompts))
        self.settings = {"prompts": self.prompts, "prompt_argument": prompt_argument, **call}

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the pipeline's scheduler, at the shift the pipeline gives it."""
        return read_schedule(self.pipe.scheduler, mu=self._probe(PROBE_STEPS).set_timesteps.get("mu"))

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one state, as the scheduler sees it; found by one evaluation."""
        return tuple(self._probe(PROBE_STEPS).states[0].shape[1:])

    @cached_property
    def weight_hash(self) -> str:
        """SHA-256 of the network's weights (of an unknown pipeline: its largest module); computed when asked for."""
        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        largest = max(modules, key=lambda name: sum(value.numel() for value in modules[name].parameters()))
        return weight_hash(modules[next((name for name in NETWORKS if name in modules), largest)])

    def table(self, num_inference_steps: int) -> SolverTable:
        """The pipeline's own scheduler as a table, with all arguments the pipeline gives it.

        Raises:
            ValueError: a scheduler that is not linear, see `solvers.tabulate`.
        """
        probe = self._probe(num_inference_steps)
        arguments = {key: value for key, value in probe.set_timesteps.items() if value is not None}
        steps = arguments.pop("num_inference_steps", None)
        return tabulate(self.pipe.scheduler, steps, set_timesteps=arguments, step=probe.step)

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
            condition: int64 (batch,), indices of prompts.
        """
        timestep, output = timestep.detach().expand(len(x)), torch.empty_like(x)
        for value in timestep.unique():
            for rows in (timestep == value).nonzero().flatten().split(self.batch_size):
                output[rows] = self._evaluate(x[rows], value, condition[rows.to(condition.device)]).to(x)
        return output

    def record(self, num_inference_steps: int, seeds: Sequence[int], condition: Tensor) -> tuple[Tensor, Tensor]:
        """Run the pipeline as it is, and keep everything its scheduler sees.

        Args:
            num_inference_steps: as the pipeline takes it.
            seeds: one per sample, of the pipeline's generators.
            condition: int64 (batch,), indices of prompts; at most `batch_size`.
        Returns:
            (states (batch, M+1, *shape), outputs (batch, M, *shape)), as the network saw and said them.
        Raises:
            ValueError: the pipeline did not make all steps of its scheduler.
        """
        recording = Recording(len(condition))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler = Recorder(copy.deepcopy(self.pipe.scheduler), recording=recording)
        self._run(scheduler, num_inference_steps, condition, generators)
        if len(recording.states) != len(recording.outputs) + 1:
            raise ValueError(
                f"{self.name} stopped after {len(recording.outputs)} of {len(scheduler.timesteps)} steps: record whole "
                "runs, from pure noise to the end"
            )
        return torch.stack(recording.states, 1), torch.stack(recording.outputs, 1)

    def _evaluate(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler = Injector(scheduler, state=x, timestep=timestep, outputs=outputs)
        self._run(scheduler, 2, condition, [torch.Generator().manual_seed(0) for _ in condition])
        return outputs[0]

    def _probe(self, num_inference_steps: int) -> Recording:
        """A call that ends at its first step: how the pipeline addresses its scheduler."""
        recording = Recording(1, limit=1)
        scheduler = Recorder(copy.deepcopy(self.pipe.scheduler), recording=recording)
        self._run(scheduler, num_inference_steps, self.conditions[:1], [torch.Generator().manual_seed(0)])
        return recording

    def _run(self, scheduler: Any, steps: int, condition: Tensor, generators: list[torch.Generator]) -> None:
        """One generator stays outside a list, which not every pipeline takes."""
        prompts = [self.prompts[index] for index in condition.tolist()]
        generator = generators if len(generators) > 1 else generators[0]
        with scheduler_replaced(self.pipe, scheduler), torch.no_grad():
            arguments = {self.prompt_argument: prompts, "num_inference_steps": steps, "generator": generator}
            self.pipe(**arguments, **self.call)
