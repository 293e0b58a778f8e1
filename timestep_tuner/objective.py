"""How well the timesteps fit: one loss per row of the table.

A row moves from state i to state i+1. Its loss compares what the network says before and after (`noise`, the paper's),
or where the row ends with where the teacher is (`trajectory`). States i come from the solver itself, run with the
timesteps so far (sequential), or from the data, for all rows at once (parallel).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data.shards import Trajectories
from denoisers import Evaluations, index_condition
from solvers import NoiseSchedule, SolverTable, row_noise, sample, sample_trace
from solvers.executor import told_node
from solvers.prediction import to_noise
from timestep_tuner.ratios import Ratios
from training.arguments import check_choice

OBJECTIVES = ("noise", "trajectory")
STRATEGIES = ("parallel", "sequential")


@dataclass(frozen=True)
class Rows:
    """Rows to try timesteps on, and all that stays the same while they are tried.

    Args:
        index: which rows.
        states: of rows 0, 1, ..., at least up to the last of `index`: (rows, batch, *shape).
        history: outputs of rows 0, 1, ... for later rows; None: the outputs of the rows as they are tried.
        aim: what the residuals are differences from, (len(index), batch, *shape).
        examples: where the states come from.
    """

    index: list[int]
    states: Tensor
    history: Tensor | None
    aim: Tensor
    examples: Trajectories


@dataclass
class Objective:
    """Losses of the rows of a table under some timesteps.

    noise:       || F(x[i], t[i]) - F(x[i+1], t[i+1]) ||^2, the first F without gradient; F is the noise the network
                 predicts, read from its output at the node of the state, whatever its prediction type
    trajectory:  || x[i+1] - the teacher's state at node i+1 ||^2

    Both summed over elements and averaged over the batch. Of row i only output i is told tau[i] with gradient;
    outputs of earlier rows, which multistep tables use, are told their own tau without.

    Args:
        denoiser: the frozen network.
        ratios: the base table.
        schedule: the denoiser's.
        kind: `noise` or `trajectory`.
    Raises:
        ValueError: an unknown kind, a stochastic table with `trajectory`, or a free last row whose end says nothing
            about the noise (`sample` predictions at sigma = 0).
    Source: arXiv 2310.09469, algorithm 1; the trajectory objective and multistep tables are this project's.
    """

    denoiser: Any
    ratios: Ratios
    schedule: NoiseSchedule
    kind: str = "noise"
    evaluations: Evaluations = field(init=False)

    def __post_init__(self) -> None:
        self.evaluations = Evaluations.of(self.denoiser)
        check_choice("objective", self.kind, OBJECTIVES)
        if self.kind == "trajectory" and self.base.is_stochastic:
            raise ValueError("this solver adds noise in its rows, the teacher's path does not: use objective noise")
        at_data = self.ratios.free_last and not bool(self.base.sigma[-1])
        if self.kind == "noise" and self.base.prediction_type == "sample" and at_data:
            raise ValueError("a data prediction at sigma = 0 says nothing about the noise: leave free_last off")

    @property
    def base(self) -> SolverTable:
        """The table as it was."""
        return self.ratios.base

    def parallel(self, timesteps: Tensor, examples: Trajectories) -> Tensor:
        """Losses of all tuned rows, (size,), from states on the data; one network call has all rows as its batch."""
        return squared(self.residuals(self.rows_on_data(examples), timesteps)).mean(1)

    def sequential(self, timesteps: Tensor, examples: Trajectories, row: int | None = None) -> Tensor:
        """Loss of one row, (1,), or of all, (size,), from the states of the solver with these timesteps."""
        return squared(self.residuals(self.rows_of_run(timesteps, examples, row), timesteps)).mean(1)

    @torch.no_grad()
    def rows_on_data(self, examples: Trajectories, timesteps: Tensor | None = None) -> "Rows":
        """All tuned rows, from states on the data.

        Args:
            examples: what they are tried on.
            timesteps: (N,), of the outputs that later rows use as their history, whatever the rows themselves are told
                when they are tried; default: what they are told then, which saves network calls.
        """
        index, states, history = list(range(self.ratios.size)), self._on_data(examples), None
        if timesteps is not None and bool(self.base.output_coef.tril(-1).any()):
            history = self._call(states, timesteps[index], index, examples)
        return Rows(index, states, history, self._aim(states, index, examples), examples)

    @torch.no_grad()
    def rows_of_run(self, timesteps: Tensor, examples: Trajectories, row: int | None = None) -> "Rows":
        """One row, or all, from the states of the solver with these timesteps."""
        index = list(range(self.ratios.size)) if row is None else [row]
        states, history = self._run(timesteps.detach(), examples, index[-1])
        return Rows(index, states, history, self._aim(states, index, examples), examples)

    @torch.no_grad()
    def end_loss(self, timesteps: Tensor, examples: Trajectories) -> Tensor:
        """|| image - the teacher's image ||^2 of the solver from the teacher's noise, (batch,); `timesteps` (N,)."""
        table = replace(self.base, timesteps=timesteps)
        image = sample(self.denoiser, table, examples.noise, examples.condition, seeds=examples.seeds)
        self.evaluations.forward += table.nfe * len(examples)
        return squared((image - examples.end)[None])[0]

    def residuals(self, rows: "Rows", timesteps: Tensor) -> Tensor:
        """What the losses are the squares of, (rows, batch, *shape); `timesteps` (N,)."""
        index, after = rows.index, [row + 1 for row in rows.index]
        output = self._call(rows.states[index], timesteps[index], index, rows.examples)
        self._count_backward(output)
        history = output.detach() if rows.history is None else rows.history
        end = self._end(index, rows.states, history, output, rows.examples)
        if self.kind == "trajectory":
            return end - rows.aim
        self._count_backward(end)
        return self._noise(end, self._node_timesteps()[after], after, rows.examples) - rows.aim

    def _aim(self, states: Tensor, rows: list[int], examples: Trajectories) -> Tensor:
        """What the rows should lead to: (rows, batch, *shape)."""
        if self.kind == "noise":
            return self._noise(states[rows], self.base.timesteps[rows], rows, examples)
        return _stack(examples.at(self.base.alpha[row + 1], self.base.sigma[row + 1]) for row in rows)

    def _count_backward(self, output: Tensor) -> None:
        self.evaluations.backward += output.shape[0] * output.shape[1] * output.requires_grad

    def _end(self, rows: list[int], states: Tensor, known: Tensor, output: Tensor, examples: Trajectories) -> Tensor:
        """States after `rows`: (rows, batch, *shape). `known` are the outputs of rows 0, 1, ... without gradient."""
        table = self.base
        earlier = table.output_coef.tril(-1)[rows, : len(known)]
        own = table.output_coef.diagonal()[rows].to(output).reshape(-1, *[1] * (output.ndim - 1))
        mix = table.space.mix
        end = (
            mix(table.state_coef[rows, : len(states)].to(states), states)
            + mix(earlier.to(states), known)
            + own * output
        )
        if table.is_stochastic:
            shape = states.shape[2:]
            fresh = _stack(row_noise(examples.seeds, j, shape).to(states) for j in range(rows[-1] + 1))
            end = end + mix(table.noise_coef[rows, : len(fresh)].to(states), fresh)
        return end

    def _on_data(self, examples: Trajectories) -> Tensor:
        """States of all tuned rows, (size, batch, *shape): data and noise, or the teacher's, at the nodes."""
        nodes = list(zip(self.base.alpha, self.base.sigma))[: self.ratios.size]
        if self.kind == "noise":
            return _stack(float(alpha) * examples.end + float(sigma) * examples.noise for alpha, sigma in nodes)
        return _stack([self._start(examples), *(examples.at(*node) for node in nodes[1:])])

    def _start(self, examples: Trajectories) -> Tensor:
        """State 0 of a run: with the data's part in it, as in training, or the sampler's own."""
        if self.kind == "trajectory":
            return self.base.start_scale * examples.noise
        return float(self.base.alpha[0]) * examples.end + float(self.base.sigma[0]) * examples.noise

    @torch.no_grad()
    def _run(self, timesteps: Tensor, examples: Trajectories, row: int) -> tuple[Tensor, Tensor]:
        """States 0 .. row and outputs 0 .. row-1 of the solver with these timesteps."""
        start = self._start(examples)
        if not row:
            return start[None], start[None][:0]
        noise = start / self.base.start_scale
        head = first_rows(self.ratios.base, timesteps, row)
        trace = sample_trace(self.denoiser, head, noise, examples.condition, seeds=examples.seeds)
        self.evaluations.forward += row * len(examples)
        return _stack(trace.states), _stack(trace.outputs)

    def _noise(self, states: Tensor, timesteps: Tensor, nodes: list[int], examples: Trajectories) -> Tensor:
        """Predicted noise, (rows, batch, *shape)."""
        outputs = self._call(states, timesteps, nodes, examples)
        alpha, sigma = (value[nodes].repeat_interleave(len(examples)) for value in (self.base.alpha, self.base.sigma))
        noise = to_noise(self.base.prediction_type, states.flatten(0, 1), outputs.flatten(0, 1), alpha, sigma)
        return noise.unflatten(0, outputs.shape[:2])

    def _call(self, states: Tensor, timesteps: Tensor, nodes: list[int], examples: Trajectories) -> Tensor:
        """The network at (rows, batch, *shape), all in one batch; timesteps and nodes are per row."""
        rows, batch = states.shape[:2]
        told = timesteps.to(states).repeat_interleave(batch)
        condition = index_condition(examples.condition, torch.arange(batch).repeat(rows))
        self.evaluations.forward += rows * batch
        node = told_node(self.denoiser, self.base, torch.tensor(nodes).repeat_interleave(batch))
        output = self.denoiser(states.flatten(0, 1), told, condition, **node)
        return output.to(states.dtype).unflatten(0, (rows, batch))

    def _node_timesteps(self) -> Tensor:
        """What the network is told at each node when nothing is tuned, (N+1,): the image's by the schedule."""
        last = self.schedule.timestep(self.base.alpha[-1:], self.base.sigma[-1:])
        return torch.cat([self.base.timesteps, last])


def squared(residuals: Tensor) -> Tensor:
    """Losses of every sample, summed over its elements: (rows, batch)."""
    return residuals.square().flatten(2).sum(2)


def first_rows(table: SolverTable, timesteps: Tensor, rows: int) -> SolverTable:
    """The solver that stops after its first rows, told `timesteps`, (N,)."""
    blocks = ("state_coef", "output_coef", "noise_coef", "state_support", "output_support")
    cut = {name: getattr(table, name)[:rows, :rows] for name in blocks}
    cut |= {name: getattr(table, name)[: rows + 1] for name in ("alpha", "sigma")}
    return replace(table, timesteps=timesteps[:rows], calls=table.calls[:rows], **cut)


def _stack(values: Any) -> Tensor:
    return torch.stack(list(values))
