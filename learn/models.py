"""From what a user names or hands over to what is learned for."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from denoisers import load_denoiser, split_guidance, with_guidance
from denoisers.load import DESCRIPTION, may_be_hub_name
from learn.network import CountedNetwork, present_device
from learn.options import LearnOptions
from learn.subject import Subject, default_teacher
from solvers import NoiseSchedule
from solvers.named import resolve_solver

_GUIDED = "from denoisers import with_guidance; "
PRECISIONS = {"float32": "float32", "bfloat16": "bf16"}


def open_subject(model: Any, options: LearnOptions) -> Subject:
    """The model that a user names or hands over.

    Args:
        model: a path or hub name for `load_denoiser`, `module:object` of the user's own code, or a denoiser.
        options: what to learn.
    Raises:
        ValueError: a model that is not there or cannot be loaded, or options that do not fit it.
    """
    for_pipeline = options.call or options.prompts is not None or options.save_pipeline is not None
    if hasattr(model, "scheduler") or _is_pipeline(str(model), bool(for_pipeline)):
        return _open_pipeline(model, options)
    if for_pipeline:
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


def _open_pipeline(model: Any, options: LearnOptions) -> Subject:
    """diffusers takes seconds to import."""
    from learn import pipelines

    load = "# pipe is your pipeline"
    is_loaded = not hasattr(model, "scheduler")
    if is_loaded:
        path, model = str(model), pipelines.load_pipeline(str(model), options)
        load = f'from diffusers import DiffusionPipeline; pipe = DiffusionPipeline.from_pretrained("{path}")'
    if is_loaded or options.device != "auto":
        model.to(present_device(options.device))
    return pipelines.open_pipeline(model, options, load)


def _is_pipeline(path: str, is_asked: bool) -> bool:
    """A pipeline's folder or hub name; a `denoiser.yaml` makes it a denoiser, unless a pipeline's options are given."""
    if os.path.isfile(os.path.join(path, DESCRIPTION)) and not is_asked:
        return False
    return os.path.isfile(os.path.join(path, "model_index.json")) or may_be_hub_name(path)


def _loaded(model: Any, options: LearnOptions) -> tuple[nn.Module, str, str]:
    """(denoiser, its name, how Python loads it)."""
    if isinstance(model, nn.Module):
        _check_denoiser(model, "the model")
        if options.device != "auto":
            model.to(present_device(options.device))
        name = getattr(model, "name", None) or type(model).__name__
        return (
            model.eval().requires_grad_(False),
            name,
            f"{_GUIDED}denoiser = with_guidance(model, {{scale:g}})",
        )
    if options.dtype not in PRECISIONS:
        raise ValueError(f"dtype {options.dtype} is for pipelines: use one of {', '.join(PRECISIONS)} here")
    path, precision = str(model), PRECISIONS[options.dtype]
    if _is_object(path):
        denoiser = _own(path).to(present_device(options.device)).eval().requires_grad_(False)
        module, _, name = path.partition(":")
        made = f"{name}()" if isinstance(getattr(sys.modules[module], name), type) else name
        return denoiser, name, f"from {module} import {name}; {_GUIDED}denoiser = with_guidance({made}, {{scale:g}})"
    denoiser = load_denoiser(path, 1.0, precision, present_device(options.device), options.trust)
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
