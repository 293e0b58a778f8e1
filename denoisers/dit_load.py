"""DiT and SiT networks from checkpoint folders of this project, and from the public checkpoints."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from denoisers.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_weights, read_config
from denoisers.dit import DiT
from solvers.files import sha256
from solvers.schedule import NoiseSchedule


def load_checkpoint(folder: str | Path) -> DiT:
    """Load a checkpoint folder in float32 and evaluation mode, without gradients; `.name` is the folder's name.

    Raises:
        ValueError: files missing or damaged, an unknown version, or weights that do not fit the network.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}: copy the whole checkpoint folder")
    if sha256(path) != config["weights_sha256"]:
        raise ValueError(f"{path} differs from the hash in {CONFIG_NAME}: copy the checkpoint folder again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): copy the checkpoint folder again") from error
    denoiser = DiT(NoiseSchedule.from_dict(config["schedule"]), **config["network"])
    return _finish(denoiser, weights, path, folder.name)


def load_public_checkpoint(path: str | Path, schedule: NoiseSchedule, **network: Any) -> DiT:
    """Load a `.pt` file of the public DiT or SiT releases; sizes are read off the weights.

    Args:
        path: a state dict, or a training checkpoint whose `ema` (else `model`) entry is one.
        schedule: `NoiseSchedule.linear()` for DiT, `NoiseSchedule.flow()` (with `convention="sit"`) for SiT.
        network: arguments of DiT that weights do not tell: `num_heads` (default: heads of 64, 72 for width 1152)
            and `convention`.
    Raises:
        ValueError: not a file of tensors, or names that are not a DiT's.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the path of a DiT or SiT .pt file")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a file of plain tensors ({reason}): only such files are loaded") from error
    for entry in ("ema", "model"):
        weights = weights.get(entry, weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or "x_embedder.proj.weight" not in weights:
        raise ValueError(f"{path} holds no DiT weights: x_embedder.proj.weight is missing")
    return _finish(DiT(schedule, **infer_network(weights) | network), weights, path, path.stem)


def infer_network(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of DiT that a public checkpoint's shapes imply."""
    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    out_channels = weights["final_layer.linear.weight"].shape[0] // patch_size**2
    return {
        "input_size": round(weights["pos_embed"].shape[1] ** 0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "num_heads": hidden_size // (72 if hidden_size == 1152 else 64),
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "num_classes": weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }


def _finish(denoiser: DiT, weights: dict[str, Tensor], source: Path, name: str) -> DiT:
    load_weights(denoiser, weights, source)
    denoiser.name = name
    return denoiser.eval().requires_grad_(False)
