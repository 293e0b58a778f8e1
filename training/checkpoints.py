"""Checkpoints appear whole or not at all, carry a checksum of all their bytes, and are checked before they are used."""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from solvers.files import atomic_write

MARK = b"sha256 "
COMMENT = len(MARK) + 64  # bytes; a zip archive ends with the length of its comment, two bytes, and the comment
BY_NAME = ("last", "best")  # checkpoints that Lightning finds by itself


class CheckedCheckpoints(TorchCheckpointIO):
    """Local checkpoints with the checksum of the archive as its comment; others are Lightning's own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)
            seal(temporary)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: it is missing or altered.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        verify(path)
        return torch.load(path, map_location=map_location, weights_only=True)


def check_named(path: str | None) -> None:
    """Refuse a `--ckpt_path` that names no file, before any work.

    Raises:
        ValueError: an empty name, or no such file.
    """
    if path == "":
        raise ValueError("--ckpt_path is empty: give a checkpoint's path, or leave it out to start anew")
    if path is not None and path not in BY_NAME and not _is_remote(path) and not Path(path).exists():
        raise ValueError(f"there is no checkpoint {path}: leave --ckpt_path out to start anew")


def use_checked(strategy: Strategy) -> None:
    """Let a strategy write and read checked checkpoints, where it would have used Lightning's plain ones.

    Raises:
        ValueError: it writes and reads them by itself.
    """
    if type(strategy) is ModelParallelStrategy:
        raise ValueError(
            "checkpoints of ModelParallelStrategy have no checksum: give --trainer.strategy.class_path "
            "training.sharded.Sharded, which shards in the same way"
        )
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = CheckedCheckpoints()


def seal(path: Path) -> None:
    """Append the checksum to an archive that `torch.save` has written."""
    with open(path, "r+b") as file:
        digest = _digest(file, os.path.getsize(path))
        file.seek(-2, os.SEEK_END)
        file.write(COMMENT.to_bytes(2, "little") + MARK + digest.encode())


def verify(path: str | Path) -> None:
    """Compare a checkpoint with its checksum.

    Raises:
        ValueError: there is no such file, or not all of it is as it was written.
    """
    check_named(str(path))
    if not Path(path).is_file():
        raise ValueError(f"{path} is no checkpoint but a folder: give the file")
    size = os.path.getsize(path) - COMMENT
    with open(path, "rb") as file:
        file.seek(max(size - 2, 0))
        length, comment = file.read(2), file.read()
        if length != COMMENT.to_bytes(2, "little") or not comment.startswith(MARK):
            raise ValueError(
                f"{path} ({size + COMMENT} bytes) is truncated, damaged or no checkpoint of train.py: take an earlier "
                "one, or leave --ckpt_path out to start anew"
            )
        file.seek(0)
        if _digest(file, size) != comment.removeprefix(MARK).decode(errors="replace"):
            raise ValueError(
                f"checkpoint {path} is damaged, its SHA-256 differs from the one written: take an earlier one, or "
                "leave --ckpt_path out to start anew"
            )


def _digest(file: BinaryIO, size: int) -> str:
    """Of an archive of `size` bytes, without the length of its comment."""
    found, left = hashlib.sha256(), size - 2
    while left > 0 and (block := file.read(min(left, 2**20))):
        found.update(block)
        left -= len(block)
    return found.hexdigest()


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
