"""load_denoiser: one function for every kind of model on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from denoisers.guidance import with_guidance, with_precision
from solvers.schedule import NoiseSchedule


def load_denoiser(
    path: str | Path,
    guidance_scale: float = 1.0,
    precision: str = "float32",
    device: str | torch.device | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model as a denoiser, in evaluation mode and without gradients.

    Args:
        path: one of
            a checkpoint folder of this project (config.json and model.safetensors);
            a `.pt` file of the public DiT or SiT releases;
            a diffusers pipeline folder (model_index.json), or a model folder beside its scheduler's;
            a name on the hub (`owner/name`) of such a pipeline, where there is network.
        guidance_scale: classifier-free guidance, uncond + scale (cond - uncond); 1 is none and costs one evaluation.
        precision: `float32`, or `bf16` for autocast of the network; states stay in float32.
        device: where the network goes; the CPU when None.
        options: `family` ("dit" or "sit") and `num_heads` for `.pt` files whose name does not tell; for diffusers
            models those of `denoisers.diffusers_load.load_diffusers`, such as `prompts`.
    Returns:
        A denoiser, see `denoisers.protocol.Denoiser`.
    Raises:
        ValueError: a missing path, a folder of unknown kind, a damaged file, an unknown precision, or guidance for a
            model without null condition.
    """
    denoiser = _load(path, options)
    if device is not None:
        denoiser = denoiser.to(device)
    return with_guidance(with_precision(denoiser.eval().requires_grad_(False), precision), guidance_scale)


def _load(path: str | Path, options: dict[str, Any]) -> nn.Module:
    """Imports wait until a kind is known: timm and diffusers take seconds."""
    folder = Path(path)
    if folder.is_file():
        return _load_file(folder, **options)
    if _is_diffusers(folder) or _may_be_hub_name(str(path)):
        from denoisers.diffusers_load import load_diffusers

        return load_diffusers(path, **options)
    if not folder.exists():
        raise ValueError(f"{path} does not exist: give a checkpoint folder, a .pt file or a diffusers folder")
    if (folder / "config.json").is_file():
        from denoisers.checkpoint import load_checkpoint

        return _with_hash(load_checkpoint(folder, **options))
    raise ValueError(
        f"{path} is not a model: expected config.json and model.safetensors (this project), model_index.json "
        "(a diffusers pipeline), or a diffusers model's config.json"
    )


def _load_file(path: Path, family: str | None = None, **network: Any) -> nn.Module:
    """A public `.pt` file; DiT and SiT weights have the same names, so the file name or `family` decides."""
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} is a file of unknown kind: give a .pt file of DiT or SiT, or a folder")
    from denoisers.checkpoint import load_public_checkpoint

    found = [name for name in ("dit", "sit") if name in path.stem.lower()] if family is None else [family]
    if found == ["dit"]:
        return _with_hash(load_public_checkpoint(path, NoiseSchedule.linear(), **network))
    if found == ["sit"]:
        return _with_hash(load_public_checkpoint(path, NoiseSchedule.flow(), **{"convention": "sit"} | network))
    raise ValueError(f"{path.name} does not say whether it is a DiT or a SiT: pass family='dit' or family='sit'")


def _with_hash(denoiser: nn.Module) -> nn.Module:
    from denoisers.checkpoint import weight_hash

    denoiser.weight_hash = weight_hash(denoiser)
    return denoiser


def _is_diffusers(folder: Path) -> bool:
    if (folder / "model_index.json").is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and '"_class_name"' in config.read_text()


def _may_be_hub_name(path: str) -> bool:
    """owner/name, neither here nor under a folder that is here (which would rather be a mistyped path)."""
    owner, _, name = path.partition("/")
    return bool(owner and name) and "/" not in name and owner[0] not in ".~" and not Path(owner).exists()
