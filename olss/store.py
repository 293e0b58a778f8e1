"""A solver's own outputs on disk, so that each row costs its calls once per trajectory."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.shards import Trajectories, flatten_condition
from olss.run import Fit
from solvers import SolverTable, identify
from solvers.files import atomic_write
from solvers.table_json import table_to_dict
from training.method import Run

VERSION = 2  # of how outputs are computed


class OutputStore:
    """Outputs of solvers, by all that they depend on. Those of another network, precision or weights are not found.

    Args:
        folder: created on first use; shared by all processes, which work on different batches.
        run: with the network, and how it is computed.
        teacher: whose nodes the solvers have.
    """

    def __init__(self, folder: Path, run: Run, teacher: SolverTable) -> None:
        self.folder = folder
        identity = identify(run.denoiser)
        network = identity.weight_hash, identity.guidance_scale, identity.thresholding, identity.schedule.fingerprint()
        computed = VERSION, torch.__version__, run.device.type, run.precision
        self._common = repr((network, computed, table_to_dict(teacher)))

    def save(self, batch: Trajectories, fit: Fit, row: int, outputs: Sequence[Tensor]) -> None:
        """Keep the outputs of a row, one per branch, for a batch; only finite ones are worth it."""
        if all(bool(torch.isfinite(output).all()) for output in outputs):
            with atomic_write(self._path(batch, fit, row)) as path:
                save_file({"outputs": torch.stack(list(outputs)).cpu()}, path)

    def load(self, batch: Trajectories, fit: Fit, row: int) -> list[Tensor] | None:
        """The outputs of a row for a batch, on its device; None where they are not there."""
        path = self._path(batch, fit, row)
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            return list(file.get_tensor("outputs").to(batch.states.device).unbind())

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, batch: Trajectories, fit: Fit, row: int) -> Path:
        """Named by the batch, the plan up to the row, the weights before it, and what all outputs have in common."""
        plan = fit.plan.path[: row + 1], [fit.plan.at(index) for index in range(row + 1)]
        weights = fit.space, fit.first_weight, [weight.tolist() for weight in fit.weights[:row]]
        digest = hashlib.sha256(repr((self._common, plan, weights, batch.seeds)).encode())
        for value in (batch.states[:, 0], *flatten_condition("", batch.condition).values()):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return self.folder / f"{digest.hexdigest()}.safetensors"
