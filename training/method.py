"""What a method is that makes solver tables: plain code that knows nothing of the trainer that runs it.

    method.begin(run) -> fitting        fitting.step(batch) ...        fitting.tables(), fitting.state()

A `Method` holds the options of a config and does nothing; a `Fitting` is one run of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from data.sources import Batch
from data.teacher_data import TeacherData, Wanted
from denoisers import Evaluations
from solvers import SolverTable
from training.signals import stop


class Parameters(Protocol):
    """A map from `size` free numbers to a table of `nfe` evaluations."""

    nfe: int
    size: int

    def initial(self) -> Tensor:
        """Where a search starts: (size,) float64."""
        ...

    def table(self, theta: Tensor) -> SolverTable:
        """The table of `theta`, (size,) float64 on the CPU; gradients flow."""
        ...

    def project(self, theta: Tensor) -> Tensor:
        """`theta` moved inside its bounds; called after every step of an optimiser."""
        ...


@dataclass(frozen=True)
class Result:
    """A table and what its artifact says about it.

    Args:
        name: of the artifact, without .json.
        table: the solver.
        spent: evaluations it took, in this process.
        fitted_on, validation, config: see docs/artifact.md.
    """

    name: str
    table: SolverTable
    spent: Evaluations
    fitted_on: dict[str, Any]
    validation: dict[str, Any]
    config: dict[str, Any]


class Run:
    """Where a fitting runs: here in one process on the CPU, alone, writing nothing.

    Args:
        denoiser: the frozen network, guidance included.
        data: opened for the method.
    """

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    precision: str = "32-true"
    shows_progress: bool = False
    logger: Any = None
    folder: Path | None = None

    def __init__(self, denoiser: nn.Module, data: TeacherData) -> None:
        self.denoiser, self.data = denoiser, data

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every process's value, on the CPU, the same in all."""
        return value.cpu()

    def gather(self, value: Tensor) -> Tensor:
        """Every process's value, (processes, *shape), on the CPU."""
        return value.cpu()[None]

    def together(self, values: Tensor, most: int) -> Tensor:
        """Every process's values, one after the other, of which each has a number of its own, at most `most`."""
        padded = values.new_zeros(most, *values.shape[1:])
        padded[: len(values)] = values
        counts = self.gather(torch.tensor(len(values))).tolist()
        return torch.cat([part[:count] for part, count in zip(self.gather(padded), counts)])

    def computing(self) -> AbstractContextManager:
        """The number format of the network, for work outside `Fitting.step` and `Fitting.validate`."""
        return nullcontext()

    def log(self, values: dict[str, float | Tensor], bar: bool = True, of_epoch: bool = False) -> None:
        """Figures of a step, or of an epoch that is over, also in the progress bar."""

    def say(self, message: str) -> None:
        """One line for the user."""

    def safe_point(self) -> None:
        """A place that all processes reach together and where nothing is lost; a signal ends the run here."""
        stop.check()

    def save(self, result: Result, is_final: bool = True) -> Path | None:
        """Write an artifact; called in all processes. None where nothing is written."""
        return None

    def restart_clock(self) -> None:
        """The work on another table begins."""


class Fitting(ABC):
    """A run of a method.

    Attributes:
        folders: where it keeps what no other run may touch.
    """

    folders: Sequence[Path] = ()

    @property
    def stays(self) -> str:
        """What stays on disk, for the same command to go on from, before there is a checkpoint; empty: nothing."""
        return ""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether nothing is left to do but to finish."""

    @abstractmethod
    def step(self, batch: Batch | tuple[int, ...]) -> None:
        """Learn from a batch: trajectories, `batch[:]` in memory, or the seeds of fresh ones."""

    @abstractmethod
    def tables(self) -> dict[str, SolverTable]:
        """The tables so far, by the names of their artifacts."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, text and containers of them; called in all processes."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def start(self) -> None:  # noqa: B027 - optional, as the following ones
        """Training begins: the network is on its device."""

    def end_epoch(self) -> None:  # noqa: B027
        """All batches of an epoch have been shown."""

    def finish(self) -> None:  # noqa: B027
        """Training has ended: write what is left to write."""


class Method(ABC):
    """The options of a method, checked when they are made; `name` stands in the artifacts."""

    name: ClassVar[str]

    def settings(self) -> dict[str, str]:
        """The options that change results, by their names: each a short text."""
        return settings(self)

    @property
    @abstractmethod
    def wanted(self) -> Wanted:
        """What it learns from."""

    @property
    @abstractmethod
    def artifacts(self) -> list[str]:
        """Names of the artifacts it writes, without .json."""

    @abstractmethod
    def begin(self, run: Run) -> Fitting:
        """A fresh run; ValueError where options do not fit the denoiser or the data."""


def settings(options: Any, group: str = "") -> dict[str, str]:
    """Fields of a dataclass and of those in it, by dotted names; without those of `field(compare=False)`."""
    found: dict[str, str] = {}
    for field in (field for field in fields(options) if field.compare):
        value, name = getattr(options, field.name), f"{group}{field.name}"
        found |= settings(value, f"{name}.") if is_dataclass(value) else {name: repr(value)}
    return found
