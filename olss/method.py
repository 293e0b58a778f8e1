"""OLSS as a method: one epoch per table row, for all budgets of network calls and all kinds of weights at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data.teacher_data import Wanted
from olss.fitting import Solvers
from olss.run import BASES
from solvers import Bands, Plain
from solvers.space import Space
from training.method import Method, Run

PATHS = ("uniform", "log_snr", "greedy", "search")
WEIGHTS = ("numbers", "channels", "bands")
LAST_ROWS = ("fitted", "data")


@dataclass(frozen=True)
class OLSS(Method):
    """Learns solvers of few network calls from a teacher's cached trajectories, by least squares.

    With the basis `own` a fit takes one epoch per row; the teacher basis and the greedy path take one epoch before,
    which collects the triangular factor of all trajectories. Processes share the trajectories; factors are merged at
    the end of each epoch. Of the trajectories held out, the first half chooses (the plan of calls, the kind of
    weights), the second half only reports. Training stops by itself when every solver is complete.

    Args:
        calls: numbers of network calls to learn a solver for. Where the trajectories hold both branches of guidance, a
            row that is guided costs two, and `search` finds out which rows need the unconditional call.
        basis: `own`: a row's basis holds the solver's own outputs; `teacher`: the teacher's, as in the paper.
        path: which teacher states the solver visits. `uniform` in the index; `log_snr`: uniform in log(alpha / sigma);
            `greedy`: the paper's search; `search`: path and calls by what they are worth on trajectories held out; or
            the indices themselves, for a single number of calls. All but `search` make every row's calls.
        weights: `numbers`; `channels`, a channel matrix; `bands`, one for each band of spatial frequencies; or `auto`,
            the kind that is best on trajectories held out.
        edges: of the bands, in cycles per pixel.
        ridge: penalty on the weights, mean squared error + ridge * sum of squares; of matrices, on their distance to
            the best numbers.
        last_row: `fitted`, as in the paper, or `data`: the data that the network predicts at the last node, as in every
            classical solver, so that no grain of earlier outputs is left in flat parts of an image.
        search_trajectories: trajectories that `search` fits each candidate on, and judges it on.
        search_rounds: rounds of local moves of `search`.
    Raises:
        ValueError: an option out of its range.
    Source: arXiv 2305.14677; the own basis, calls and operators are this project's.
    """

    calls: int | list[int] = 8
    basis: str = "own"
    path: str | list[int] = "greedy"
    weights: str = "numbers"
    edges: tuple[float, ...] = (0.06, 0.12, 0.25)
    ridge: float = 0.0
    last_row: str = "fitted"
    search_trajectories: int = 64
    search_rounds: int = 3

    name: ClassVar[str] = "olss"
    wanted: ClassVar[Wanted] = Wanted("path", batch_size=32, in_order=True)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("basis", self.basis, BASES),
            ("path", self.path, PATHS),
            ("weights", self.weights, (*WEIGHTS, "auto")),
            ("last_row", self.last_row, LAST_ROWS),
        ):
            if isinstance(value, str) and value not in allowed:
                hint = ", or a list of indices" if name == "path" else ""
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(allowed)}{hint}")
        if isinstance(self.path, list) and len(self.budgets) > 1:
            raise ValueError(f"one path was given for several numbers of calls, {self.budgets}: give one of them")
        if self.path == "search" and self.basis == "teacher":
            raise ValueError("path search fits solvers on their own outputs: use basis own, or path greedy")
        if self.last_row == "data" and self.basis == "teacher":
            raise ValueError("the data predicted at the solver's own last state is no teacher's output: use basis own")
        if not self.ridge >= 0:
            raise ValueError(f"ridge is {self.ridge}: it must be 0 or more")
        Bands(tuple(self.edges), 1)

    @property
    def budgets(self) -> list[int]:
        """The numbers of network calls, ascending."""
        return sorted({self.calls} if isinstance(self.calls, int) else set(self.calls))

    @property
    def artifacts(self) -> list[str]:
        """olss-<calls>."""
        return [f"olss-{calls}" for calls in self.budgets]

    @property
    def needs_columns(self) -> bool:
        """Whether the path or the rows come from all of the teacher's columns."""
        return self.basis == "teacher" or self.path == "greedy"

    def begin(self, run: Run) -> Solvers:
        """No row fitted yet."""
        return Solvers(self, run)

    def spaces(self, sample_shape: Sequence[int]) -> dict[str, Space]:
        """What weights may be, for samples of a shape, (C, ..., height, width).

        Raises:
            ValueError: matrices asked for samples without channels, height and width.
        """
        channels = sample_shape[0] if len(sample_shape) >= 3 else 0
        if not channels and self.weights in ("channels", "bands"):
            raise ValueError(f"weights {self.weights} need samples (C, ..., height, width), not {tuple(sample_shape)}")
        kinds = WEIGHTS if self.weights == "auto" and channels else (self.weights,)
        known = {"numbers": Plain(), "channels": Bands((), channels or 1)}
        known["bands"] = Bands(tuple(self.edges), channels or 1)
        known["auto"] = known["numbers"]
        return {kind: known[kind] for kind in kinds if not (kind == "channels" and channels == 1 and len(kinds) > 1)}
