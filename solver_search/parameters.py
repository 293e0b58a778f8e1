"""From a vector of free numbers to a solver table: the one function that training, validation and export call.

Two parametrisations, both frozen `Parameters` (training/method.py).

`PaperParameters` is the paper's (step sizes by a softmax, weights that sum to one); `FreeParameters` corrects every
number of a table that already exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from solvers import NoiseSchedule, SolverTable
from solvers.prediction import data_weights, noise_weights

NEAREST_ONLY_UP_TO = 6  # up to this NFE the paper's last two rows use only the nearest earlier output


@dataclass(frozen=True, eq=False)
class PaperParameters:
    """The paper's parametrisation: theta = (r, c), N step sizes and at most N(N-1)/2 weights.

        time[i] = start + (end - start) cumsum(softmax(r))[i-1],   time[0] = start,   time[N] = end,   set exactly
        flow    x[i+1] = x[i] + (sigma[i+1] - sigma[i]) sum_{j<=i} c[i,j] v[j]                        v = noise - data
        VP      x[i+1] = (sigma[i+1]/sigma[i]) x[i] + (alpha[i+1] - sigma[i+1] alpha[i]/sigma[i]) sum_{j<=i} c[i,j] d[j]
        c[i,i]  = 1 - sum_{j<i} c[i,j]                                                       d = predicted data

    theta = 0 is Euler (flow) or DDIM (VP) with even steps. Any prediction type: v and d are written in outputs.

    Args:
        schedule: the denoiser's; `NoiseSchedule.at_time` says what a time is: the timestep over `timestep_scale` (flow,
            continuous VP) or over the number of training timesteps (discrete VP).
        nfe: network evaluations N.
        start, end: first and last time; default 1 and 0 (flow), 0.999 and 0.001 (VP).
        finish: `data`: the last state is the image, (alpha, sigma) = (1, 0); `end`: it is the node of `end`, as in
            the paper, which leaves that node's noise in a VP image. The same for flow models.
        reduce_last_rows: the last two rows use only the nearest earlier output; default: up to 6 evaluations.
    Raises:
        ValueError: nfe < 1, times that are not in order, or an unknown finish.
    Source: arXiv 2505.21114, eq. 14-18; nodes of VP models on the model's own discrete schedule.
    """

    schedule: NoiseSchedule
    nfe: int
    start: float | None = None
    end: float | None = None
    finish: str = "data"
    reduce_last_rows: bool | None = None

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"nfe is {self.nfe}: a solver has at least one evaluation")
        if self.finish not in ("data", "end"):
            raise ValueError(f"unknown finish {self.finish!r}: use data or end")
        start, end = self._times
        if not 0 <= end < start <= 1:
            raise ValueError(f"times run from {start} to {end}: they must fall and lie in [0, 1]")

    @property
    def size(self) -> int:
        """Length of theta."""
        return self.nfe + int(self._free.sum())

    def initial(self) -> Tensor:
        """Euler or DDIM with even steps."""
        return torch.zeros(self.size, dtype=torch.float64)

    def project(self, theta: Tensor) -> Tensor:
        """Every theta is allowed."""
        return theta

    def table(self, theta: Tensor) -> SolverTable:
        """The table of theta, (size,)."""
        weights = self._weights(theta[self.nfe :])
        timesteps, alpha, sigma = self._nodes(theta[: self.nfe])
        on_state, on_output = self._direction(alpha[:-1], sigma[:-1])
        if self._is_flow:
            keep, gain = torch.ones_like(sigma[1:]), sigma[1:] - sigma[:-1]
        else:
            keep = sigma[1:] / sigma[:-1]
            gain = alpha[1:] - keep * alpha[:-1]
        step = gain[:, None] * weights
        diagonal = torch.eye(self.nfe, dtype=torch.bool)
        used = self._free | diagonal
        return SolverTable(
            timesteps=timesteps,
            alpha=alpha,
            sigma=sigma,
            state_coef=torch.diag(keep) + step * on_state,
            output_coef=step * on_output,
            noise_coef=torch.zeros_like(step),
            start_scale=1.0,
            prediction_type=self.schedule.prediction_type,
            state_support=diagonal | (used & (on_state.detach() != 0)),
            output_support=used,
        )

    def theta(self, step_sizes: Sequence[float], weights: Sequence[Sequence[float]]) -> Tensor:
        """The inverse: theta of published numbers; step sizes are normalised to sum 1.

        Args:
            step_sizes: (N,), positive.
            weights: (N, N); c[i][j] for j < i.
        Raises:
            ValueError: another N, a step that is not positive, or a weight where this parametrisation has none.
        """
        steps, given = torch.tensor(step_sizes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
        if steps.shape != (self.nfe,) or given.shape != (self.nfe, self.nfe):
            found = f"{tuple(steps.shape)} step sizes and {tuple(given.shape)} weights"
            raise ValueError(f"found {found}: {self.nfe} evaluations need ({self.nfe},) and ({self.nfe}, {self.nfe})")
        if not bool((steps > 0).all()):
            raise ValueError(f"step sizes {step_sizes} must be positive")
        if bool((given[~self._free] != 0).any()):
            raise ValueError("there are weights outside this parametrisation: pass reduce_last_rows=False")
        return torch.cat([(steps / steps.sum()).log(), given[self._free]])

    @property
    def _is_flow(self) -> bool:
        return self.schedule.kind == "flow"

    @property
    def _times(self) -> tuple[float, float]:
        start, end = (1.0, 0.0) if self._is_flow else (0.999, 0.001)
        return start if self.start is None else self.start, end if self.end is None else self.end

    @cached_property
    def _free(self) -> Tensor:
        """(N, N) bool: where c has a free number."""
        free = torch.ones(self.nfe, self.nfe, dtype=torch.bool).tril(-1)
        reduce = self.nfe <= NEAREST_ONLY_UP_TO if self.reduce_last_rows is None else self.reduce_last_rows
        if reduce:
            free[-2:] &= torch.ones_like(free).triu(-1)[-2:]
        return free

    def _weights(self, values: Tensor) -> Tensor:
        """c, (N, N), with its diagonal."""
        earlier = torch.zeros(self.nfe, self.nfe, dtype=torch.float64)
        earlier = earlier.index_put(self._free.nonzero(as_tuple=True), values)
        return earlier + torch.diag(1 - earlier.sum(1))

    def _nodes(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (N,), alpha and sigma (N+1,)."""
        start, end = self._times
        passed = torch.cat([torch.zeros(1, dtype=torch.float64), steps.softmax(0).cumsum(0)[:-1]])
        time = torch.cat([start + (end - start) * passed, torch.tensor([end], dtype=torch.float64)])
        timesteps = self.schedule.at_time(time)
        alpha, sigma = self.schedule.alpha_sigma(timesteps)
        if self.finish == "data":
            alpha = torch.cat([alpha[:-1], torch.ones(1, dtype=torch.float64)])
            sigma = torch.cat([sigma[:-1], torch.zeros(1, dtype=torch.float64)])
        return timesteps[:-1], alpha, sigma

    def _direction(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (on state j, on output j) of what the rows combine: v for flow models, d for VP ones."""
        data = data_weights(self.schedule.prediction_type, alpha, sigma)
        if not self._is_flow:
            return data
        noise = noise_weights(self.schedule.prediction_type, alpha, sigma)
        return noise[0] - data[0], noise[1] - data[1]


@dataclass(frozen=True, eq=False)
class FreeParameters:
    """Additive corrections to every number of a table: theta = 0 is the table itself.

        timesteps      = start.timesteps    + spacing theta_t                 what the network is told; nodes stay
        state_coef     = start.state_coef   + |start.state_coef| theta_s      where the start has an entry
        output_coef    = start.output_coef  + scale[i] theta_o                every call at a row j <= i

    scale[i] is the largest output coefficient of the row in the start, so that theta is dimensionless. The nodes
    (alpha, sigma) say where the start's states lie; the rows decide where the new ones do.

    Args:
        start: any deterministic table, with calls and operators of its own or without.
        timestep_range: (lowest, highest) timestep the network may be told: the schedule's (t_min, t_max).
        train_timesteps: whether the timesteps move.
        keep_last_row: the last row stays as it is; only the timestep it is told moves.
        canonical: first write every row of the start in the start noise and the outputs alone.
        basis: (size, size), what theta is multiplied by first; its first rows, of the timesteps, are diagonal.
    Raises:
        ValueError: a table with noise columns.
    Source: additive corrections as in arXiv 2510.17699; the rows as general as arXiv 2505.21114, eq. 11.
    """

    start: SolverTable
    timestep_range: tuple[float, float]
    train_timesteps: bool = True
    keep_last_row: bool = False
    canonical: bool = False
    basis: Tensor | None = None

    def __post_init__(self) -> None:
        if self.start.is_stochastic:
            raise ValueError("the table to start from adds noise in its rows: a search needs one without (eta 0)")
        start = self.start.detach()
        object.__setattr__(self, "start", self._canonical(start) if self.canonical else start)

    def _canonical(self, start: SolverTable) -> SolverTable:
        found = start.local(start.num_rows)
        if not self.keep_last_row:
            return found
        names = ("state_coef", "output_coef", "state_support", "output_support")
        kept = {name: torch.cat([getattr(found, name)[:-1], getattr(start, name)[-1:]]) for name in names}
        return replace(found, **kept)

    @property
    def nfe(self) -> int:
        """Network calls."""
        return self.start.nfe

    @property
    def size(self) -> int:
        """Length of theta."""
        return sum(self._sizes)

    def initial(self) -> Tensor:
        """The start itself."""
        return torch.zeros(self.size, dtype=torch.float64)

    def project(self, theta: Tensor) -> Tensor:
        """Timesteps moved into `timestep_range`."""
        if not self.train_timesteps:
            return theta
        bound = (torch.tensor(self.timestep_range, dtype=torch.float64)[:, None] - self.start.timesteps) / self._spacing
        told = self.start.num_rows
        if self.basis is not None:
            bound = bound / self.basis.diagonal()[:told]
        bound = bound.to(theta)
        return torch.cat([theta[:told].clamp(bound[0], bound[1]), theta[told:]])

    def table(self, theta: Tensor) -> SolverTable:
        """The table of theta, (size,)."""
        theta = theta if self.basis is None else self.basis @ theta
        timesteps, states, outputs = theta.split(self._sizes)
        start = self.start
        return replace(
            start,
            timesteps=start.timesteps + self._spacing * timesteps if self.train_timesteps else start.timesteps,
            state_coef=_add(start.state_coef, self._states, states, start.state_coef.abs()),
            output_coef=_add(start.output_coef, self._outputs, outputs, self._scale.expand_as(start.output_coef)),
            output_support=self._columns[1],
            info={},
        )

    @property
    def units(self) -> Tensor:
        """What one unit of each number is without a basis, (size,): for weights how far it moves the weight."""
        outputs = self._scale.expand_as(self.start.output_coef)[self._outputs]
        told = torch.ones(self._sizes[0], dtype=torch.float64)
        return torch.cat([told, self.start.state_coef.abs()[self._states], outputs])

    @property
    def moving_rows(self) -> range:
        """Rows whose weights are free."""
        return range(self.start.num_rows - self.keep_last_row)

    def columns(self, row: int) -> tuple[list[int], list[int]]:
        """States and outputs that a row combines."""
        return tuple(columns[row].nonzero().flatten().tolist() for columns in self._columns)

    def places(self, row: int) -> Tensor:
        """Which numbers are the weights of a row, (bands, C, columns * C): one band and channel for plain numbers."""
        told, states, _ = self._sizes
        found = [_numbered(self._states, told), _numbered(self._outputs, told + states)]
        chosen = [numbers[row, columns] for numbers, columns in zip(found, self.columns(row))]
        together = torch.cat(chosen)
        together = together if self.start.space.ops else together[:, None, None, None]
        return together.permute(1, 2, 0, 3).flatten(2)

    @property
    def channels(self) -> int:
        """Rows of a weight; 1 where it is a number."""
        return self.start.space.ops[1] if self.start.space.ops else 1

    @property
    def _spacing(self) -> float:
        low, high = self.timestep_range
        return (high - low) / self.start.num_rows

    @property
    def _sizes(self) -> list[int]:
        """Numbers of the timesteps, the states and the outputs."""
        told = self.start.num_rows * self.train_timesteps
        return [told, int(self._states.sum()), int(self._outputs.sum())]

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        """States and outputs that each row combines, bool (N, columns)."""
        outputs = self.start.reachable("output_coef")
        if self.keep_last_row:
            outputs = torch.cat([outputs[:-1], self.start.used("output_coef")[-1:]])
        return self.start.used("state_coef"), outputs

    @cached_property
    def _states(self) -> Tensor:
        return self._free(self._columns[0])

    @cached_property
    def _outputs(self) -> Tensor:
        return self._free(self._columns[1])

    @cached_property
    def _scale(self) -> Tensor:
        largest = self.start.output_coef.abs().flatten(1).amax(1).clamp_min(1e-6)
        return largest.reshape(-1, *[1] * (self.start.output_coef.ndim - 1))

    def _free(self, columns: Tensor) -> Tensor:
        """All numbers of the weights of some columns, bool (N, columns, *ops)."""
        ops = self.start.space.ops
        if self.keep_last_row:
            columns = torch.cat([columns[:-1], torch.zeros_like(columns[-1:])])
        return columns.reshape(*columns.shape, *[1] * len(ops)).expand(*columns.shape, *ops)


def _add(start: Tensor, mask: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    change = torch.zeros_like(start).index_put(mask.nonzero(as_tuple=True), values * scale[mask])
    return start + change


def _numbered(mask: Tensor, first: int) -> Tensor:
    """The places of a mask numbered from `first`, the others -1."""
    numbers = torch.full(mask.shape, -1)
    numbers[mask] = torch.arange(first, first + int(mask.sum()))
    return numbers
