"""SolverTable: every fast sampler as the same small object."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from solvers.prediction import check_prediction_type, output_weights


@dataclass(frozen=True, eq=False)
class SolverTable:
    """What the network sees and is told at every evaluation, and how the next state is combined.

        output[i]  = network(state[i], timesteps[i], condition)
        state[i+1] = sum_j state_coef[i,j] state[j] + output_coef[i,j] output[j] + noise_coef[i,j] noise[j],   j <= i

    Index 0 is pure noise (state[0] = start_scale * unit noise), index N the image; N is the number of network
    evaluations (NFE). All tensors are float64 on the CPU and may require grad.

    Args:
        timesteps: (N,) what the network is told, in the checkpoint's units; may be fractional.
        alpha, sigma: (N+1,) where state i really is, x = alpha * data + sigma * noise.
        state_coef, output_coef, noise_coef: (N, N), lower triangular.
        start_scale: scale of state 0.
        prediction_type: what an output is, by diffusers' names.
        state_support, output_support: (N, N) bool, which states and outputs a row may use; default coef != 0. A
            trainable table states them, because a coefficient that starts at zero still gets its gradient.
        info: metadata of the artifact the table came from; never used in computation.
    Raises:
        ValueError: a wrong shape or dtype, an entry above the diagonal, outside the support or not finite, N < 1,
            an unknown prediction type.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    state_coef: Tensor
    output_coef: Tensor
    noise_coef: Tensor
    start_scale: float
    prediction_type: str
    state_support: Tensor = field(default=None)  # type: ignore[assignment]
    output_support: Tensor = field(default=None)  # type: ignore[assignment]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        _check_shapes(self)
        for name in ("state", "output"):
            coef, support = getattr(self, f"{name}_coef").detach(), getattr(self, f"{name}_support")
            if support is None:
                object.__setattr__(self, f"{name}_support", coef != 0)
            else:
                _check_support(name, coef, support)
        if not (torch.isfinite(torch.tensor(self.start_scale)) and self.start_scale > 0):
            raise ValueError(f"start_scale is {self.start_scale}: it must be finite and positive")

    @property
    def nfe(self) -> int:
        """Number of network evaluations, N."""
        return len(self.timesteps)

    @property
    def is_stochastic(self) -> bool:
        """Whether a fresh noise enters any row."""
        return bool((self.noise_coef.detach() != 0).any())

    def canonical(self) -> "CanonicalTable":
        """Every state in the start noise, the outputs and the fresh noises alone, by forward substitution."""
        n = self.nfe
        eye = torch.eye(n, dtype=torch.float64)
        first = torch.zeros(2 * n + 1, dtype=torch.float64)
        first[0] = self.start_scale
        rows = [first]
        for i in range(n):
            fresh = torch.cat(
                [torch.zeros(1, dtype=torch.float64), self.output_coef[i] @ eye, self.noise_coef[i] @ eye]
            )
            rows.append(self.state_coef[i, : i + 1] @ torch.stack(rows) + fresh)
        stacked = torch.stack(rows[1:])
        return CanonicalTable(stacked[:, 0], stacked[:, 1 : n + 1], stacked[:, n + 1 :])

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
        n = self.nfe
        if not 1 <= order <= n:
            raise ValueError(f"order is {order}: a table of {n} rows has orders 1 to {n}")
        if not 0 <= start < n:
            raise ValueError(f"start is {start}: the frozen states of a table of {n} rows are 0 to {n - 1}")
        blocks = torch.stack([self.state_coef, self.output_coef, self.noise_coef], dim=1).detach()
        rows = blocks.clone()
        if order >= n - start:  # nothing but `start` stops the substitution: one triangular system
            rows[start:] = _substituted(rows[start:], start)
        else:
            for back in range(order - 1):
                row = torch.arange(start + 1 + back, n)  # state row - back, all rows at once
                weight = rows[row, 0, row - back]
                rows[row, 0, row - back] = 0
                rows[row] += weight[:, None, None] * blocks[row - back - 1]
        state_coef, output_coef, noise_coef = (block.contiguous() for block in rows.unbind(1))
        return replace(
            self,
            state_coef=state_coef,
            output_coef=output_coef,
            noise_coef=noise_coef,
            state_support=None,
            output_support=None,
        )

    def last_use(self) -> tuple[list[int], list[int], list[int]]:
        """Last row that uses state j, output j and noise j, by the supports; -1 where none does: (N,) each."""
        return _last_use(self.state_support), _last_use(self.output_support), _last_use(self.noise_coef.detach() != 0)

    def unused_evaluations(self) -> list[int]:
        """Rows whose output never reaches the final state (a diagnostic: such a row is evaluated in vain)."""
        n = self.nfe
        states, outputs = self.state_support.tolist(), self.output_support.tolist()
        needed, used = {n}, set()
        for i in reversed(range(n)):
            if i + 1 in needed:
                reached = {j for j in range(n) if outputs[i][j]}
                used |= reached
                needed |= reached | {j for j in range(n) if states[i][j]}  # output j needs state j
        return [i for i in range(n) if i not in used]

    def consistency(self) -> "Consistency":
        """How well the rows keep to the table's own nodes when every output is perfect.

        State 0 gets the data part alpha[0] and the noise vector sigma[0] e, each output the parts its own node
        implies, each fresh noise an axis of its own.

        Returns:
            Data part and norm of the noise part of states 1..N minus alpha and sigma there: (N,) each.
        """
        data, noise = propagate(self, (self.alpha, self.sigma))
        return Consistency(data[1:] - self.alpha[1:], noise[1:] - self.sigma[1:])

    def noise_amplification(self) -> float:
        """Standard deviation of the image when every output has an independent error of unit variance."""
        return float(self.canonical().output[-1].detach().norm())

    def noise_level_rises(self) -> list[int]:
        """Rows after which sigma / alpha is higher than before, beyond rounding (PNDM's warm-up, restart samplers)."""
        angle = torch.atan2(self.sigma, self.alpha).detach()
        return [i for i in range(self.nfe) if angle[i + 1] > angle[i] + 1e-6]

    def detach(self) -> "SolverTable":
        """The same numbers without gradients."""
        names = ("timesteps", "alpha", "sigma", "state_coef", "output_coef", "noise_coef")
        return replace(self, **{name: getattr(self, name).detach().clone() for name in names})


