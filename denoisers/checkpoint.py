"""Checkpoint folders of the project's own denoisers; `denoisers.dit_load` makes networks of them.

A folder holds `config.json` (network, noise schedule, hash, how it was trained) and `model.safetensors` (bf16).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from solvers.files import atomic_write, sha256
from solvers.identity import hash_weights

FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


def save_denoiser(
    denoiser: Any,
    folder: str | Path,
    training: dict[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a checkpoint folder.

    Args:
        denoiser: the `DiT`; its weights are rounded to bf16.
        folder: created if missing; an earlier checkpoint in it is replaced.
        training: JSON types that say how it was trained, kept as they are.
        weights: what to save instead of the network's own weights, by the same names.
    Returns:
        The weight hash of the network as it will be loaded, see `weight_hash`.
    """
    folder = Path(folder)
    weights = denoiser.state_dict() if weights is None else weights
    weights = {name: value.detach().cpu().bfloat16().contiguous() for name, value in weights.items()}
    with atomic_write(folder / WEIGHTS_NAME) as path:
        save_file(weights, path)
    digest = hash_weights(weights)
    config = {
        "format_version": FORMAT_VERSION,
        "architecture": "DiT",
        "network": denoiser.config,
        "schedule": denoiser.schedule.to_dict(),
        "weight_hash": digest,
        "weights_sha256": sha256(folder / WEIGHTS_NAME),
        "training": training or {},
    }
    with atomic_write(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(config, indent=2) + "\n")
    return digest


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked contents of a checkpoint folder's config.json.

    Raises:
        ValueError: not there, not JSON, of another version or incomplete.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{Path(folder)} is no checkpoint folder: it has no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the checkpoint folder again") from error
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} has format_version {found!r}: this version of the project reads {FORMAT_VERSION}")
    missing = {"network", "schedule", "weights_sha256"} - config.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: copy the checkpoint folder again")
    return config


def load_weights(denoiser: Any, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy weights of the same names and shapes into a `DiT`.

    Raises:
        ValueError: names or shapes differ; the first differences are listed.
    """
    own = denoiser.weight_shapes
    found = {name: tuple(value.shape) for name, value in weights.items()}
    differ = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if differ:
        listed = "; ".join(f"{name}: found {found.get(name)}, need {own.get(name)}" for name in differ[:3])
        raise ValueError(f"the weights of {source} do not fit the network, {len(differ)} differ: {listed}")
    denoiser.load_state_dict(weights)
