"""A student as a folder that diffusers loads: its network, a scheduler for it, the rest of the teacher's pipeline."""

import inspect
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import yaml
from diffusers import DiffusionPipeline, LCMScheduler

from denoisers.diffusers_base import Source
from solvers.schedule import NoiseSchedule

WEIGHTS = "diffusion_pytorch_model.safetensors"
ALONE = ("height", "width", "num_frames", "dtype")  # options of a network without text encoder and autoencoder


def save_pipeline(
    network: Any,
    component: str,
    folder: str | Path,
    scheduler_config: Mapping[str, Any],
    teacher_points: int = 50,
    source: Source | None = None,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Write a student's network and scheduler and, where its teacher's folder is known, the rest of that pipeline.

    `load_denoiser` takes the folder, or the network's in it, with the teacher's prompts and size; the teacher's class
    of pipeline (of Stable Diffusion also `LatentConsistencyModelPipeline`) takes it where it is a whole pipeline.

    Args:
        network: the student's, in the dtypes to store.
        component: what the pipeline calls it, unet or transformer.
        folder: created if missing; files of the same names are replaced, each at once.
        scheduler_config: of the teacher.
        teacher_points: number of the teacher's points that the student was distilled on.
        source: where the teacher was loaded from.
        beside: texts of further files beside the weights, by their names.
    Returns:
        The network's weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = student_scheduler(scheduler_config, teacher_points)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        _save_parts(Path(temporary), network, component, scheduler, source)
        for name, text in (beside or {}).items():
            Path(temporary, component, name).write_text(text, encoding="utf-8")
        _move(Path(temporary), folder)
    return folder / component / WEIGHTS


def student_scheduler(config: Mapping[str, Any], teacher_points: int) -> Any:
    """LCMScheduler; of a flow model, for which diffusers has none with a student's steps, the teacher's own."""
    if NoiseSchedule.from_scheduler(config).kind == "flow":
        return getattr(diffusers, config["_class_name"]).from_config(config)
    return lcm_scheduler(config, teacher_points)


def lcm_scheduler(config: Mapping[str, Any], original_inference_steps: int = 50) -> LCMScheduler:
    """diffusers' multistep consistency sampler on the schedule of another scheduler's config, without clipping.

    Args:
        config: of the teacher's scheduler.
        original_inference_steps: number of the teacher's points that the student was distilled on.
    """
    known = inspect.signature(LCMScheduler).parameters.keys() - {"clip_sample", "thresholding", "timestep_scaling"}
    kept: dict[str, Any] = {name: value for name, value in config.items() if name in known}
    kept["original_inference_steps"] = original_inference_steps
    return LCMScheduler(**kept)


def _save_parts(folder: Path, network: Any, component: str, scheduler: Any, source: Source | None) -> None:
    pipe = None if source is None else _pipeline(network, component, scheduler, source)
    if pipe is None:
        network.save_pretrained(folder / component, max_shard_size="1TB")
        scheduler.save_pretrained(folder / "scheduler")
    else:
        pipe.save_pretrained(folder, max_shard_size="1TB")
    options = {} if source is None else source.options
    if pipe is None:
        options = {name: value for name, value in options.items() if name in ALONE}
        _describe(folder / component, options)
        _describe(folder, {"path": component, **options})
    else:
        _describe(folder / component, {"path": "..", **options})
        _describe(folder, options)


def _describe(folder: Path, options: dict[str, Any]) -> None:
    text = yaml.safe_dump(options | {"device": "auto"}, sort_keys=False)
    Path(folder, "denoiser.yaml").write_text(text, encoding="utf-8")


def _pipeline(network: Any, component: str, scheduler: Any, source: Source) -> DiffusionPipeline | None:
    """The teacher's pipeline around the student; None where parts are missing: then this project alone can load it."""
    try:
        weights = {"torch_dtype": network.dtype, "variant": source.variant}
        pipe = DiffusionPipeline.from_pretrained(source.root, **{component: network}, **weights)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"the student is saved without the other parts of {source.root}: {reason}", stacklevel=2)
        return None
    pipe.register_modules(scheduler=scheduler, **{component: network})  # some pipelines load their own over one given
    return pipe


def _move(source: Path, target: Path) -> None:
    """Move files, each at once, into the same places of another folder."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
