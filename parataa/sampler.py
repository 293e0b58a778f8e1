"""parallel_sample: all rows of a solver table at once, instead of one after the other."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from denoisers.conditions import condition_tensors
from parataa.equations import Equations
from parataa.evaluate import Evaluator
from parataa.iteration import Draw, Iterate, init, step, terminate
from parataa.processes import check_same
from parataa.settings import Settings, check_inputs, check_settings
from solvers.sampler import Denoiser, StepNoise, noise_source
from solvers.table import SolverTable


@dataclass(frozen=True)
class ParallelStats:
    """How a parallel run went.

    Args:
        rounds: of the slowest sample.
        evaluations: network evaluations of all samples together; the sequential sampler needs N per sample.
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
    order: int | None = None,
    window: int | None = None,
    memory: int = 3,
    regularization: float = 1e-3,
    acceleration: str = "anderson",
    data_std: float | None = None,
    tolerance: float = 1e-3,
    noise_tolerance: float = 0.0,
    settled: float | None = None,
    max_rounds: int | None = None,
    step_noise: StepNoise = None,
    seeds: Sequence[int] | None = None,
    warm_start: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    keep_states: bool = False,
    batch_size: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, ParallelStats]:
    settings = check_settings(
        table.nfe,
        order=order,
        window=window,
        memory=memory,
        regularization=regularization,
        acceleration=acceleration,
        data_std=data_std,
        tolerance=tolerance,
        noise_tolerance=noise_tolerance,
        settled=settled,
        max_rounds=max_rounds,
        batch_size=batch_size,
    )
    check_inputs(table, noise, condition, warm_start)
    start = noise.to(torch.promote_types(noise.dtype, torch.float32)) * table.start_scale
    check_same(group, noise.device, start, *condition_tensors(condition), settings, *_blocks(table))
    run = _Run(settings, table, start, _draws(table, noise, step_noise, seeds), warm_start, keep_states)
    evaluator = Evaluator(denoiser, condition, settings.batch_size, group)
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
        settings: Settings,
        table: SolverTable,
        start: Tensor,
        draws: list[Draw],
        warm_start: Tensor | None,
        keep_states: bool,
    ) -> None:
        self._settings, self._draws = settings, draws
        self.equations = Equations(
            table,
            settings.order,
            settings.window,
            settings.data_std,
            settings.tolerance,
            settings.noise_tolerance,
            like=start,
        )
        self._guesses = [None] * len(start) if warm_start is None else list(warm_start.to(start).unbind(1))
        guessed = zip(start, draws, self._guesses)
        self.iterates: list[Iterate] = [init(self.equations, *arguments) for arguments in guessed]
        self.active = list(range(len(start)))
        self.rounds = self._evaluations = 0
        self._sample_rounds, self._reasons = [0] * len(start), ["max_rounds"] * len(start)
        self._residuals: list[Tensor] = []
        self._changes = [float("inf")] * len(start)
        self._states = start.expand(table.nfe + 1, *start.shape).clone() if keep_states else None

    def advance(self, outputs: list[Tensor]) -> None:
        """One round of every active sample."""
        self.rounds += 1
        self._residuals.append(torch.full((len(self.iterates),), float("nan"), dtype=torch.float64))
        for sample, output in zip(list(self.active), outputs):
            self._evaluations += len(output)
            self._step(sample, output)

    def _step(self, sample: int, output: Tensor) -> None:
        old, rule = self.iterates[sample], self._settings.acceleration
        new, size = step(self.equations, old, output, rule, self._draws[sample], self._guesses[sample])
        self.iterates[sample] = new
        self._sample_rounds[sample] = self.rounds
        self._residuals[-1][sample] = size.max()
        if self._states is not None:
            self._states[new.start : new.start + len(new.states), sample] = new.states
        if terminate(self.equations, new):
            self._finish(sample, "finished")
        elif self._is_settled(sample, old, new):
            self._finish(sample, "settled")

    def _finish(self, sample: int, reason: str) -> None:
        self._reasons[sample] = reason
        self.active.remove(sample)

    def _is_settled(self, sample: int, old: Iterate, new: Iterate) -> bool:
        """Whether the final state hardly moved in the last two rounds."""
        nfe, limit = self.equations.table.nfe, self._settings.settled
        if limit is None or self.equations.stop(old.start) < nfe:
            return False
        node = torch.hypot(self.equations.table.alpha[-1], self.equations.table.sigma[-1])
        change = float((new.states[-1] - old.states[-1]).square().mean().sqrt() / node)
        before, self._changes[sample] = self._changes[sample], change
        return max(before, change) <= limit

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


def _draws(table: SolverTable, noise: Tensor, step_noise: StepNoise, seeds: Sequence[int] | None) -> list[Draw]:
    """For each sample a function of the row that returns its fresh noise, (*shape)."""
    whole = noise_source(table, noise, step_noise, seeds)
    dtype = torch.promote_types(noise.dtype, torch.float32)
    if seeds is None or step_noise is not None or not table.is_stochastic:
        return [lambda row, b=b: whole(row)[b].to(dtype) for b in range(len(noise))]
    single = [noise_source(table, noise[b : b + 1], None, seeds[b : b + 1]) for b in range(len(noise))]
    return [lambda row, draw=draw: draw(row)[0].to(dtype) for draw in single]


def _blocks(table: SolverTable) -> tuple[Tensor, ...]:
    return table.timesteps, table.state_coef, table.output_coef, table.noise_coef


def _warn(stats: ParallelStats, settings: Settings) -> None:
    left = stats.sample_reasons.count("max_rounds")
    warnings.warn(
        f"{left} of {len(stats.sample_reasons)} samples did not converge in {stats.rounds} rounds: the largest "
        f"residual is {float(stats.residuals[-1].nan_to_num(0).max()):.1e}, the tolerance {settings.tolerance:g}; "
        "raise max_rounds (N rounds always suffice) or the tolerance",
        stacklevel=3,
    )
