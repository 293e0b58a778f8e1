"""A solver's own outputs on disk, so that each row costs its calls once per trajectory."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from olss.run import Fit
from solvers.files import atomic_write


class OutputStore:
    """Outputs of solvers, by the seeds of a batch and the row. One of other weights than now is not found.

    Args:
        folder: created on first use; shared by all processes, which work on different batches.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, seeds: Sequence[int], fit: Fit, row: int, outputs: Sequence[Tensor]) -> None:
        """Keep the outputs of a row, one per branch, for a batch."""
        with atomic_write(self._path(seeds, fit, row)) as path:
            save_file({"outputs": torch.stack(list(outputs)).cpu()}, path)

    def load(self, seeds: Sequence[int], fit: Fit, row: int, device: torch.device) -> list[Tensor] | None:
        """The outputs of a row for a batch, on a device; None where they are not there."""
        path = self._path(seeds, fit, row)
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            return list(file.get_tensor("outputs").to(device).unbind())

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, seeds: Sequence[int], fit: Fit, row: int) -> Path:
        """Named by what outputs depend on: the batch, the plan up to its row and the weights before it."""
        plan = fit.plan.path[: row + 1], [fit.plan.at(index) for index in range(row + 1)]
        parts = list(seeds), plan, fit.space, fit.first_weight, [weight.tolist() for weight in fit.weights[:row]]
        return self.folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.safetensors"
