"""SolverTable: every fast sampler as the same small object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from solvers import views
from solvers.calls import CONDITIONAL, UNCONDITIONAL, Call, check_calls, one_call_a_row
from solvers.errors import SolverError
from solvers.executor import OUTPUT, STATE, Row, plan_rows
from solvers.prediction import check_prediction_type
from solvers.space import Plain, Space
from solvers.views import CanonicalTable, Consistency


@dataclass(frozen=True, eq=False)
class SolverTable:
    """What the network sees and is told at every call, and how the next state is combined.

        output[k]  = network(state[calls[k].row], timesteps[calls[k].row], calls[k].branch of the condition)
        state[i+1] = sum_j state_coef[i,j] state[j] + sum_k output_coef[i,k] output[k] + sum_j noise_coef[i,j] noise[j],
                     j <= i, calls[k].row <= i

    Index 0 is pure noise (state[0] = start_scale * unit noise), index N the image; N is the number of rows, K that of
    network calls. Most tables make one conditional call a row. A weight is a number, or what `space` says (*ops). All
    tensors are float64 on the CPU and may require grad.

    Args:
        timesteps: (N,) what the network is told, in the checkpoint's units; may be fractional.
        alpha, sigma: (N+1,) where state i really is, x = alpha * data + sigma * noise.
        state_coef, noise_coef: (N, N, *ops), lower triangular.
        output_coef: (N, K, *ops), zero where the call comes after the row.
        start_scale: scale of state 0.
        prediction_type: what an output is, by diffusers' names.
        calls: K network calls in the order of their rows; default one conditional call a row.
        space: what a weight is.
        state_support, output_support: (N, N) and (N, K) bool, which states and outputs a row may use; default
            coef != 0. A trainable table states them, because a coefficient that starts at zero still gets its gradient.
        info: metadata of the artifact the table came from; never used in computation.
    Raises:
        ValueError: a wrong shape or dtype, an entry of a later state or call, outside the support or not finite, N < 1,
            an unknown prediction type, calls out of order or outside the table.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    state_coef: Tensor
    output_coef: Tensor
    noise_coef: Tensor
    start_scale: float
    prediction_type: str
    calls: tuple[Call, ...] = ()
    space: Space = Plain()  # noqa: RUF009 - frozen
    state_support: Tensor = field(default=None)  # type: ignore[assignment]
    output_support: Tensor = field(default=None)  # type: ignore[assignment]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        if not self.calls:
            object.__setattr__(self, "calls", one_call_a_row(self.num_rows))
        _check_shapes(self)
        for name in ("state", "output"):
            used, support = self.used(f"{name}_coef"), getattr(self, f"{name}_support")
            if support is None:
                object.__setattr__(self, f"{name}_support", used)
            else:
                _check_support(name, used, support, self.reachable(f"{name}_coef"))
        if not (torch.isfinite(torch.tensor(self.start_scale)) and self.start_scale > 0):
            raise ValueError(f"start_scale is {self.start_scale}: it must be finite and positive")

    @property
    def num_rows(self) -> int:
        """Number of rows, N: of states the network sees."""
        return len(self.timesteps) if self.timesteps.ndim == 1 else 0

    @property
    def nfe(self) -> int:
        """Number of network calls, K: what a solver costs."""
        return len(self.calls)

    @property
    def is_stochastic(self) -> bool:
        """Whether a fresh noise enters any row."""
        return bool(self.used("noise_coef").any())

    @property
    def has_branches(self) -> bool:
        """Whether the table makes the calls of guidance itself."""
        return any(call.branch != CONDITIONAL for call in self.calls)

    @property
    def has_own_calls(self) -> bool:
        """Whether any row makes other calls than one conditional call, which is all that a scheduler sees."""
        return self.calls != one_call_a_row(self.num_rows)

    @property
    def is_plain(self) -> bool:
        """Whether weights are numbers and every row makes one conditional call."""
        return isinstance(self.space, Plain) and not self.has_own_calls

    def require_plain(self, who: str) -> None:
        """Raise SolverError when `who`, which sees one output a row and weighs by numbers, cannot run this table."""
        if not self.is_plain:
            has = "weights per frequency band" if self.space.ops else "network calls of its own"
            raise SolverError(
                f"{who} cannot run this solver, which has {has}: use solvers.sample, sample.py or the NumPy export"
            )

    @cached_property
    def call_rows(self) -> Tensor:
        """Row of each call, int64 (K,)."""
        return torch.tensor([call.row for call in self.calls])

    @cached_property
    def plan(self) -> tuple[Row, ...]:
        """What each row evaluates, combines and forgets."""
        return plan_rows(self.calls, (self.state_support, self.output_support, self.used("noise_coef")))

    def guided(self, guidance_scale: float, rows: Sequence[int] | None = None) -> "SolverTable":
        """The same solver with guidance as weights: each conditional call becomes two, u + g (c - u).

        Args:
            guidance_scale: g; the conditional outputs get g times the weight, the unconditional ones 1 - g.
            rows: where; default all. A row left out goes on with its conditional output alone.
        Raises:
            ValueError: a table that makes other calls than conditional ones.
        """
        if self.has_branches:
            raise ValueError("this solver is guided already: its calls have branches of their own")
        chosen = set(range(self.num_rows) if rows is None else rows)
        calls, columns, weights = [], [], []
        for column, call in enumerate(self.calls):
            split = call.row in chosen
            calls += [call, Call(call.row, UNCONDITIONAL)][: 1 + split]
            columns += [column] * (1 + split)
            weights += [guidance_scale, 1 - guidance_scale] if split else [1.0]
        weight = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * len(self.space.ops))
        return replace(
            self,
            calls=tuple(calls),
            output_coef=self.output_coef[:, columns] * weight + 0.0,  # no negative zeros
            output_support=self.output_support[:, columns],
        )

    def used(self, name: str) -> Tensor:
        """Which weights of a block, such as `state_coef`, are not zero: bool (N, columns)."""
        return (getattr(self, name).detach() != 0).flatten(2).any(2) if self.space.ops else getattr(self, name) != 0

    def reachable(self, name: str) -> Tensor:
        """Which columns of a block, such as `output_coef`, a row may use: bool (N, columns)."""
        columns = self.call_rows if name == "output_coef" else torch.arange(self.num_rows)
        return columns <= torch.arange(self.num_rows)[:, None]

    def scalar_part(self) -> "SolverTable":
        """The table of numbers nearest to this one: what diagnostics and pictures of an operator table show."""
        if isinstance(self.space, Plain):
            return self
        names = ("state_coef", "output_coef", "noise_coef")
        return replace(self, space=Plain(), **{name: self.space.mean(getattr(self, name)) for name in names})

    def canonical(self) -> CanonicalTable:
        """Every state in the start noise, the outputs and the fresh noises alone, by forward substitution."""
        return views.canonical(self)

    def local(self, order: int, start: int = 0) -> "SolverTable":
        """The same solver with each row reaching back `order` rows instead of one.

        State i is written without the states i-1, ..., i-order+1, by substituting their rows; states up to index
        `start` are never substituted. A one-step table then holds state i-order and the outputs since; a
        multistep one may keep a few older states and outputs. Order 1 is the table itself, order N Picard iteration.

        Args:
            order: rows to reach back, 1 <= order <= N.
            start: last state that is frozen, 0 <= start < N.
        Raises:
            ValueError: order or start outside its range.
        Source: arXiv 2402.09970, eq. 9, for any linear table instead of DDIM.
        """
        return views.local(self, order, start)

    def last_use(self) -> tuple[list[int], list[int], list[int]]:
        """Last row that uses state j, output k and noise j, by the supports; -1 where none does: (N,), (K,), (N,)."""
        supports = (self.state_support, self.output_support, self.used("noise_coef"))
        rows = torch.arange(1, self.num_rows + 1)[:, None]
        states, outputs, noises = ((rows * support).amax(0).sub(1).tolist() for support in supports)
        return states, outputs, noises

    def unused_evaluations(self) -> list[int]:
        """Calls whose output never reaches the final state (a diagnostic: such a call is made in vain)."""
        needed, used = {self.num_rows}, set()
        for row in reversed(self.plan):
            if row.index + 1 in needed:
                reached = {column for block, column in row.terms if block == OUTPUT}
                used |= reached
                needed |= {self.calls[column].row for column in reached}  # an output needs its state
                needed |= {column for block, column in row.terms if block == STATE}
        return [column for column in range(self.nfe) if column not in used]

    def consistency(self) -> Consistency:
        """How well the rows keep to the table's own nodes when every output is perfect.

        State 0 gets the data part alpha[0] and the noise vector sigma[0] e, each output the parts its own node
        implies, each fresh noise an axis of its own.

        Returns:
            Data part and norm of the noise part of states 1..N minus alpha and sigma there: (N,) each.
        """
        return views.consistency(self)

    def noise_amplification(self) -> float:
        """Standard deviation of the image when every output has an independent error of unit variance."""
        last = self.canonical().output[-1].detach()
        return float(last.norm()) / (self.space.ops[0] * self.space.ops[1] if self.space.ops else 1) ** 0.5

    def noise_level_rises(self) -> list[int]:
        """Rows after which sigma / alpha is higher than before, beyond rounding (PNDM's warm-up, restart samplers)."""
        angle = torch.atan2(self.sigma, self.alpha).detach()
        return [i for i in range(self.num_rows) if angle[i + 1] > angle[i] + 1e-6]

    def detach(self) -> "SolverTable":
        """The same numbers without gradients."""
        names = ("timesteps", "alpha", "sigma", "state_coef", "output_coef", "noise_coef")
        return replace(self, **{name: getattr(self, name).detach().clone() for name in names})


