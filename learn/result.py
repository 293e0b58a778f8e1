"""What learning ends with: a solver for each number of calls, a report, and how they are used."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learn.judge import Choice
from learn.subject import Subject
from learn.usage import accelerated
from solvers import SolverTable, identify, load_solver, save_solver
from solvers.files import atomic_write


@dataclass(frozen=True, eq=False)
class Result:
    """Solvers by their numbers of network calls.

    Args:
        folder: of everything that was written.
        paths: the artifacts.
        rows: what is known of each, as in report.json.
        usage: lines of Python that use the solvers.
        subject: what they were learned for.
    """

    folder: Path
    paths: Mapping[int, Path]
    rows: Sequence[Mapping[str, Any]]
    usage: Sequence[str]
    subject: Subject

    @property
    def pipeline(self) -> Any:
        """The pipeline they were learned for, a copy that shares its parts and runs them; None for other models."""
        return None if self.subject.pipe is None else accelerated(self.subject, self.paths)

    def table(self, calls: int) -> SolverTable:
        """The solver of so many calls; ValueError where none was learned."""
        if calls not in self.paths:
            raise ValueError(f"there is no solver of {calls} calls, only of {', '.join(map(str, self.paths))}")
        return load_solver(self.paths[calls])

    @property
    def report(self) -> Path:
        """The page about them."""
        return self.folder / "report.html"


def save_choices(subject: Subject, choices: Sequence[Choice], folder: Path) -> dict[int, Path]:
    """The artifact of each number of calls, solver-<calls>.json, with what it was chosen from."""
    paths = {}
    for choice in choices:
        info, name = choice.taken.candidate.table.info, choice.taken.candidate.name
        figures = {one.candidate.name: one.error for one in choice.judged}
        validation = {"error": choice.taken.error, "errors": figures, "as_near_as": choice.equal}
        paths[choice.calls] = save_solver(
            choice.taken.candidate.table,
            folder / f"solver-{choice.calls}.json",
            identify(subject.denoiser),
            method=info.get("method", "tabulate"),
            fitted_on=info.get("fitted_on"),
            validation=dict(info.get("validation", {})) | validation,
            config=info.get("config") or {"solver": name},
        )
    return paths


def row_of(choice: Choice) -> dict[str, Any]:
    """A number of calls as report.json holds it."""
    taken, rival = choice.taken, choice.rival
    return {
        "calls": choice.calls,
        "network_calls": taken.candidate.calls,
        "rows": taken.candidate.table.num_rows,
        "solver": taken.candidate.name,
        "is_learned": taken.candidate.is_learned,
        "error": taken.error,
        "standard_error": taken.standard_error,
        "rival": rival.candidate.name,
        "rival_error": rival.error,
        "as_near_as": choice.equal,
        "seconds": taken.seconds,
        "seconds_per_call": taken.seconds / taken.candidate.calls,
        "rival_seconds_per_call": rival.seconds / rival.candidate.calls,
        "errors": {one.candidate.name: one.error for one in choice.judged},
        "reason": choice.reason,
    }


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """report.json."""
    with atomic_write(folder / "report.json") as path:
        path.write_text(json.dumps(list(rows), indent=2, allow_nan=False) + "\n", encoding="utf-8")
