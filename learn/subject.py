"""What is learned for: a model as the denoiser that solvers are learned on, and the teacher it is learned from."""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.manifest import describe_teacher
from data.trajectories import run_teacher
from data.trajectory_writer import TrajectoryWriter
from denoisers import load_denoiser, network_calls, split_guidance, with_guidance
from denoisers.evaluations import calls_per_row
from denoisers.generate import device_of
from denoisers.load import DESCRIPTION, may_be_hub_name
from learn.network import CountedNetwork
from learn.options import SHARD, LearnOptions
from solvers import NoiseSchedule, SolverTable
from solvers.named import resolve_solver

_GUIDED = "from denoisers import with_guidance; "
PRECISIONS = {"float32": "float32", "bfloat16": "bf16"}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its teacher.

    Args:
        name: for people.
        load: a line of Python that makes `denoiser` of what the user named.
        denoiser: with guidance.
        network: the counted network inside it.
        teacher: the slow solver, with the calls of guidance where the denoiser's can be told apart.
        teacher_name: for people.
        pipe: the pipeline whose network it is; None where it is none's.
    """

    name: str
    load: str
    denoiser: Any
    network: CountedNetwork
    teacher: SolverTable
    teacher_name: str
    pipe: Any = None

    @property
    def is_differentiable(self) -> bool:
        """Whether derivatives go through the network."""
        return True

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.denoiser)

    @property
    def guidance_scale(self) -> float:
        """Of the images that the solvers make."""
        return float(getattr(self.denoiser, "guidance_scale", 1.0))

    @property
    def row_calls(self) -> int:
        """Network calls of a row that is guided as the model is."""
        return 2 if self.teacher.has_branches else calls_per_row(self.denoiser)

    @property
    def teacher_calls(self) -> int:
        """Network calls of an image of the teacher."""
        return network_calls(self.teacher, self.denoiser)

    def writer(self, folder: Path, seeds: Sequence[int]) -> TrajectoryWriter:
        """Of the trajectories of this teacher; ValueError where the folder holds others."""
        described = describe_teacher(self.denoiser, self.teacher, torch.float32)
        return TrajectoryWriter(folder, described, seeds, SHARD, self.teacher_name)

    def run(self, seeds: Sequence[int]) -> Any:
        """Trajectories of some seeds."""
        return run_teacher(self.denoiser, self.teacher, seeds, device=self.device)


def open_subject(model: Any, options: LearnOptions) -> Subject:
    """The model that a user names or hands over.

    Args:
        model: a path or hub name for `load_denoiser`, `module:object` of the user's own code, or a denoiser.
        options: what to learn.
    Raises:
        ValueError: a model that is not there or cannot be loaded, or options that do not fit it.
    """
    if hasattr(model, "scheduler") or _is_pipeline(str(model)):
        return _open_pipeline(model, options)
    if options.call or options.prompts is not None or options.save_pipeline is not None:
        raise ValueError(
            "call, prompts and save_pipeline are for diffusers pipelines, and this is none: leave them out"
        )
    denoiser, name, load = _loaded(model, options)
    scale = 1.0 if options.guidance_scale is None else options.guidance_scale
    network = CountedNetwork(denoiser, options.batch_size)
    guided = with_guidance(network, scale)
    teacher_name = options.teacher or default_teacher(denoiser.schedule)
    teacher = split_guidance(resolve_solver(teacher_name, denoiser.schedule), guided)
    if teacher.is_stochastic:
        raise ValueError(f"the teacher {teacher_name} adds noise at every step: choose a deterministic one")
    return Subject(name, load.format(scale=scale), guided, network, teacher, teacher_name)


def default_teacher(schedule: NoiseSchedule) -> str:
    """UniPC with 30 steps; a continuous VP schedule has iPNDM alone."""
    return "ipndm:60" if schedule.kind == "continuous_vp" else "unipc:30"


def target_device(name: str) -> str:
    """`auto` is the GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _open_pipeline(model: Any, options: LearnOptions) -> Subject:
    """diffusers takes seconds to import."""
    from learn import pipelines

    load = "# pipe is your pipeline"
    if not hasattr(model, "scheduler"):
        path, model = str(model), pipelines.load_pipeline(str(model), options)
        load = f'from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained("{path}")'
    return pipelines.open_pipeline(model, options, load)


def _is_pipeline(path: str) -> bool:
    """A pipeline's folder or hub name; a `denoiser.yaml` in it or beside it makes it a denoiser of its own."""
    if os.path.isfile(os.path.join(path, DESCRIPTION)):
        return False
    return os.path.isfile(os.path.join(path, "model_index.json")) or may_be_hub_name(path)


def _loaded(model: Any, options: LearnOptions) -> tuple[nn.Module, str, str]:
    """(denoiser, its name, how Python loads it)."""
    if isinstance(model, nn.Module):
        _check_denoiser(model, "the model")
        device = target_device(options.device)
        name = getattr(model, "name", None) or type(model).__name__
        return (
            model.to(device).eval().requires_grad_(False),
            name,
            f"{_GUIDED}denoiser = with_guidance(model, {{scale:g}})",
        )
    if options.dtype not in PRECISIONS:
        raise ValueError(f"dtype {options.dtype} is for pipelines: use one of {', '.join(PRECISIONS)} here")
    path, precision = str(model), PRECISIONS[options.dtype]
    if _is_object(path):
        denoiser = _own(path).to(target_device(options.device)).eval().requires_grad_(False)
        module, _, name = path.partition(":")
        made = f"{name}()" if isinstance(getattr(sys.modules[module], name), type) else name
        return denoiser, name, f"from {module} import {name}; {_GUIDED}denoiser = with_guidance({made}, {{scale:g}})"
    denoiser = load_denoiser(path, 1.0, precision, options.device, options.trust)
    return (
        denoiser,
        Path(path).name,
        f'from denoisers import load_denoiser; denoiser = load_denoiser("{path}", {{scale:g}})',
    )


def _is_object(model: str) -> bool:
    """module:object, neither a path nor a drive."""
    module, colon, name = model.partition(":")
    parts = [*module.split("."), *name.split(".")]
    return bool(colon) and not os.path.exists(model) and all(part.isidentifier() for part in parts)


def _own(text: str) -> nn.Module:
    """The denoiser that `module:object` names: the object itself, or what it makes when it is called."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{text} cannot be found ({error}): name a module that Python finds here, and its object"
        ) from error
    denoiser = found if isinstance(found, nn.Module) else found()
    _check_denoiser(denoiser, text)
    return denoiser


def _check_denoiser(denoiser: Any, name: str) -> None:
    has = isinstance(getattr(denoiser, "schedule", None), NoiseSchedule) and hasattr(denoiser, "sample_shape")
    if not isinstance(denoiser, nn.Module) or not has:
        raise ValueError(
            f"{name} is a {type(denoiser).__name__}, no denoiser: it must be a torch.nn.Module with a `schedule` (a "
            "NoiseSchedule) and a `sample_shape`, see docs/your_own_model.md"
        )
