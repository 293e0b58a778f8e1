"""Pipelines as subjects: by the adapter of their network where there is one, else recorded while they run."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from data.pipeline_recorder import describe_recording, record_seeds
from data.shards import Trajectories
from data.trajectory_writer import TrajectoryWriter
from denoisers import split_guidance, with_guidance
from denoisers.diffusers_load import locate
from denoisers.diffusers_models import FAMILIES, from_pipeline
from denoisers.pipeline import PipelineDenoiser
from denoisers.prompts import encode_prompts, takes_prompts
from learn.network import CountedNetwork
from learn.options import SHARD, LearnOptions
from learn.subject import Subject, default_teacher
from solvers.accelerate import STAND_INS
from solvers.named import resolve_solver
from solvers.standalone.table_scheduler import check_keeps_scheduler, pipeline_guidance

WITHOUT_PROMPTS = ("DiTPipeline", "DDPMPipeline", "DDIMPipeline")
SIZES = (
    "height",
    "width",
    "num_frames",
    "negative_prompt",
    "output_type",
)  # arguments of a call that adapters know, or need not
DECODED = 4  # pictures of a recorded pipeline in the report
SAVED = (
    "a saved pipeline runs solvers by its scheduler alone, which sees guided outputs: every row is guided, two calls; "
    "without --save_pipeline solvers leave calls out, and accelerate_pipeline runs them"
)
OWN = re.compile(r"own:([1-9]\d*)")


@dataclass(frozen=True, eq=False)
class RecordedSubject(Subject):
    """A pipeline whose own runs are the teacher's trajectories; a call is a step of it, guidance included.

    Args:
        recorder: the pipeline as a denoiser.
        steps: of the teacher.
    """

    recorder: PipelineDenoiser = None  # type: ignore[assignment]
    steps: int = 0

    @property
    def is_differentiable(self) -> bool:
        """Pipelines run without gradients."""
        return False

    def writer(self, folder: Path, seeds: Sequence[int]) -> TrajectoryWriter:
        """Of recordings."""
        described = describe_recording(self.recorder, self.steps, torch.float32)
        return TrajectoryWriter(folder, described, seeds, SHARD, self.teacher_name)

    def run(self, seeds: Sequence[int]) -> Trajectories:
        """Runs of the pipeline from some seeds."""
        self.network.calls += self.steps * len(seeds)
        return record_seeds(self.recorder, self.steps, seeds)

    def pictures(self, shown: Trajectories, states: torch.Tensor) -> torch.Tensor:
        """Few of them: the pipeline itself decodes, one by one."""
        return self.recorder.pictures(states[:DECODED].to(self.device), shown.condition).float().cpu()


def load_pipeline(path: str, options: LearnOptions) -> Any:
    """The pipeline of a folder or a hub name; ValueError where there is none."""
    locate(path, any_network=True)
    if not sys.stderr.isatty():
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()  # one line in a terminal, hundreds in a log
    return DiffusionPipeline.from_pretrained(path, torch_dtype=getattr(torch, options.dtype))


def open_pipeline(pipe: Any, options: LearnOptions, load: str) -> Subject:
    """A pipeline in memory as what is learned for.

    Args:
        pipe: a diffusers pipeline.
        options: what to learn.
        load: a line of Python that makes the pipeline.
    Raises:
        ValueError: prompts that are missing or not taken, arguments the pipeline does not take, or one that cannot be
            recorded.
    """
    _check_arguments(pipe, options)
    if options.save_pipeline is not None:
        check_keeps_scheduler(type(pipe))
    pipe.set_progress_bar_config(disable=True)
    return (_adapted if has_adapter(pipe, options) else _recorded)(pipe, options, load)


def _adapted(pipe: Any, options: LearnOptions, load: str) -> Subject:
    """Calls of the network itself, both branches of guidance apart where the pipeline can run such solvers."""
    sizes = {name: options.call[name] for name in ("height", "width", "num_frames") if name in options.call}
    denoiser = from_pipeline(pipe, **sizes)
    if takes_prompts(pipe):
        encode = {name: value for name, value in options.call.items() if name not in SIZES}
        negative = options.call.get("negative_prompt")
        denoiser.conditions = encode_prompts(pipe, list(options.prompts or ()), negative, denoiser, **encode)
    if isinstance(getattr(pipe, "vae", None), nn.Module):
        denoiser.set_decoder(pipe.vae)
    network = CountedNetwork(denoiser, options.batch_size)
    guided = with_guidance(network, _guidance(pipe, options))
    name = options.teacher or default_teacher(denoiser.schedule)
    teacher = resolve_solver(name, denoiser.schedule)
    split = split_guidance(teacher, guided) if type(pipe).__name__ in STAND_INS else teacher
    if options.save_pipeline is None:
        teacher = split
    elif split.has_branches:
        print(SAVED)
    return Subject(type(pipe).__name__, load, guided, network, teacher, name, pipe)


def _recorded(pipe: Any, options: LearnOptions, load: str) -> Subject:
    """What the pipeline's scheduler sees."""
    teacher = options.teacher or "own:50"
    match = OWN.fullmatch(teacher)
    if match is None:
        raise ValueError(
            f"{type(pipe).__name__} is recorded with its own scheduler: --teacher {teacher} cannot be, give own:STEPS"
        )
    guidance = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    argument = _prompt_argument(pipe) or "prompt"
    recorder = PipelineDenoiser(
        pipe, options.prompts, prompt_argument=argument, batch_size=1, **options.call, **guidance
    )
    network = CountedNetwork(recorder, 1)
    table = recorder.table(int(match[1]))
    return RecordedSubject(type(pipe).__name__, load, network, network, table, teacher, pipe, recorder, int(match[1]))


