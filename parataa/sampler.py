"""parallel_sample: all rows of a solver table at once, instead of one after the other."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parataa.equations import Equations
from parataa.evaluate import Evaluator
from parataa.iteration import Draw, Iterate, Progress, init, step, terminate
from parataa.processes import check_same
from parataa.settings import ParallelSettings
from solvers.conditions import condition_length, condition_tensors
from solvers.sampler import Denoiser, StepNoise, noise_source
from solvers.table import SolverTable


@dataclass(frozen=True)
class ParallelStats:
    """How a parallel run went.

    Args:
        rounds: of the slowest sample.
        evaluations: network calls of all samples together; the sequential sampler needs `table.nfe` per sample.
        residuals: largest first-order residual (root mean square over a sample's elements) in the window of each
            sample, (rounds, batch), float64, NaN after a sample is done.
        converged: whether every sample converged.
        reason: why the run ended: `finished`, `settled` or `max_rounds`.
        sample_rounds: rounds of each sample.
        sample_reasons: reason of each sample.
        states: all states, (N+1, batch, *shape), if asked for: the warm start of a neighbouring run.
    """

    rounds: int
    evaluations: int
    residuals: Tensor
    converged: bool
    reason: str
    sample_rounds: tuple[int, ...]
    sample_reasons: tuple[str, ...]
    states: Tensor | None = None


@torch.no_grad()
def parallel_sample(
    denoiser: Denoiser,
    table: SolverTable,
    noise: Tensor,
    condition: Any = None,
    *,
    settings: ParallelSettings | None = None,
    step_noise: StepNoise = None,
    seeds: Sequence[int] | None = None,
    warm_start: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    keep_states: bool = False,
    group: ProcessGroup | None = None,
    **changes: Any,
) -> tuple[Tensor, ParallelStats]:
    """Run a solver table in rounds, each of which makes the network calls at all rows of a window at once.

        x[i+1] <- G[i](x) + triangular Anderson acceleration,   R = G(x) - x

    G are the order-k equations of the table (`SolverTable.local`). Every sample has its own window, history and end, so
    that it does not matter which batch it sits in. The result is that of `sample`, up to `tolerance`, after at most N
    rounds; on one CPU that takes longer, because nothing is idle there.

    Memory between rounds, in states per sample: at most (2 memory + 2) window + 2, and what the table's own rows use of
    the past (one-step tables: nothing); N + 1 more with `keep_states`. At most `batch_size` calls are made at once.

    Args:
        denoiser: as for `sample`; the timestep is (calls,), and so is the `node` where needed.
        table: the solver, without unused evaluations; its noise columns need `step_noise` or `seeds`.
        noise: (batch, *shape), unit Gaussian.
        condition: None, a tensor, or nested containers of tensors indexed on dimension 0.
        settings: how to iterate; default `ParallelSettings()`.
        step_noise: fresh unit noises, (N, batch, *shape), or a function of the row that returns (batch, *shape), the
            same at every call.
        seeds: one integer per sample; row r's noise of sample k is drawn from (seeds[k], r), as in `sample`.
        warm_start: all states of a neighbouring run, (N+1, batch, *shape), as the first guess.
        callback: called after each round with (round, newest states (batch, *shape)).
        keep_states: also return all states, for a warm start.
        group: processes that share the calls, all called with the same arguments; see `processes`.
        **changes: single settings by name, `tolerance=1e-4`, in place of those in `settings`.
    Returns:
        The final states, (batch, *shape), in the dtype of `noise`, and how the run went.
    Raises:
        ValueError: a setting out of range, a table with unused evaluations, inputs that do not fit each other, noises
            that are missing, a call that the denoiser cannot make, or outputs of another shape or not finite.
        RuntimeError: another process ended or did not answer in time.
    Source: arXiv 2402.09970 (ParaTAA), for any linear table instead of DDIM; safeguard, relative lambda, relative
        tolerance and `data_std` are deviations, see parataa/README.md.
    """
    settings = replace(settings or ParallelSettings(), **changes).filled_in(table.num_rows)
    _check_inputs(table, noise, condition, warm_start)
    start = noise.to(torch.promote_types(noise.dtype, torch.float32)) * table.start_scale
    check_same(group, noise.device, start, *condition_tensors(condition), settings, *_parts(table))
    run = _Run(settings, table, start, _draws(table, noise, step_noise, seeds), warm_start, keep_states)
    evaluator = Evaluator(denoiser, table, condition, settings.batch_size, group)
    while run.active and run.rounds < settings.max_rounds:
        run.advance(evaluator(run.equations, run.active, [run.iterates[b] for b in run.active]))
        if callback is not None:
            callback(run.rounds, run.images().to(noise.dtype))
    stats = run.stats()
    if not stats.converged:
        _warn(stats, settings)
    return run.images().to(noise.dtype), stats


class _Run:
    """The samples of one call."""

    def __init__(
        self,
        settings: ParallelSettings,
        table: SolverTable,
        start: Tensor,
        draws: list[Draw],
        warm_start: Tensor | None,
        keep_states: bool,
    ) -> None:
        self._settings, self._draws = settings, draws
        self.equations = Equations(table, settings, like=start)
        self._guesses = [None] * len(start) if warm_start is None else list(warm_start.to(start).unbind(1))
        guessed = zip(start, draws, self._guesses)
        self.iterates: list[Iterate] = [init(self.equations, *arguments) for arguments in guessed]
        self.active = list(range(len(start)))
        self.rounds = self._evaluations = 0
        self._sample_rounds, self._reasons = [0] * len(start), ["max_rounds"] * len(start)
        self._residuals: list[Tensor] = []
        self._moved = [0.0] * len(start)
        self._states = start.expand(table.num_rows + 1, *start.shape).clone() if keep_states else None

    def advance(self, outputs: list[Tensor]) -> None:
        """One round of every active sample."""
        self.rounds += 1
        self._residuals.append(torch.full((len(self.iterates),), float("nan"), dtype=torch.float64))
        for sample, output in zip(list(self.active), outputs):
            self._evaluations += len(output)
            self._step(sample, output)

    def _step(self, sample: int, output: Tensor) -> None:
        old, draw, guess = self.iterates[sample], self._draws[sample], self._guesses[sample]
        new, progress = step(self.equations, old, output, self._settings, draw, guess)
        self.iterates[sample] = new
        self._sample_rounds[sample] = self.rounds
        self._residuals[-1][sample] = progress.residual.max()
        if self._states is not None:
            self._states[new.start : new.start + len(new.states), sample] = new.states
        if terminate(self.equations, new):
            self._finish(sample, "finished")
        elif self._is_settled(sample, old.start, progress):
            self._finish(sample, "settled")

    def _finish(self, sample: int, reason: str) -> None:
        self._reasons[sample] = reason
        self.active.remove(sample)

    def _is_settled(self, sample: int, start: int, progress: Progress) -> bool:
        """Whether the final state is as good as at its end.

        Moves that shrink by a factor q from round to round still add up to q / (1 - q) times the last one. A final
        state of low order hears of distant rows late, so that their residuals must be smaller.
        """
        settings, table = self._settings, self.equations.table
        if not settings.early_stop or self.equations.stop(start) < table.num_rows:
            return False
        size = torch.hypot(table.alpha, table.sigma)
        moved, before = float(progress.moved / size[-1]), self._moved[sample]
        self._moved[sample] = moved
        ahead = moved * max(1.0, moved / (before - moved)) if moved < before else math.inf
        worst = float((progress.residual / size[start + 1 :].to(progress.residual)).max())
        return max(ahead, worst * table.num_rows / settings.order) <= settings.tolerance

    def images(self) -> Tensor:
        """The newest state of each sample, (batch, *shape): the final one once the window reaches it."""
        return torch.stack([iterate.states[-1] for iterate in self.iterates])

    def stats(self) -> ParallelStats:
        reasons = tuple(self._reasons)
        worst = next((reason for reason in ("max_rounds", "settled") if reason in reasons), "finished")
        return ParallelStats(
            self.rounds,
            self._evaluations,
            torch.stack(self._residuals),
            worst != "max_rounds",
            worst,
            tuple(self._sample_rounds),
            reasons,
            self._states,
        )


def _check_inputs(table: SolverTable, noise: Tensor, condition: Any, warm_start: Tensor | None) -> None:
    """Whether table, noise, condition and warm start fit each other, and no row is evaluated in vain."""
    if noise.ndim < 2 or len(noise) == 0 or not noise.is_floating_point():
        raise ValueError(f"noise has shape {tuple(noise.shape)} and {noise.dtype}: needed is floating (batch, *shape)")
    unused = table.unused_evaluations()
    if unused:
        raise ValueError(
            f"the outputs of calls {unused} never reach the final state, so that a parallel run would wait for rows "
            "that do not matter: remove them from the table, or use the sequential sampler"
        )
    length = condition_length(condition)
    if length not in (None, len(noise)):
        raise ValueError(f"the condition has {length} samples and the noise {len(noise)}: give the same number")
    needed = (table.num_rows + 1, *noise.shape)
    if warm_start is not None and tuple(warm_start.shape) != needed:
        raise ValueError(f"warm_start has shape {tuple(warm_start.shape)}: needed are all states, {needed}")


def _draws(table: SolverTable, noise: Tensor, step_noise: StepNoise, seeds: Sequence[int] | None) -> list[Draw]:
    """For each sample a function of the row that returns its fresh noise, (*shape)."""
    whole = noise_source(table, noise, step_noise, seeds)
    dtype = torch.promote_types(noise.dtype, torch.float32)
    if seeds is None or step_noise is not None or not table.is_stochastic:
        return [lambda row, b=b: whole(row)[b].to(dtype) for b in range(len(noise))]
    single = [noise_source(table, noise[b : b + 1], None, seeds[b : b + 1]) for b in range(len(noise))]
    return [lambda row, draw=draw: draw(row)[0].to(dtype) for draw in single]


def _parts(table: SolverTable) -> tuple[object, ...]:
    return table.timesteps, table.state_coef, table.output_coef, table.noise_coef, table.calls, table.space


def _warn(stats: ParallelStats, settings: ParallelSettings) -> None:
    left = stats.sample_reasons.count("max_rounds")
    warnings.warn(
        f"{left} of {len(stats.sample_reasons)} samples did not converge in {stats.rounds} rounds: the largest "
        f"residual is {float(stats.residuals[-1].nan_to_num(0).max()):.1e}, the tolerance {settings.tolerance:g}; "
        "raise max_rounds (N rounds always suffice) or the tolerance",
        stacklevel=3,
    )
