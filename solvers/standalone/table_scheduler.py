"""A solver table as a diffusers scheduler. Needs torch and diffusers only.

    state[i+1] = sum_j state_coef[i,j] state[j] + output_coef[i,j] output[j] + noise_coef[i,j] noise[j],   j <= i

States are what the network receives, so `scale_model_input` changes nothing; steps are counted, never looked up by
the timestep's value; a state is the sample that `step` receives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

SEED_LIMIT = 2**32


@dataclass
class TableSchedulerOutput(BaseOutput):
    """prev_sample: the next state, (batch, *shape)."""

    prev_sample: Tensor


class TableScheduler(SchedulerMixin, ConfigMixin):
    """Runs the solver tables of its config in any diffusers pipeline.

    Args:
        tables: one dict per number of steps: timesteps (N,), alpha and sigma (N+1,), state_coef, output_coef and
            noise_coef (N, N) as nested lists, start_scale, prediction_type.
        schedule: the noise schedule the tables were made for, None where unknown.
        guidance_scale: the scale (or [lowest, highest]) they were made at, None where unknown.
        seed: row r's noise of sample k is drawn from (seed + k, r), or from (seed[k], r) for a list. Without it noise
            comes from the pipeline's generator, or from torch's global one where the pipeline passes none.
        scale_start: multiply the first model input by start_scale, for a pipeline that ignores `init_noise_sigma`.
        allow_mismatch: accept sigmas, timesteps and mu other than the tables' own.
        num_train_timesteps, prediction_type: what pipelines read from a scheduler's config.
    Raises:
        ValueError: no table, or two with the same number of steps.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        tables: list[dict[str, Any]] | None = None,
        schedule: dict[str, Any] | None = None,
        guidance_scale: float | list[float] | None = None,
        seed: int | list[int] | None = None,
        scale_start: bool = False,
        allow_mismatch: bool = False,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
    ) -> None:
        self._tables = {len(table["timesteps"]): table for table in self._checked(tables or [])}
        if not self._tables or len(self._tables) < len(tables or []):
            raise ValueError("TableScheduler needs tables, each with another number of steps: load it with from_solver")
        self.seed = seed
        self._select(next(iter(self._tables)), None)

    @staticmethod
    def _checked(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return tables

    @property
    def available_steps(self) -> list[int]:
        """The numbers of inference steps this scheduler has a table for."""
        return sorted(self._tables)

    @property
    def init_noise_sigma(self) -> float:
        """Scale of the first state against unit noise."""
        return 1.0 if self.config["scale_start"] else float(self._table["start_scale"])

    @property
    def step_index(self) -> int:
        """The row the next `step` computes."""
        return self._row

    @property
    def begin_index(self) -> int:
        """The row the run began with."""
        return self._begin

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the table and forget the last run.

        Args:
            num_inference_steps: network evaluations; None is the length of `sigmas` or `timesteps`, or the only table.
            device: where `timesteps` and `sigmas` go.
            sigmas, timesteps: pipelines pass them; they must be evenly spaced from 1 or the table's own.
            mu: the pipeline's dynamic shift, compared with the schedule's shift.
        Raises:
            ValueError: a number of steps without a table, or sigmas, timesteps or mu the table was not made for.
        """
        given = sigmas if sigmas is not None else timesteps
        count = num_inference_steps if given is None else len(given)
        if count is None and len(self._tables) == 1:
            count = self.available_steps[0]
        if count not in self._tables:
            raise ValueError(
                f"num_inference_steps is {count}: this solver has tables for {self.available_steps} steps only; "
                "pass one of these"
            )
        self._select(count, device)
        if not self.config["allow_mismatch"]:
            self._check_steps(sigmas, timesteps, mu)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later row, as image-to-image pipelines do.

        Raises:
            ValueError: a row from there on uses a state or output from before.
        """
        rows = self._rows[begin_index:]
        if not rows or any(column < begin_index for row in rows for block in row[:2] for column, _ in block):
            raise ValueError(
                f"this {len(self._rows)}-step solver cannot start at row {begin_index}: later rows use earlier "
                "results, or there are none; start at 0 (strength 1), or take a one-step solver"
            )
        self._begin, self._row = begin_index, begin_index
        self._history: tuple[dict, dict, dict] = ({}, {}, {})
        self._returned: Tensor | None = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample itself: states are what the network receives (with `scale_start`, row 0 is scaled here)."""
        if self.config["scale_start"] and self._row == 0:
            return sample * float(self._table["start_scale"])
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TableSchedulerOutput | tuple[Tensor, ...]:
        """The next state. States accumulate in float32 or better, whatever the pipeline's dtype.

        Args:
            model_output: (batch, *shape), of the tables' prediction type.
            timestep: not used, rows are counted.
            sample: the state the network received, (batch, *shape).
            generator: source of fresh noises when the scheduler has no seed.
            return_dict: False returns a tuple.
        Raises:
            ValueError: more steps than rows.
        """
        row = self._row
        if row >= len(self._rows):
            raise ValueError(f"all {row} steps are done: call set_timesteps before the next run")
        states, outputs, noises = self._history
        states[row], outputs[row] = self._received(sample), _wide(model_output)
        for column, _ in self._rows[row][2]:
            if column not in noises:
                noises[column] = self._noise(column, sample, generator).to(states[row])
        total = torch.zeros_like(states[row])
        for terms, values in zip(self._rows[row], self._history):
            for column, weight in terms:
                total = torch.add(total, values[column], alpha=weight)
        self._forget(row)
        self._row, self._returned = row + 1, total
        result = total.to(sample.dtype)
        if return_dict:
            return TableSchedulerOutput(prev_sample=result)
        return (result, result) if len(self._rows) == 1 else (result,)  # PixArt reads a one-step image from place 1

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * original_samples + sigma * noise at the node of the current row, or of the given timesteps.

        Args:
            original_samples, noise: (batch, *shape).
            timesteps: scalar or (batch,); those of the current row mean its node.
        Raises:
            ValueError: timesteps whose node is not known.
        """
        row = min(self._row, len(self._rows) - 1)
        timesteps = torch.as_tensor(timesteps)
        if bool((timesteps.float().cpu() == float(torch.tensor(self._table["timesteps"][row]))).all()):
            alpha, sigma = (torch.tensor(self._table[name][row], dtype=torch.float64) for name in ("alpha", "sigma"))
        else:
            alpha, sigma = self._nodes(timesteps.cpu())
        alpha, sigma = (_broadcast(value, original_samples) for value in (alpha, sigma))
        return alpha * original_samples + sigma * noise

    def _nodes(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes of timesteps by value, among the table's own."""
        own = torch.tensor(self._table["timesteps"], dtype=torch.float32)
        matches = timesteps.float().reshape(-1, 1) == own
        if not bool(matches.any(1).all()):
            raise ValueError(f"add_noise knows the timesteps {own.tolist()} of this solver only: pass one of them")
        rows = matches.float().argmax(1)
        alpha, sigma = (torch.tensor(self._table[name], dtype=torch.float64)[rows] for name in ("alpha", "sigma"))
        return alpha, sigma

    def _select(self, count: int, device: str | torch.device | None) -> None:
        self._table = table = self._tables[count]
        self.num_inference_steps = count
        self.timesteps = torch.tensor(table["timesteps"], dtype=torch.float32, device=device)
        alpha, sigma = (torch.tensor(table[name], dtype=torch.float64) for name in ("alpha", "sigma"))
        flow = table["prediction_type"] == "flow_prediction"
        ratio = sigma / (alpha + sigma) if flow else sigma / alpha
        self.sigmas = torch.as_tensor(ratio, dtype=torch.float32, device=device)
        blocks = (table["state_coef"], table["output_coef"], table["noise_coef"])
        self._rows = [tuple(_terms(block[row]) for block in blocks) for row in range(count)]
        self._last_use = [_last_use([row[kind] for row in self._rows]) for kind in range(3)]
        self.set_begin_index(0)

    def _check_steps(self, sigmas: Any, timesteps: Any, mu: float | None) -> None:
        """Refuse what would ask for other steps than the table's; the usual linspace(1, 1/n, n) asks for nothing."""
        n = len(self._rows)
        even = torch.tensor([1 - i / n for i in range(n)])
        if sigmas is not None and not any(_close(sigmas, own) for own in (even, self.sigmas[:-1], self.sigmas)):
            raise ValueError(f"sigmas are {list(sigmas)}: this solver has its own steps; pass num_inference_steps={n}")
        if timesteps is not None and not _close(timesteps, self.timesteps):
            raise ValueError(f"timesteps are {list(timesteps)}: this solver's own are {self.timesteps.tolist()}")
        if mu is not None:
            self._check_shift(float(mu))

    def _check_shift(self, mu: float) -> None:
        made_for = ((self.config["schedule"] or {}).get("parameters") or {}).get("shift")
        shift = mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        if made_for is not None and abs(shift - made_for) > 1e-3 * made_for:
            raise ValueError(
                f"the pipeline's shift is {shift:.4f} (mu = {mu:.4f}), this solver was made for {made_for:.4f}: "
                "use the image size it was made for, or allow_mismatch=True"
            )

    def _received(self, sample: Tensor) -> Tensor:
        """The state in float32 or better: where a half-precision pipeline hands back what it was given, unrounded."""
        kept = self._returned
        if kept is None or kept.dtype == sample.dtype or kept.shape != sample.shape:
            return _wide(sample)
        return torch.where(kept.to(sample.dtype) == sample, kept, _wide(sample))

    def _noise(self, row: int, sample: Tensor, generator: Any) -> Tensor:
        if self.seed is None:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        seeds = [self.seed + k for k in range(len(sample))] if isinstance(self.seed, int) else list(self.seed)
        if not seeds or len(sample) % len(seeds):
            raise ValueError(f"{len(seeds)} seeds for a batch of {len(sample)}: give one per sample, or one integer")
        if not all(0 <= seed < SEED_LIMIT for seed in seeds):
            raise ValueError(f"seeds {seeds} are outside 0 to 2^32 - 1")
        generators = [np.random.Generator(np.random.Philox(key=[seed, row])) for seed in seeds]
        draws = [torch.as_tensor(source.standard_normal(sample.shape[1:], np.float32)) for source in generators]
        return torch.stack(draws * (len(sample) // len(seeds))).to(sample.device)

    def _forget(self, row: int) -> None:
        """Drop what no later row uses."""
        for values, last_use in zip(self._history, self._last_use):
            for column in [j for j in values if last_use[j] <= row]:
                del values[column]


def _terms(row: list[float]) -> list[tuple[int, float]]:
    return [(column, float(weight)) for column, weight in enumerate(row) if weight != 0]


def _last_use(rows: list[list[tuple[int, float]]]) -> list[int]:
    return [max((i for i, row in enumerate(rows) if any(j == c for c, _ in row)), default=-1) for j in range(len(rows))]


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _broadcast(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _close(given: Any, own: Tensor) -> bool:
    given = torch.as_tensor(given, dtype=torch.float32).cpu()
    return given.shape == own.shape and torch.allclose(given, own.cpu(), rtol=1e-3, atol=1e-3)
