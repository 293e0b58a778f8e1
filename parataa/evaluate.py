"""The network on the rows of many windows: in batches, and on several processes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parataa.equations import Equations
from parataa.iteration import Iterate
from parataa.processes import gather, own_share
from solvers.conditions import index_condition
from solvers.sampler import Denoiser


class Evaluator:
    """Calls the network on all rows of a round.

    Args:
        denoiser: as `parallel_sample` takes it.
        condition: of the whole batch.
        batch_size: most rows of one call; None: all of this process.
        group: processes that share the rows; None: this one alone.
    """

    def __init__(
        self, denoiser: Denoiser, condition: Any, batch_size: int | None = None, group: ProcessGroup | None = None
    ) -> None:
        self.denoiser, self.condition, self.batch_size, self.group = denoiser, condition, batch_size, group

    def __call__(self, equations: Equations, samples: Sequence[int], iterates: Sequence[Iterate]) -> list[Tensor]:
        """Outputs of each sample's window, (rows, *shape) each.

        Raises:
            ValueError: outputs of another shape, or not finite.
            RuntimeError: another process ended or did not answer in time.
        """
        counts = [len(iterate.states) - 1 for iterate in iterates]
        states = torch.cat([iterate.states[:-1] for iterate in iterates])
        sample = torch.tensor(samples).repeat_interleave(torch.tensor(counts))
        row = torch.cat([iterate.start + torch.arange(count) for iterate, count in zip(iterates, counts)])
        own = own_share(len(states), self.group)
        outputs = gather(self._batches(equations, states[own], sample[own], row[own]), len(states), self.group)
        _check_finite(outputs, sample, row, equations)
        return list(outputs.split(counts))

    def _batches(self, equations: Equations, states: Tensor, sample: Tensor, row: Tensor) -> Tensor:
        if not len(states):
            return states
        parts = zip(*(values.split(self.batch_size or len(states)) for values in (states, sample, row)))
        return torch.cat([self._call(equations, *part) for part in parts])

    def _call(self, equations: Equations, states: Tensor, sample: Tensor, row: Tensor) -> Tensor:
        table = equations.table
        node = {"node": (table.alpha[row], table.sigma[row])} if getattr(self.denoiser, "needs_node", False) else {}
        output = self.denoiser(states, table.timesteps[row].to(states), index_condition(self.condition, sample), **node)
        if output.shape != states.shape:
            raise ValueError(f"the denoiser returned shape {tuple(output.shape)} for states {tuple(states.shape)}")
        return output.to(states)


def _check_finite(outputs: Tensor, sample: Tensor, row: Tensor, equations: Equations) -> None:
    wrong = (~torch.isfinite(outputs.flatten(1)).all(dim=1)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"the denoiser returned values that are not finite for {len(wrong)} of {len(outputs)} rows, first for "
            f"sample {int(sample[first])} at row {int(row[first])}, timestep "
            f"{float(equations.table.timesteps[row[first]]):g}: check the network's precision and its inputs"
        )
