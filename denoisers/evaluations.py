"""What a piece of work costs: one count of network evaluations and one weight for each kind."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.protocol import DenoiserWrapper
from solvers.table import SolverTable

WEIGHTS = {"forward": 1, "backward": 2, "tangent": 1}


@dataclass
class Evaluations:
    """Network evaluations spent, each of one sample, by kind.

        calls = calls_each (forward + 2 backward + tangent)

    Args:
        forward, backward, tangent: how many of each kind; a tangent is one direction of forward-mode derivatives.
        calls_each: network calls of one evaluation, see `of`.
    """

    forward: int = 0
    backward: int = 0
    tangent: int = 0
    calls_each: int = 1

    @classmethod
    def of(cls, denoiser: Any) -> "Evaluations":
        """None yet; a guided denoiser, whose `calls_per_evaluation` is 2, makes two calls for each."""
        return cls(calls_each=calls_per_row(denoiser))

    @property
    def calls(self) -> int:
        """Network calls that cost as much."""
        return self.calls_each * sum(weight * getattr(self, kind) for kind, weight in WEIGHTS.items())

    def record(self) -> dict[str, int]:
        """As artifacts state them."""
        return {kind: getattr(self, kind) for kind in WEIGHTS} | {"calls": self.calls}

    def summed(self, over_processes: Callable[[Tensor], Tensor]) -> "Evaluations":
        """Those of all processes together."""
        counts = over_processes(torch.tensor([getattr(self, kind) for kind in WEIGHTS]))
        return replace(self, **dict(zip(WEIGHTS, counts.tolist())))


def calls_per_row(denoiser: Any) -> int:
    """Network calls of one evaluation of a denoiser: two where guidance is inside."""
    return getattr(denoiser, "calls_per_evaluation", 1)


def network_calls(table: SolverTable, denoiser: Any) -> int:
    """What a solver costs with a denoiser: the calls of the table, which guidance inside the denoiser doubles."""
    return table.nfe * (1 if table.has_branches else calls_per_row(denoiser))


def unguided(denoiser: Any) -> Any:
    """The network inside a guided denoiser, any other as it is."""
    return getattr(denoiser, "unguided", denoiser)


class Counted(DenoiserWrapper):
    """A denoiser that counts its forward evaluations."""

    def __init__(self, denoiser: nn.Module, evaluations: Evaluations) -> None:
        super().__init__(denoiser)
        self.evaluations = evaluations

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The denoiser's output."""
        self.evaluations.forward += len(x)
        return self.denoiser(x, timestep, condition, **options)
