"""The same few images by every solver of a run, told by their distance to the teacher's: what runs are ranked by."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from denoisers import calls_per_row, network_calls
from denoisers.generate import as_images, generate
from evaluation.distances import error_figures
from solvers import SolverTable, baseline_names, named_solver

SHOWN = 8  # images of a solver in the table of results
COLUMNS = ("solver", "calls", "median", "p99", "worst", "rmse", "classical", "classical median")
PICTURES = ("teacher", "classical picture", "solver picture")


@dataclass(frozen=True)
class Taken:
    """A solver's images and their errors, root mean squares over an image."""

    name: str
    images: Tensor
    errors: Tensor

    @property
    def figures(self) -> dict[str, float]:
        """Over all images."""
        return error_figures(self.errors.square())


@dataclass
class Exam:
    """What solvers are asked: the images of seeds 0, 1, ..., as `train.py test` has them.

    Args:
        denoiser: the teacher's network, guidance included.
        teacher: its solver.
        num_images: how many.
        batch_size: images per network call.
    """

    denoiser: Any
    teacher: SolverTable
    num_images: int
    batch_size: int = 32
    _target: Tensor | None = field(default=None, init=False)
    _classical: dict[int, Taken | None] = field(default_factory=dict, init=False)

    @property
    def target(self) -> Tensor:
        """The teacher's images."""
        if self._target is None:
            self._target = self._images(self.denoiser, self.teacher)
        return self._target

    def take(self, name: str, table: SolverTable, denoiser: Any = None) -> Taken:
        """A solver's images, by the teacher's network or a student."""
        images = self._images(denoiser or self.denoiser, table)
        return Taken(name, images, (images - self.target).double().flatten(1).square().mean(1).sqrt())

    def classical(self, calls: int) -> Taken | None:
        """The best solver of those known by name with as many network calls; None where none has so many."""
        if calls not in self._classical:
            taken = [self.take(name, table) for name, table in self._tables(calls).items()]
            self._classical[calls] = min(taken, key=lambda one: one.figures["median"], default=None)
        return self._classical[calls]

    def row(self, taken: Taken, calls: int) -> tuple[list[Any], list[Any]]:
        """Figures in the order of COLUMNS, and pictures in the order of PICTURES; None for what there is not."""
        rival, found = self.classical(calls), taken.figures
        best = [None, None] if rival is None else [rival.name, rival.figures["median"]]
        shown = [self.target, None if rival is None else rival.images, taken.images]
        return [taken.name, calls, *(found[name] for name in COLUMNS[2:6]), *best], [*map(self._picture, shown)]

    def _tables(self, calls: int) -> dict[str, SolverTable]:
        schedule, found = self.denoiser.schedule, {}
        steps, rest = divmod(calls, calls_per_row(self.denoiser))
        for name in baseline_names(schedule) if not rest else ():
            try:
                table = named_solver(f"{name}:{steps}", schedule)
            except ValueError:
                continue  # a solver that has no table of so few steps
            if network_calls(table, self.denoiser) == calls:
                found[f"{name}:{steps}"] = table
        return found

    def _images(self, denoiser: Any, table: SolverTable) -> Tensor:
        return generate(denoiser, table, range(self.num_images), batch_size=self.batch_size)

    def _picture(self, states: Tensor | None) -> Any:
        if states is None:
            return None
        from evaluation.pictures import image_grid

        images = as_images(self.denoiser, states[:SHOWN])
        return image_grid(images, columns=len(images))
