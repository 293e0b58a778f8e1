"""Schedulers that stand in for a pipeline's own while it runs: one records, one makes the pipeline a function."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from solvers.calls import drop_learned_variance
from solvers.proxy import Proxy
from solvers.standalone.table_scheduler import calling_pipeline, further_guidance


class Finished(Exception):
    """Ends a pipeline's call once everything wanted is known, before it decodes."""


@dataclass
class Recording:
    """What a scheduler was given during one call of a pipeline.

    Args:
        batch: number of prompts.
        limit: steps after which the call ends, 0 for none; None for all.
        set_timesteps: arguments of `set_timesteps`, without device.
        timesteps: those that the scheduler then has.
        guidance: what the call says about guidance beside its scale, see `further_guidance`.
        step: further arguments of `step`, without generator.
        states: the states the network saw, (batch, *shape) each; after a whole run also the final one.
        outputs: the outputs `step` was given, guidance included, (batch, *shape) each.
    """

    batch: int
    limit: int | None = None
    set_timesteps: dict[str, Any] = field(default_factory=dict)
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    guidance: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class Recorder(Proxy):
    """Writes what passes through into a Recording; the pipeline's run is its own.

    Args:
        inner: a scheduler of its own, which is used up.
        recording: filled by one call of the pipeline.
    """

    recording: Recording

    @property
    def set_timesteps(self) -> Callable:
        """As the inner one, with the same signature, which pipelines inspect."""

        @functools.wraps(self.inner.set_timesteps)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            arguments = _bind(self.inner.set_timesteps, args, kwargs)
            self.recording.set_timesteps = {key: value for key, value in arguments.items() if key != "device"}
            self.recording.states, self.recording.outputs = [], []
            self.recording.guidance = further_guidance(*calling_pipeline(self))
            self.inner.set_timesteps(*args, **kwargs)
            self.recording.timesteps = torch.as_tensor(self.inner.timesteps)
            if self.recording.limit == 0:
                raise Finished

        return wrapped

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """As the inner one; the sample itself where that has none, for pipelines that compare the scheduler's type."""
        has_own = hasattr(self.inner, "scale_model_input")
        return self.inner.scale_model_input(sample, timestep) if has_own else sample

    @property
    def step(self) -> Callable:
        """As the inner one, with the same signature; what is kept are copies, which pipelines do not write over."""

        @functools.wraps(self.inner.step)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            arguments, run = _bind(self.inner.step, args, kwargs), self.recording
            output, timestep, sample = (arguments.pop(name) for name in ("model_output", "timestep", "sample"))
            run.step = {key: value for key, value in arguments.items() if key not in ("generator", "return_dict")}
            run.states.append(one_of_doubled(sample, run.batch) * _scale(self.inner, timestep, sample))
            run.outputs.append(one_of_doubled(drop_learned_variance(output, sample), run.batch).clone())
            if len(run.outputs) == run.limit:
                raise Finished
            result = self.inner.step(*args, **kwargs)
            if len(run.outputs) == len(self.inner.timesteps):
                run.states.append(one_of_doubled(result[0], run.batch).clone())
                raise Finished
            return result

        return wrapped


class Injector(Proxy):
    """Makes a pipeline evaluate its network, guidance included, at a given state and timestep.

    The pipeline is told of two steps. Its first evaluation is of its own noise; the first step answers with the given
    state, which the second evaluation then sees, and the second step keeps the output.

    Args:
        inner: a scheduler of its own, which is used up.
        state: (batch, *shape), as the network sees it.
        timestep: scalar.
        outputs: a list that receives the output, (batch, *shape).
        begin: called when the first step is made.
    """

    state: Tensor
    timestep: Tensor
    outputs: list[Tensor | None]
    begin: Callable[[], Any] = staticmethod(lambda: None)
    order = 1
    init_noise_sigma = 1.0
    num_inference_steps = 2

    @property
    def timesteps(self) -> Tensor:
        """The timestep twice, as integers where it is one and the inner scheduler's are."""
        own = self.inner.timesteps
        dtype = torch.int64 if own is None else torch.as_tensor(own).dtype  # PNDM has none before set_timesteps
        if not dtype.is_floating_point and float(self.timestep) % 1:
            dtype = torch.float32
        return self.timestep.to(dtype).repeat(2)

    @property
    def set_timesteps(self) -> Callable:
        """Takes what the inner one takes; the timesteps stay the given ones."""
        return functools.wraps(self.inner.set_timesteps)(lambda *args, **kwargs: None)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state is what the network sees."""
        return sample

    @property
    def step(self) -> Callable:
        """Answers the first call with the state, ends the pipeline at the second."""

        @functools.wraps(self.inner.step)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            arguments, batch = _bind(self.inner.step, args, kwargs), len(self.state)
            sample = arguments["sample"]
            if self.outputs:
                output = one_of_doubled(drop_learned_variance(arguments["model_output"], sample), batch)
                self.outputs[0] = output
                raise Finished
            self.outputs.append(None)
            self.begin()
            return self._answer(sample, arguments)

        return wrapped

    def _answer(self, sample: Tensor, arguments: dict[str, Any]) -> Any:
        """The state, in the place of a sample."""
        state = self.state.to(sample).repeat(len(sample) // len(self.state), *[1] * (sample.ndim - 1))
        return SchedulerOutput(prev_sample=state) if arguments.get("return_dict", True) else (state, state)


class Ender(Injector):
    """Makes a pipeline end with a given state, which it then decodes; it is told of two steps.

    Args:
        inner, state, timestep: as of an Injector.
    """

    @property
    def step(self) -> Callable:
        """Answers every call with the state."""

        @functools.wraps(self.inner.step)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            arguments = _bind(self.inner.step, args, kwargs)
            return self._answer(arguments["sample"], arguments)

        return wrapped


@contextmanager
def scheduler_replaced(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Give a pipeline another scheduler for a while; a Finished signal ends the block."""
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    except Finished:
        pipe.maybe_free_model_hooks()
    finally:
        pipe.scheduler = own


def one_of_doubled(values: Tensor, batch: int) -> Tensor:
    """`values`, or their first half where a pipeline steps guidance's doubled batch as a whole.

    Raises:
        ValueError: another number of samples, or halves that differ, which one solver state cannot hold.
    """
    if len(values) == batch:
        return values
    if len(values) == 2 * batch and torch.allclose(values[:batch], values[batch:], rtol=1e-4, atol=1e-5):
        return values[:batch]
    raise ValueError(
        f"the pipeline steps {len(values)} samples for {batch} prompts: ask for one image per prompt, and for a "
        "pipeline whose scheduler sees the guided output"
    )


def _bind(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)


def _scale(scheduler: Any, timestep: Any, sample: Tensor) -> Tensor | float:
    """What `scale_model_input` multiplies a sample by, where the scheduler has it."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return scheduler.scale_model_input(torch.ones((), device=sample.device, dtype=torch.float64), timestep).to(sample)
