"""The student's outputs on disk, so that each row costs one evaluation per trajectory."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from olss.student import Fit
from solvers.files import atomic_write


class OutputStore:
    """Outputs of students, by the seeds of a batch and the row. One of other coefficients than now is not found.

    Args:
        folder: created on first use; shared by all processes, which work on different batches.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, seeds: Sequence[int], fit: Fit, row: int, output: Tensor) -> None:
        """Keep the output of a row for a batch."""
        with atomic_write(self._path(seeds, fit, row)) as path:
            save_file({"output": output.cpu().contiguous()}, path)

    def load(self, seeds: Sequence[int], fit: Fit, first: Tensor) -> list[Tensor]:
        """Outputs of a batch up to the first that is missing, on the device of `first`, the teacher's output 0."""
        outputs = [first]
        while len(outputs) <= len(fit.coefs) and (path := self._path(seeds, fit, len(outputs))).exists():
            with safe_open(path, "pt") as file:
                outputs.append(file.get_tensor("output").to(first.device))
        return outputs

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, seeds: Sequence[int], fit: Fit, row: int) -> Path:
        """Named by what an output depends on: the batch, the path up to its row and the coefficients before it."""
        parts = list(seeds), fit.path[: row + 1], [coef.tolist() for coef in fit.coefs[:row]]
        return self.folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.safetensors"