@dataclass(frozen=True)
class CanonicalTable:
    """states 1..N in {unit start noise, outputs, fresh noises}: start (N,), output (N, N), noise (N, N)."""

    start: Tensor
    output: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Consistency:
    """Differences to the nodes of states 1..N: alpha_error (N,), sigma_error (N,)."""

    alpha_error: Tensor
    sigma_error: Tensor

    @property
    def worst(self) -> float:
        """Largest absolute difference."""
        return float(torch.cat([self.alpha_error, self.sigma_error]).abs().max())


def propagate(table: SolverTable, nodes: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Data part and noise norm of all states under perfect outputs, (N+1,) each.

    Args:
        table: the rows; its alpha[0] and sigma[0] are where state 0 starts.
        nodes: (alpha, sigma), (N+1,) each, at which outputs are read; by default the propagated ones (induction),
            which is how the nodes of a table are found when only its rows are known.
    """
    n = table.nfe
    state_coef, output_coef, noise_coef = (c.detach() for c in (table.state_coef, table.output_coef, table.noise_coef))
    states = torch.zeros(n + 1, n + 2, dtype=torch.float64)  # columns: data, start noise, fresh noises
    outputs = torch.zeros(n, n + 2, dtype=torch.float64)
    states[0, :2] = torch.stack([table.alpha[0], table.sigma[0]]).detach()
    for i in range(n):
        norm = states[i, 1:].norm()
        alpha, sigma = (states[i, 0], norm) if nodes is None else (nodes[0][i].detach(), nodes[1][i].detach())
        on_data, on_noise = output_weights(table.prediction_type, alpha, sigma)
        outputs[i, 0] = on_data
        outputs[i, 1:] = on_noise * states[i, 1:] / norm.clamp_min(1e-300)
        states[i + 1] = state_coef[i] @ states[:n] + output_coef[i] @ outputs
        states[i + 1, 2:] += noise_coef[i]
    return states[:, 0], states[:, 1:].norm(dim=1)


def _substituted(rows: Tensor, start: int) -> Tensor:
    """Rows start to N - 1, (N - start, 3, N), without the states after `start`."""
    known, count = rows.clone(), len(rows)
    known[:, 0, start + 1 :] = 0
    matrix = torch.eye(count, dtype=rows.dtype)
    matrix[:, :-1] -= rows[:, 0, start + 1 :]
    solved = torch.linalg.solve_triangular(matrix, known.flatten(1), upper=False, unitriangular=True)
    return solved.reshape(rows.shape)


def _last_use(support: Tensor) -> list[int]:
    n = len(support)
    rows = torch.arange(1, n + 1)[:, None] * support
    return (rows.amax(0) - 1).tolist()


def _check_shapes(table: SolverTable) -> None:
    n = len(table.timesteps) if table.timesteps.ndim == 1 else 0
    if n < 1:
        raise ValueError(f"timesteps have shape {tuple(table.timesteps.shape)}: a table needs (N,) with N >= 1")
    shapes = {"timesteps": (n,), "alpha": (n + 1,), "sigma": (n + 1,)}
    shapes |= dict.fromkeys(("state_coef", "output_coef", "noise_coef"), (n, n))
    for name, shape in shapes.items():
        value = getattr(table, name)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: a table of {n} rows needs {shape}")
        if value.dtype != torch.float64 or value.device.type != "cpu":
            raise ValueError(f"{name} is {value.dtype} on {value.device}: tables are float64 on the CPU")
        if not bool(torch.isfinite(value.detach()).all()):
            raise ValueError(f"{name} has entries that are not finite")
        if len(shape) == 2 and bool(value.detach().triu(1).any()):
            raise ValueError(f"{name} has entries above the diagonal: row i may only use indices 0 to i")


def _check_support(name: str, coef: Tensor, support: Tensor) -> None:
    if support.shape != coef.shape or support.dtype != torch.bool or bool(support.triu(1).any()):
        raise ValueError(f"{name}_support must be a lower-triangular bool tensor of shape {tuple(coef.shape)}")
    if bool(((coef != 0) & ~support).any()):
        raise ValueError(f"{name}_coef has entries outside {name}_support")
