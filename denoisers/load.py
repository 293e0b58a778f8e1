"""load_denoiser: one function for every kind of model on disk."""

import inspect
import os
import reprlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from denoisers.guidance import with_guidance
from denoisers.precision import with_precision
from solvers.errors import one_line
from solvers.schedule import NoiseSchedule

DESCRIPTION = "denoiser.yaml"
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("path", "device", "family", "variant", "dtype", "negative_prompt", "prompt_argument"), (str,)),
    **dict.fromkeys(("height", "width", "num_frames", "num_heads", "input_size", "batch_size"), (int,)),
    **dict.fromkeys(("encode", "call"), (dict,)),
    "decoder": (bool,),
    "tiling": (bool,),
    "prompts": (str, list),
}
_CPU = torch.device("cpu")


def load_denoiser(
    path: str | Path,
    guidance_scale: float = 1.0,
    precision: str = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """Load a model as a denoiser, in evaluation mode and without gradients.

    A file never chooses code: a `denoiser.yaml` names data, unless you say that you trust it.

    Args:
        path: one of
            a checkpoint folder of this project (config.json and model.safetensors);
            a `.pt` or `.safetensors` file of the public DiT or SiT releases, or of their training code;
            a diffusers pipeline folder (model_index.json), or a model folder beside its scheduler's;
            a name on the hub (`owner/name`) of such a pipeline, where there is network;
            the dotted name of a class or function of your own, `my_model.MyDenoiser`, which is called with the options;
            a folder with a `denoiser.yaml` (or the path of such a file), which has one of these as `path` (default: the
            folder itself, and nothing else where that is a model), and `device` and options where needed; relative
            paths in it start there, or here.
        guidance_scale: classifier-free guidance, uncond + scale (cond - uncond); 1 is none and costs one evaluation, 0
            is the unconditional output (a diffusers pipeline gives the conditional one for all scales up to 1).
        precision: `float32`, or `bf16` for autocast of the network; states stay in float32.
        device: where the network goes; the CPU when None; `auto`: the GPU of this process where there is one.
        trust_remote_code: a `denoiser.yaml` may name a class of your own, which is imported and called.
        options: those of the kind of model: for files of weights `denoisers.dit_load.load_public_checkpoint`, such as
            `family`; for diffusers models `denoisers.diffusers_load.load_diffusers`, such as `prompts`; for any
            diffusers pipeline without an adapter family "pipeline" and the arguments of `load_pipeline` there.
    Returns:
        A denoiser, see `denoisers.protocol.Denoiser`.
    Raises:
        ValueError: a missing path, a folder of unknown kind, a damaged file, an unknown option or precision, guidance
            for a model without null condition, or code named by a file that is not trusted.
    """
    described, file = describe(path), _description_file(Path(path))
    path, device = described.pop("path"), device or described.pop("device", None)
    options = {key: value for key, value in described.items() if key != "device"} | options
    device = resolve_device(device)
    if options.get("family") == "pipeline":
        return _load_pipeline(path, guidance_scale, precision, device, options)
    if file is not None and not trust_remote_code:
        _refuse_code(file, str(path))
    denoiser = _load(path, options, device).to(device)
    return with_guidance(with_precision(denoiser.eval().requires_grad_(False), precision), guidance_scale)


def describe(path: str | Path) -> dict[str, Any]:
    """What a path for `load_denoiser` stands for: `path` and, of a `denoiser.yaml`, the options in it.

    Raises:
        ValueError: a .yaml file that is missing or describes no model.
    """
    file = _description_file(Path(path))
    if file is None:
        return {"path": path}
    described = _read_description(file)
    if os.path.isdir(path):
        _check_beside(file, described.get("path"))
    described.setdefault("path", str(file.parent))
    beside = {key: file.parent / described[key] for key in ("path", "prompts") if isinstance(described.get(key), str)}
    return described | {key: str(path) for key, path in beside.items() if os.path.exists(path)}


def _description_file(path: Path) -> Path | None:
    if path.suffix in (".yaml", ".yml"):
        return path
    return path / DESCRIPTION if os.path.isfile(path / DESCRIPTION) else None


def _read_description(file: Path) -> dict[str, Any]:
    """The lines of a description, each of its type."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give a checkpoint folder, a .pt file, a diffusers folder or a .yaml")
    try:
        described = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid YAML: {one_line(str(error), 100)}") from error
    if not isinstance(described, dict):
        raise ValueError(f"{file} describes no model: it needs lines such as `path: ...` and `prompts: ...`")
    for key, value in described.items():
        allowed = _TYPES.get(key, (str, int, float, bool, list, dict)) if isinstance(key, str) else ()
        if not allowed or type(value) not in allowed:
            shown = value if isinstance(value, str) else reprlib.repr(value)  # aliases make texts without an end
            raise ValueError(f"{file} says {one_line(f'{key}: {shown}', 60)}: write {_wanted(key, allowed)}")
    unused = {"guidance_scale", "precision", "trust_remote_code"} & described.keys()
    if unused:
        raise ValueError(f"{file} sets {', '.join(sorted(unused))}, which belong to the run: leave them out there")
    return described


def _wanted(key: Any, allowed: Sequence[type]) -> str:
    return f"{key}: {' or '.join(kind.__name__ for kind in allowed)}" if allowed else "names of options, which are text"


def _check_beside(file: Path, path: str | None) -> None:
    """A model that is there itself is what a folder stands for, or a part of: its description adds options alone."""
    here = file.parent.resolve()
    own = next((name for name in ("model_index.json", "config.json") if (here / name).is_file()), None)
    if own and path is not None and (here / path).resolve() not in (here, *here.parents):
        raise ValueError(f"{file} names {path}, but {own} beside it is a model itself: remove that line or that file")


def _refuse_code(file: Path, path: str) -> None:
    if not (os.path.exists(path) or may_be_hub_name(path)):
        raise ValueError(
            f"{file} names {one_line(path, 60)}, which is no model on disk: if it is code of your own, give that name "
            "itself in place of the file, or say that you trust the file: trust_remote_code=True in Python, --trust "
            "for sample.py, --model.trust_remote_code true for train.py"
        )


def _load_pipeline(path, guidance_scale, precision, device, options) -> nn.Module:
    """A pipeline guides itself: it is told the scale."""
    if precision != "float32":
        raise ValueError(f"precision {precision!r} is not for family 'pipeline': choose the weights' dtype instead")
    from denoisers.diffusers_load import load_pipeline

    options = {key: value for key, value in options.items() if key != "family"}
    own = options.pop("call", {})
    call = {"guidance_scale": guidance_scale} | own
    denoiser = load_pipeline(path, **_checked(load_pipeline, options, path), call=call)
    if "guidance_scale" not in own and denoiser.guidance_scale != guidance_scale:
        raise ValueError(
            f"{path} cannot be guided by {guidance_scale}: {denoiser.name} called with it has what is guidance_scale "
            f"{denoiser.guidance_scale} here (0 is the unconditional output, 1 the conditional one): give that"
        )
    return denoiser.to(device)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device by its name; the CPU for None, and for `auto` the GPU of this process where there is one.

    Raises:
        ValueError: a name that torch does not know.
    """
    if device == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else _CPU
    try:
        return torch.device(device or _CPU)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is none that torch knows: use cpu, cuda, cuda:1, mps or auto") from error


def _load(path: str | Path, options: dict[str, Any], device: torch.device) -> nn.Module:
    """Imports wait until a kind is known: timm and diffusers take seconds."""
    folder = Path(path)
    if os.path.isfile(folder):
        from denoisers.dit_load import load_public_checkpoint

        return load_public_checkpoint(folder, **_checked(load_public_checkpoint, options, path))
    if _is_diffusers(folder) or may_be_hub_name(str(path)):
        from denoisers.diffusers_load import load_diffusers

        return load_diffusers(path, **_checked(load_diffusers, options, path), device=device)
    if not os.path.exists(folder):
        return _call_by_name(str(path), options)
    if (folder / "config.json").is_file():
        from denoisers.dit_load import load_checkpoint

        return load_checkpoint(folder, **_checked(load_checkpoint, options, path))
    raise ValueError(
        f"{path} is not a model: expected config.json and model.safetensors (this project), model_index.json "
        "(a diffusers pipeline), or a diffusers model's config.json"
    )


def _call_by_name(name: str, options: dict[str, Any]) -> nn.Module:
    """A denoiser of the user's own code, as `class_path` names one in configs."""
    module, _, attribute = name.rpartition(".")
    maker = None
    if all(part.isidentifier() for part in name.split(".")) and module and find_spec(module.split(".")[0]):
        maker = getattr(import_module(module), attribute, None)
    if not callable(maker):
        raise ValueError(
            f"{name} does not exist: give a checkpoint folder, a .pt file, a diffusers folder, or the dotted name of a "
            "class of your own"
        )
    denoiser = maker(**options)
    if not isinstance(denoiser, nn.Module) or not isinstance(getattr(denoiser, "schedule", None), NoiseSchedule):
        raise ValueError(f"{name} is no denoiser: it must be a torch.nn.Module with a `schedule` (a NoiseSchedule)")
    return denoiser


def _checked(loader: Callable, options: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """`options`, once each is known to be an argument of the loader."""
    allowed = list(inspect.signature(loader).parameters)[1:]
    unknown = sorted(options.keys() - set(allowed))
    if unknown:
        raise ValueError(
            f"{path} cannot be loaded with {', '.join(unknown)}: for this kind of model the options are "
            f"{', '.join(allowed) or 'none'}"
        )
    return options


def _is_diffusers(folder: Path) -> bool:
    if os.path.isfile(folder / "model_index.json"):
        return True
    config = folder / "config.json"
    return os.path.isfile(config) and '"_class_name"' in config.read_text()


def may_be_hub_name(path: str) -> bool:
    """owner/name, neither here nor under a folder that is here (which would rather be a mistyped path)."""
    owner, _, name = path.partition("/")
    return bool(owner and name) and "/" not in name and owner[0] not in ".~" and not Path(owner).exists()
