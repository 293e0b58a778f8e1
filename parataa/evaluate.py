"""The network calls of many windows: in batches, and on several processes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parataa.equations import Equations
from parataa.iteration import Iterate
from parataa.processes import gather, own_share
from solvers.conditions import concatenate_conditions, condition_length, index_condition
from solvers.executor import Denoiser, branch_conditions, called, told_node
from solvers.table import SolverTable


class Evaluator:
    """Makes the network calls at all rows of a round.

    Args:
        denoiser: as `parallel_sample` takes it.
        table: the solver.
        condition: of the whole batch.
        batch_size: most calls in one batch; None: all of this process.
        group: processes that share the calls; None: this one alone.
    Raises:
        ValueError: a call that the denoiser cannot make.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        table: SolverTable,
        condition: Any,
        batch_size: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self._denoiser, self._table = called(denoiser, table), table.detach()
        self._batch_size, self._group = batch_size, group
        conditions = branch_conditions(self._denoiser, table, condition)
        first = {branch: number * (condition_length(condition) or 0) for number, branch in enumerate(conditions)}
        self._conditions = concatenate_conditions(list(conditions.values()))
        self._first = torch.tensor([first[call.branch] for call in table.calls])

    def __call__(self, equations: Equations, samples: Sequence[int], iterates: Sequence[Iterate]) -> list[Tensor]:
        """Outputs of each sample's window, (calls, *shape) each.

        Raises:
            ValueError: outputs of another shape, or not finite.
            RuntimeError: another process ended or did not answer in time.
        """
        windows = [equations.at(iterate.start) for iterate in iterates]
        counts = [len(window.calls) for window in windows]
        states = torch.cat([iterate.states[window.seen] for iterate, window in zip(iterates, windows)])
        sample = torch.tensor(samples).repeat_interleave(torch.tensor(counts))
        call = torch.tensor([column for window in windows for column in window.calls], dtype=torch.int64)
        own = own_share(len(states), self._group)
        outputs = gather(self._batches(states[own], sample[own], call[own]), len(states), self._group)
        self._check_finite(outputs, sample, call)
        return list(outputs.split(counts))

    def _batches(self, states: Tensor, sample: Tensor, call: Tensor) -> Tensor:
        if not len(states):
            return states
        parts = zip(*(values.split(self._batch_size or len(states)) for values in (states, sample, call)))
        return torch.cat([self._call(*part) for part in parts])

    def _call(self, states: Tensor, sample: Tensor, call: Tensor) -> Tensor:
        table, row = self._table, self._table.call_rows[call]
        condition = index_condition(self._conditions, self._first[call] + sample)
        output = self._denoiser(
            states, table.timesteps[row].to(states), condition, **told_node(self._denoiser, table, row)
        )
        if output.shape != states.shape:
            raise ValueError(f"the denoiser returned shape {tuple(output.shape)} for states {tuple(states.shape)}")
        return output.to(states)

    def _check_finite(self, outputs: Tensor, sample: Tensor, call: Tensor) -> None:
        wrong = (~torch.isfinite(outputs.flatten(1)).all(dim=1)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            row = self._table.calls[call[first]].row
            raise ValueError(
                f"the denoiser returned values that are not finite in {len(wrong)} of {len(outputs)} calls, first for "
                f"sample {int(sample[first])} at row {row}, timestep {float(self._table.timesteps[row]):g}: check the "
                "network's precision and its inputs"
            )
