"""What a folder of trajectories says about itself: which teacher made them, from which seeds, in which files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from solvers.identity import identify
from solvers.table import SolverTable
from solvers.table_json import table_to_dict

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


def describe_teacher(denoiser: Callable, table: SolverTable, dtype: torch.dtype) -> dict[str, Any]:
    """What makes trajectories comparable: network, guidance, schedule, solver and number formats; JSON types."""
    identity = identify(denoiser)
    return {
        "denoiser": identity.name,
        "weight_hash": identity.weight_hash,
        "guidance_scale": identity.guidance_scale,
        "schedule": identity.schedule.to_dict(),
        "sample_shape": list(denoiser.sample_shape),
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision(dtype),
        "table": table_to_dict(table),
    }


def check_same(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise ValueError when the folder already holds a manifest of another teacher, other seeds or shard size."""
    if not (folder / MANIFEST_NAME).exists():
        return
    found = read_manifest(folder)
    old, new = ({**m["teacher"], "seeds": m["seeds"], "shard_size": m["shard_size"]} for m in (found, wanted))
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(
                f"{folder} holds trajectories with another {name}: found {short(old.get(name))}, asked for "
                f"{short(new[name])}; use another folder, or delete this one"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; ValueError when there is none that this version can read."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no trajectories (no {MANIFEST_NAME}): make them with "
            "`python train.py predict --config configs/trajectories/...`"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete the folder and generate it again") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise ValueError(f"{path} has format_version {found!r}: this version of the project reads {FORMAT_VERSION}")
    return manifest


def precision(dtype: torch.dtype) -> str:
    """What the network computes in, as far as the caller's autocast says."""
    if torch.is_autocast_enabled("cuda"):
        return f"autocast {torch.get_autocast_dtype('cuda')}".replace("torch.", "")
    if torch.is_autocast_enabled("cpu"):
        return f"autocast {torch.get_autocast_dtype('cpu')}".replace("torch.", "")
    return str(torch.promote_types(dtype, torch.float32)).removeprefix("torch.")


def short(value: Any) -> str:
    """A value as one short piece of text; long ones by their hash."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"one with SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
