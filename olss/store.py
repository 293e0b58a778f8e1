"""The student's outputs on disk, so that each row costs one evaluation per trajectory."""

import hashlib
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from olss.student import Fit
from solvers.files import atomic_write


class OutputStore:
    """Outputs of students, by batch and row. An output of other coefficients than the present ones is not found.

    Args:
        folder: created on first use; shared by all processes, which work on different batches.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def save(self, name: str, fit: Fit, row: int, output: Tensor) -> None:
        """Keep the output of a row for a batch."""
        with atomic_write(self._path(name, fit, row)) as path:
            save_file({"output": output.cpu().contiguous()}, path, {"fit": _digest(fit, row)})

    def load(self, name: str, fit: Fit, first: Tensor) -> list[Tensor]:
        """Outputs of a batch up to the first that is missing, on the device of `first`, the teacher's output 0."""
        outputs = [first]
        while (output := self._read(name, fit, len(outputs))) is not None:
            outputs.append(output.to(first.device))
        return outputs

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str, fit: Fit, row: int) -> Tensor | None:
        path = self._path(name, fit, row)
        if row > len(fit.coefs) or not path.exists():
            return None
        with safe_open(path, "pt") as file:
            return file.get_tensor("output") if file.metadata().get("fit") == _digest(fit, row) else None

    def _path(self, name: str, fit: Fit, row: int) -> Path:
        return self.folder / f"nfe-{len(fit.path)}" / f"{name}-row-{row}.safetensors"


def _digest(fit: Fit, row: int) -> str:
    """What output `row` depends on: the path up to it and the coefficients before it."""
    parts = fit.path[: row + 1], [coef.tolist() for coef in fit.coefs[:row]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
