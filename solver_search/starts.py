"""Where a search starts: a named solver, an artifact, or the solution with one evaluation less."""

import torch
from torch import Tensor

from solvers import NoiseSchedule, SolverTable
from solvers.named import resolve_solver


def start_table(text: str, nfe: int, schedule: NoiseSchedule) -> SolverTable:
    """The table a search at `nfe` evaluations starts from.

    Args:
        text: `name` or `name@spacing` of a solver (its steps are `nfe`), or the path of an artifact, in which `{nfe}`
            stands for the number.
        nfe: evaluations of the search.
        schedule: the denoiser's.
    Raises:
        ValueError: no such solver or file, or a table with another number of evaluations, prediction type or with
            noise in its rows.
    """
    is_path = text.endswith(".json")
    table = resolve_solver(text.replace("{nfe}", str(nfe)) if is_path else f"{text}:{nfe}", schedule)
    check_start(table, text, nfe, schedule)
    return table


def check_start(table: SolverTable, name: str, nfe: int, schedule: NoiseSchedule) -> None:
    """ValueError unless a search at `nfe` evaluations of this schedule can start from `table`."""
    if table.nfe != nfe:
        raise ValueError(
            f"the start {name} has {table.nfe} evaluations, the search has {nfe}: start from a solver of {nfe}, or set "
            f"nfe to {table.nfe}; a path may contain {{nfe}}"
        )
    if table.prediction_type != schedule.prediction_type:
        raise ValueError(
            f"the start {name} combines {table.prediction_type} outputs, the denoiser gives "
            f"{schedule.prediction_type}: start from a solver made for this denoiser, or from one by its name"
        )
    if table.is_stochastic:
        raise ValueError(f"the start {name} adds noise in its rows: start from a solver without (ddim, dpmpp, unipc)")


def split_widest(table: SolverTable, schedule: NoiseSchedule) -> SolverTable:
    """The same solver with one evaluation more, whose output has weight zero: a warm start at N + 1.

    The widest step (in timesteps) gets a state half way, on the straight line between its two ends in the
    coordinates x / (alpha + sigma) over sigma / (alpha + sigma), on which a one-step solver moves.

    Args:
        table: N evaluations.
        schedule: the denoiser's, for the node half way.
    Returns:
        A table of N + 1 evaluations with the canonical rows of `table`, the new one apart.
    """
    n, ends = table.nfe, schedule.timestep(table.alpha, table.sigma)
    row = int((ends[:-1] - ends[1:]).argmax())
    middle = (ends[row] + ends[row + 1]) / 2
    alpha, sigma = schedule.alpha_sigma(middle)
    position = table.sigma / (table.alpha + table.sigma)
    share = (sigma / (alpha + sigma) - position[row]) / (position[row + 1] - position[row])
    norm = table.alpha + table.sigma
    rows = [_widened(block, row) for block in (table.state_coef, table.output_coef)]
    half = [(alpha + sigma) * share / norm[row + 1] * block[row + 1] for block in rows]
    half[0][row] += (alpha + sigma) * (1 - share) / norm[row]
    for block, new in zip(rows, half):
        block[row] = new
    return SolverTable(
        timesteps=torch.cat([table.timesteps[: row + 1], middle[None], table.timesteps[row + 1 :]]),
        alpha=torch.cat([table.alpha[: row + 1], alpha[None], table.alpha[row + 1 :]]),
        sigma=torch.cat([table.sigma[: row + 1], sigma[None], table.sigma[row + 1 :]]),
        state_coef=rows[0],
        output_coef=rows[1],
        noise_coef=torch.zeros(n + 1, n + 1, dtype=torch.float64),
        start_scale=table.start_scale,
        prediction_type=table.prediction_type,
    )


def _widened(coef: Tensor, row: int) -> Tensor:
    """A copy with an empty row `row` and an empty column `row + 1`."""
    n = len(coef)
    old = torch.arange(n)
    wide = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    wide[(old + (old >= row))[:, None], old + (old > row)] = coef
    return wide
