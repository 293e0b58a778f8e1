"""Where a search starts: a named solver, an artifact, or the solution with fewer evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solver_search.parameters import FreeParameters, PaperParameters
from solvers import NoiseSchedule, SolverTable
from solvers.named import resolve_solver
from solvers.nodes import Nodes
from training.method import Parameters

FINISHES = ("data", "end")


@dataclass(frozen=True)
class Start:
    """Where the stage of each number of evaluations starts, and which numbers it has.

    Args:
        solver: a named solver without its steps, an artifact's path (with `{nfe}`), or several, of which the one with
            the lowest loss after `screening` steps goes on; `paper` for the paper's own parametrisation and start.
        warm: the solution with fewer evaluations, its widest steps split, is a further start.
        screening: Levenberg-Marquardt steps given to each of several starts.
        train_timesteps: whether the timesteps told to the network move.
        keep_last_row: the last row stays that of the start: of OLSS with `last_row: data`, and of classical solvers,
            the data that the network predicts there.
        finish: `data` or `end`, for the paper's parametrisation, see `PaperParameters`.
    Raises:
        ValueError: no solver, or an option out of its range.
    """

    solver: str | list[str] = "dpmpp"
    warm: bool = False
    screening: int = 0
    train_timesteps: bool = True
    keep_last_row: bool = False
    finish: str = "data"

    def __post_init__(self) -> None:
        if not self.solvers or self.screening < 0 or self.finish not in FINISHES:
            raise ValueError(
                f"solvers are {self.solvers}, give one or more; screening is {self.screening}, 0 or more; "
                f"finish is {self.finish!r}, one of {', '.join(FINISHES)}"
            )
        if self.keep_last_row and "paper" in self.solvers:
            raise ValueError(
                "keep_last_row keeps the last row of a solver, and the paper's start has none: set another"
            )

    @property
    def solvers(self) -> list[str]:
        """Those it starts from."""
        return [self.solver] if isinstance(self.solver, str) else list(self.solver)

    @property
    def needs_path(self) -> bool:
        """Whether the last state may lie at a node between the teacher's."""
        return self.finish == "end" and "paper" in self.solvers

    def tables(
        self, nfe: int, schedule: NoiseSchedule, finished: Mapping[int, SolverTable]
    ) -> dict[str, SolverTable | None]:
        """The tables to start from, by name; None for the paper's start.

        Args:
            nfe: evaluations of the stage.
            schedule: the denoiser's.
            finished: solutions by their number of evaluations.
        """
        names = self.solvers
        tables = {name: None if name == "paper" else start_table(name, nfe, schedule) for name in names}
        smaller = [known for known in finished if known < nfe]
        if self.warm and smaller:
            tables[f"solution at {max(smaller)}"] = widened(finished[max(smaller)], nfe, schedule)
        return tables

    def parameters(self, nfe: int, schedule: NoiseSchedule, table: SolverTable | None) -> Parameters:
        """The free parametrisation around a table, or the paper's where there is none."""
        if table is None:
            return PaperParameters(schedule, nfe, finish=self.finish)
        return FreeParameters(table, (schedule.t_min, schedule.t_max), self.train_timesteps, self.keep_last_row)


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


def widened(table: SolverTable, nfe: int, schedule: NoiseSchedule) -> SolverTable:
    """The same solver with its widest steps split until it has `nfe` evaluations."""
    table.require_plain("a warm start")
    while table.nfe < nfe:
        table = split_widest(table, schedule)
    return table


def split_widest(table: SolverTable, schedule: NoiseSchedule) -> SolverTable:
    """The same solver with one evaluation more, whose output has weight zero: a warm start at N + 1.

    The widest step (in timesteps) gets a state half way between its two ends, see `Nodes.between`.

    Args:
        table: N evaluations.
        schedule: the denoiser's, for the node half way.
    Returns:
        A table of N + 1 evaluations with the canonical rows of `table`, the new one apart.
    """
    n, ends = table.num_rows, schedule.timestep(table.alpha, table.sigma)
    row = int((ends[:-1] - ends[1:]).argmax())
    middle = (ends[row] + ends[row + 1]) / 2
    alpha, sigma = schedule.alpha_sigma(middle)
    step = Nodes(table.alpha[row : row + 2], table.sigma[row : row + 2])
    _, (before, after) = step.between(alpha, sigma)
    coefs = {name: _widened(getattr(table, name), row) for name in ("state_coef", "output_coef")}
    supports = {name: _widened(getattr(table, name), row) for name in ("state_support", "output_support")}
    for coef, support in zip(coefs.values(), supports.values()):
        coef[row], support[row] = after * coef[row + 1], support[row + 1]
    coefs["state_coef"][row, row] += before
    supports["state_support"][row, row] = True
    return replace(
        table,
        timesteps=torch.cat([table.timesteps[: row + 1], middle[None], table.timesteps[row + 1 :]]),
        alpha=torch.cat([table.alpha[: row + 1], alpha[None], table.alpha[row + 1 :]]),
        sigma=torch.cat([table.sigma[: row + 1], sigma[None], table.sigma[row + 1 :]]),
        noise_coef=torch.zeros(n + 1, n + 1, dtype=torch.float64),
        calls=(),
        info={},
        **coefs,
        **supports,
    )


def _widened(block: Tensor, row: int) -> Tensor:
    """A copy with an empty row `row` and an empty column `row + 1`."""
    n = len(block)
    old = torch.arange(n)
    wide = block.new_zeros(n + 1, n + 1)
    wide[(old + (old >= row))[:, None], old + (old > row)] = block
    return wide
