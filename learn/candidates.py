"""What could be handed out for a number of network calls: learned solvers, and the classical ones at equal calls."""

from collections.abc import Sequence
from dataclasses import dataclass

from denoisers import network_calls, split_guidance
from learn.subject import Subject
from solvers import SolverTable, named_solver, solver_names

TITLES = {
    "olss": "learned (OLSS)",
    "solver_search": "learned (search)",
    "ddim": "DDIM",
    "euler": "Euler",
    "dpmpp": "DPM++",
    "unipc": "UniPC",
    "ipndm": "iPNDM",
}
CLASSICAL = ("ddim", "euler", "dpmpp", "unipc")
YARDSTICKS = ("unipc", "dpmpp", "ipndm")  # what "as near to the teacher as n calls of ..." is said of


@dataclass(frozen=True, eq=False)
class Candidate:
    """A solver that could be handed out.

    Args:
        name: its method, or the name of a classical solver.
        table: the solver; a learned one is loaded from its artifact.
        calls: network calls of an image.
    """

    name: str
    table: SolverTable
    calls: int

    @property
    def is_learned(self) -> bool:
        """Whether it was fitted."""
        return bool(self.table.info)

    @property
    def title(self) -> str:
        """For people."""
        return TITLES[self.name]


def classical(subject: Subject, calls: int, names: Sequence[str] = CLASSICAL) -> list[Candidate]:
    """The classical solvers a model's schedule has, with as many whole rows as the calls allow."""
    known = set(solver_names(subject.denoiser.schedule))
    euler = {"euler"} if "ddim" in known else set()  # the same step
    wanted = [name for name in names if name in known - euler] or ["ipndm"]
    found = (named(subject, name, calls // subject.row_calls) for name in wanted)
    return [candidate for candidate in found if candidate is not None]


def yardstick_name(subject: Subject) -> str:
    """The classical solver that others are told by."""
    known = solver_names(subject.denoiser.schedule)
    return next(name for name in YARDSTICKS if name in known)


def named(subject: Subject, name: str, rows: int) -> Candidate | None:
    """A classical solver; None where it does not have so few rows."""
    try:
        table = split_guidance(named_solver(f"{name}:{rows}", subject.denoiser.schedule), subject.denoiser)
    except ValueError:
        return None
    return Candidate(name, table, network_calls(table, subject.denoiser))
