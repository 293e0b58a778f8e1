"""Whether a recorded run of a pipeline is what solvers are fitted on: rows of its table, outputs of its denoiser."""

import torch
from torch import Tensor

from denoisers.pipeline import PipelineDenoiser
from solvers.table import SolverTable

EXACT = 1e-4  # schedulers compute in float32


def check_run(
    denoiser: PipelineDenoiser, table: SolverTable, states: Tensor, outputs: Tensor, condition: Tensor
) -> None:
    """Refuse a run that a table cannot make, or whose outputs are no function of state, timestep and condition.

    Args:
        denoiser: the pipeline.
        table: its own scheduler, M rows.
        states: (batch, M+1, *shape).
        outputs: (batch, M, *shape).
        condition: of the samples.
    Raises:
        ValueError: such a run; the first step at which it shows is named.
    """
    check_rows(denoiser.name, table, states, outputs)
    for row in sorted({0, table.num_rows // 2, table.num_rows - 1}):
        found = denoiser(states[:, row], table.timesteps[row].to(states.device), condition).double()
        wanted = outputs[:, row].double()
        error = float((found - wanted).norm() / wanted.norm())
        if not error < 10 * _tolerance(outputs):
            raise ValueError(
                f"{denoiser.name}, called again at the state of step {row} of its run, gives another output (off "
                f"by {error:.1g}): it depends on more than state, timestep, prompt and seed, such as guidance that "
                "changes from step to step, or earlier outputs; switch that off"
            )


def check_rows(name: str, table: SolverTable, states: Tensor, outputs: Tensor) -> None:
    """Refuse states that do not follow from those before by the rows of the table; see `check_run`."""
    broken = [row for row in range(table.num_rows) if not bool(outputs[:, row].isfinite().all())]
    if broken:
        raise ValueError(
            f"{name} gives an output that is not finite at step {broken[0]}: run it in float32, or mend the model first"
        )
    states, outputs, tolerance = states.double(), outputs.double(), _tolerance(states, outputs)
    size = [value.flatten(2).norm(dim=2).cpu() for value in (states, outputs)]
    for row, coefs in enumerate(zip(table.state_coef, table.output_coef)):
        parts = [torch.einsum("j,bj...->b...", c.to(v), v[:, : len(c)]) for c, v in zip(coefs, (states, outputs))]
        error = (sum(parts) - states[:, row + 1]).flatten(1).norm(dim=1).cpu()
        allowed = sum((value[:, : len(c)] * c.abs()).sum(1) for c, value in zip(coefs, size))
        if not bool((error <= tolerance * allowed).all()):
            raise ValueError(
                f"{name} changes its state, or its scheduler, between the steps (step {row} is off by "
                f"{float((error / allowed).max()):.1g}), so that its run is not that of a solver table. Inpainting "
                "that blends a picture in does so: fit the solver in the text-to-image pipeline, and use it in this one"
            )


def _tolerance(*values: Tensor) -> float:
    return max(EXACT, *(4 * torch.finfo(value.dtype).eps for value in values))
