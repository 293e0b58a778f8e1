"""What a run keeps on disk until its end: a solver's own outputs, so that each row costs its calls once per trajectory,
and what plans are worth, so that a search that is broken off goes on."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.shards import Trajectories, flatten_condition
from denoisers import Evaluations
from olss.plan import CallPlan
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

    def scores(self, fitted: Trajectories, chosen: Trajectories, options: Any, spent: Evaluations) -> "Scores":
        """Those of plans that are fitted with some options and judged on these trajectories, and what they cost."""
        digest = hashlib.sha256(repr((self._common, options, fitted.seeds, chosen.seeds)).encode())
        for part in (fitted, chosen):
            for value in (part.states, part.outputs, *flatten_condition("", part.condition).values()):
                _add(digest, value)
        return Scores(self.folder, digest.hexdigest(), spent)

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, batch: Trajectories, fit: Fit, row: int) -> Path:
        """Named by the batch, the plan up to the row, the weights before it, and what all outputs have in common."""
        plan = fit.plan.path[: row + 1], [fit.plan.at(index) for index in range(row + 1)]
        weights = fit.space, fit.first_weight, [weight.tolist() for weight in fit.weights[:row]]
        digest = hashlib.sha256(repr((self._common, plan, weights, batch.seeds)).encode())
        for value in (batch.states[:, 0], *flatten_condition("", batch.condition).values()):
            _add(digest, value)
        return self.folder / f"{digest.hexdigest()}.safetensors"


class Scores:
    """What plans are worth, each a file, with the evaluations it took to find out.

    Args:
        folder: created on first use; shared by all processes.
        common: all that the scores depend on beside plan and number of trajectories.
        spent: evaluations of this process, to which are added those of scores that are found here.
    """

    def __init__(self, folder: Path, common: str, spent: Evaluations) -> None:
        self.folder, self._common, self.spent = folder, common, spent
        self._counted = spent.forward

    def save(self, plan: CallPlan, size: int, score: float) -> None:
        """Keep a score on `size` trajectories; all evaluations since the last one are its."""
        cost, self._counted = self.spent.forward - self._counted, self.spent.forward
        text, path = f"{score!r} {cost}", self._path(plan, size)
        with atomic_write(path) as temporary:
            temporary.write_text(f"{text} {_seal(path, text)}")

    def load(self, plan: CallPlan, size: int) -> float | None:
        """A score; None where it is not there, or not as it was written."""
        path = self._path(plan, size)
        text, _, seal = path.read_text(errors="replace").rpartition(" ") if path.exists() else ("", "", "")
        if not text or seal != _seal(path, text):
            return None
        score, cost = text.split()
        self.spent.forward += int(cost)
        self._counted = self.spent.forward
        return float(score)

    def _path(self, plan: CallPlan, size: int) -> Path:
        digest = hashlib.sha256(repr((self._common, plan.path, plan.unconditional, size)).encode())
        return self.folder / f"{digest.hexdigest()}.score"


def _seal(path: Path, text: str) -> str:
    """What a file of this name and text ends with."""
    return hashlib.sha256(f"{path.name} {text}".encode()).hexdigest()


def _add(digest: Any, value: Tensor) -> None:
    """A tensor's type, shape and bytes."""
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
