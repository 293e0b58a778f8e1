"""What a folder of trajectories says about itself: which teacher made them, from which seeds, in which files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from solvers.errors import one_line
from solvers.identity import identify
from solvers.table import SolverTable
from solvers.table_json import table_to_dict

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
FIELDS = ("teacher", "seeds", "shard_size", "complete", "shards")


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
    return parse_manifest(path, FIELDS, "delete the folder and generate it again")


def parse_manifest(path: Path, fields: Sequence[str], again: str) -> dict[str, Any]:
    """A manifest's contents.

    Raises:
        ValueError: no JSON object, another version, a missing field, or shards that do not lie beside it.
    """
    manifest = read_record(path, again)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise ValueError(f"{path} has format_version {found!r}: this version of the project reads {FORMAT_VERSION}")
    missing = [name for name in fields if name not in manifest]
    if missing or not isinstance(manifest["shards"], dict):
        raise ValueError(f"{path} lacks {', '.join(missing) or 'a list of shards by name'}: {again}")
    for name in manifest["shards"]:
        if name in ("", ".", "..") or set("/\\:\0") & set(name):
            raise ValueError(f"{path} names the shard {name!r}: shards lie beside their manifest; {again}")
    return manifest


def read_record(path: Path, again: str) -> dict[str, Any]:
    """A JSON object that stands in a file of its own; ValueError names the file and says how to make it `again`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({one_line(str(error), 100)}): {again}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__} where an object belongs: {again}")
    return record


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