def has_adapter(pipe: Any, options: LearnOptions) -> bool:
    """Whether the network is of a known family, and the call asks for nothing but what its adapter knows."""
    networks = (getattr(pipe, name, None) for name in ("transformer", "unet"))
    known = any(type(network).__name__ in FAMILIES for network in networks)
    encode = inspect.signature(pipe.encode_prompt).parameters if takes_prompts(pipe) else {}
    is_plain = all(name in SIZES or name in encode for name in options.call)
    is_plain &= not any(isinstance(prompt, Mapping) for prompt in options.prompts or ())
    return known and is_plain and (takes_prompts(pipe) or type(pipe).__name__ in WITHOUT_PROMPTS)


def _guidance(pipe: Any, options: LearnOptions) -> float:
    """The scale, as it is meant here, that the pipeline is called with."""
    known = {name: parameter.default for name, parameter in _parameters(pipe).items()}
    given = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    return pipeline_guidance(pipe, known | dict(options.call) | given)


def _prompt_argument(pipe: Any) -> str | None:
    """The argument of the pipeline's call that takes prompts; None where it takes none."""
    return next((name for name in ("prompt", "class_labels") if name in _parameters(pipe)), None)


def _check_arguments(pipe: Any, options: LearnOptions) -> None:
    name, known = type(pipe).__name__, _parameters(pipe)
    unknown = sorted(options.call.keys() - known.keys())
    if unknown:
        raise ValueError(f"{name} takes no {', '.join(unknown)}: its arguments are {', '.join(list(known)[1:])}")
    if options.guidance_scale is not None and "guidance_scale" not in known:
        raise ValueError(f"{name} takes no guidance_scale: leave it out")
    argument = _prompt_argument(pipe)
    if argument == "prompt" and options.prompts is None:
        raise ValueError(f"{name} takes prompts: give a text file of them with --prompts, one a line")
    if argument is None and not all(isinstance(prompt, Mapping) for prompt in options.prompts or ()):
        raise ValueError(f"{name} takes no prompts: leave them out")


def _parameters(pipe: Any) -> Any:
    return inspect.signature(type(pipe).__call__).parameters