def _check_shapes(table: SolverTable) -> None:
    n = table.num_rows
    if n < 1:
        raise ValueError(f"timesteps have shape {tuple(table.timesteps.shape)}: a table needs (N,) with N >= 1")
    check_calls(table.calls, n)
    ops = table.space.ops
    shapes = {"timesteps": (n,), "alpha": (n + 1,), "sigma": (n + 1,), "state_coef": (n, n, *ops)}
    shapes |= {"output_coef": (n, table.nfe, *ops), "noise_coef": (n, n, *ops)}
    for name, shape in shapes.items():
        value = getattr(table, name)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: a table of {n} rows needs {shape}")
        if value.dtype != torch.float64 or value.device.type != "cpu":
            raise ValueError(f"{name} is {value.dtype} on {value.device}: tables are float64 on the CPU")
        if not bool(torch.isfinite(value.detach()).all()):
            raise ValueError(f"{name} has entries that are not finite")
        if name.endswith("coef") and bool((table.used(name) & ~table.reachable(name)).any()):
            raise ValueError(
                f"{name} has entries above the diagonal: row i may only use indices and calls of rows 0 to i"
            )


def _check_support(name: str, used: Tensor, support: Tensor, reached: Tensor) -> None:
    if support.shape != used.shape or support.dtype != torch.bool or bool((support & ~reached).any()):
        raise ValueError(f"{name}_support must be a lower-triangular bool tensor of shape {tuple(used.shape)}")
    if bool((used & ~support).any()):
        raise ValueError(f"{name}_coef has entries outside {name}_support")
