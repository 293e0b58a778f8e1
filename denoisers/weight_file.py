"""Weights and training arguments in a file of tensors: .pt, .pth or .safetensors. Nothing in a file is run."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from solvers.errors import one_line

SUFFIXES = (".pt", ".pth", ".safetensors")
ENTRIES = ("ema", "model")  # of a training checkpoint, the first that is there


@dataclass(frozen=True)
class WeightFile:
    """What a file holds: the weights by the network's own names, and what the training was told."""

    weights: dict[str, Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)


def read_weight_file(path: str | Path) -> WeightFile:
    """Read a state dict, or a training checkpoint whose `ema` (else `model`) entry is one.

    The names lose what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) put into them. `args`, an
    argparse.Namespace in checkpoints of the DiT and SiT training code, is the one class that is allowed beside tensors.

    Raises:
        ValueError: a missing file, one of another kind, a damaged one, or one that holds any other class.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is a file of unknown kind: give one that ends in {', '.join(SUFFIXES)}, or a folder")
    content = read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    entry = next((content[name] for name in ENTRIES if isinstance(content.get(name), Mapping)), content)
    weights = {_plain(str(name)): value for name, value in entry.items() if isinstance(value, Tensor)}
    return WeightFile(weights, _arguments(content.get("args")))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU; raises ValueError where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({one_line(str(error), 80)}): copy it again") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """Mapped rather than read: a training checkpoint is mostly the state of its optimizer."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds a {found[1]}" if found else one_line(str(error), 80)
        raise ValueError(
            f"{path} is not a file of plain tensors ({reason}): only such files are loaded; save the weights alone"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: save the network's state_dict()")
    return content


def _plain(name: str) -> str:
    """A parameter's name in the network itself; compiled blocks have their prefix in the middle."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _arguments(found: Any) -> dict[str, Any]:
    return dict(vars(found)) if isinstance(found, argparse.Namespace) else dict(found or {})
