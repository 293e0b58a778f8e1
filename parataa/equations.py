"""The rows of a table as equations between all states of a window at once."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from parataa.settings import ParallelSettings
from solvers.executor import NOISE, OUTPUT
from solvers.prediction import output_weights
from solvers.table import SolverTable

Coefs = tuple[Tensor, Tensor, Tensor]

_FINISHED = 0.2  # of the tolerance


@dataclass(frozen=True)
class WindowEquations:
    """The equations of rows start to stop - 1, on the columns (states, outputs, noises) they use.

    Args:
        columns: indices of the states, outputs and noises that enter; the last of each of the first two are the
            window's own: its rows, and the network calls at them.
        plain: weights of the table's own rows, (rows, columns, *ops) for each kind.
        reaching: weights of the order-k rows, for outputs minus `slope` times their states.
        calls: the network calls at the window's rows.
        seen: (calls,), which of the window's states each call sees.
        slope: (calls,), see `output_slope`.
        tolerance: (rows,), the root mean square residual of the order-k rows at which they are finished.
    """

    columns: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    plain: Coefs
    reaching: Coefs
    calls: tuple[int, ...]
    seen: Tensor
    slope: Tensor
    tolerance: Tensor


class Equations:
    """Order-k equations of a table for any window start.

    Args:
        table: the solver.
        settings: order, window, data_std and the tolerances, `filled_in` for the table.
        like: states, (batch, *shape), of the dtype and on the device they accumulate in.
    Raises:
        ValueError: states that the table's weights do not act on.
    """

    def __init__(self, table: SolverTable, settings: ParallelSettings, like: Tensor) -> None:
        self.table, self._settings, self._like = table.detach(), settings, like
        self.space = table.space.bind(like.shape[1:], like.device)
        self._slope = torch.zeros(table.nfe, dtype=torch.float64)
        if settings.data_std is not None:
            self._slope = output_slope(self.table, settings.data_std)[table.call_rows]
        self._tolerance = finished_tolerance(self.table, settings)
        self._last_use = self.table.last_use()
        self.at = lru_cache(maxsize=256)(self._at)

    def stop(self, start: int) -> int:
        """End of the window that begins at row `start`."""
        return min(start + self._settings.window, self.table.num_rows)

    def calls(self, start: int, stop: int) -> range:
        """The network calls at rows start to stop - 1."""
        return range(*torch.searchsorted(self.table.call_rows, torch.tensor([start, stop])).tolist())

    def keeps(self, kind: int, index: int, start: int) -> bool:
        """Whether rows from `start` on use the state, output or noise (STATE, OUTPUT, NOISE) of this index."""
        return self._last_use[kind][index] >= start

    def _at(self, start: int) -> WindowEquations:
        stop = self.stop(start)
        window, calls = torch.arange(start, stop), tuple(self.calls(start, stop))
        reaching = self._shifted(start).local(self._settings.order, start)
        columns = tuple(self._columns(kind, start, stop) for kind in range(3))
        return WindowEquations(
            columns,
            self._block(self.table, window, columns),
            self._block(reaching, window, columns),
            calls,
            (self.table.call_rows[list(calls)] - start).to(self._like.device),
            self._slope[list(calls)].to(self._like),
            self._tolerance[window].to(self._like),
        )

    def _shifted(self, start: int) -> SolverTable:
        """The table for outputs from `start` on minus slope * state."""
        table = self.table
        slope = torch.where(table.call_rows >= start, self._slope, 0.0).reshape(-1, *[1] * len(table.space.ops))
        followed = table.state_coef.index_add(1, table.call_rows, table.output_coef * slope)
        return replace(table, state_coef=followed, state_support=None)

    def _columns(self, kind: int, start: int, stop: int) -> tuple[int, ...]:
        inside = self.calls(start, stop) if kind == OUTPUT else range(start, stop)
        kept = [j for j in range(inside.start) if self.keeps(kind, j, start)]
        return (*kept, *(j for j in inside if kind != NOISE or self.keeps(kind, j, start)))

    def _block(self, table: SolverTable, rows: Tensor, columns: tuple[tuple[int, ...], ...]) -> Coefs:
        coefs = (table.state_coef, table.output_coef, table.noise_coef)
        return tuple(coef[rows][:, list(used)].to(self._like) for coef, used in zip(coefs, columns))


def output_slope(table: SolverTable, data_std: float) -> Tensor:
    """How fast each output changes with its state for Gaussian data of this standard deviation, (N,).

        d = data + gain (x - alpha data),   gain = alpha data_std^2 / (alpha^2 data_std^2 + sigma^2)

    An equation that takes outputs minus slope * state as given, rather than the outputs, already knows how they
    will follow their states; data_std 0 is iteration in the data prediction.

    Args:
        table: nodes and prediction type.
        data_std: standard deviation of the data, >= 0.
    Source: the exponential-integrator split of a linear part, arXiv 2206.00927, used here as a preconditioner.
    """
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    power = alpha**2 * data_std**2 + sigma**2
    gain = alpha * data_std**2 / power
    on_data, on_noise = output_weights(table.prediction_type, alpha, sigma)
    return on_data * gain + on_noise * sigma / power  # sigma / power = (1 - alpha gain) / sigma, also at sigma 0


def finished_tolerance(table: SolverTable, settings: ParallelSettings) -> Tensor:
    """Root mean square residual of its order-k equation at which each row is finished, (N,).

        tolerance * min(1/5, k / N) * sqrt((alpha' data_std)^2 + sigma'^2),    ' the node after the row

    The residual is how far the state would move, rows before it included, so it speaks of the state's error and needs
    no share of the tolerance for each row, unless the equations reach back over few of them. A fifth, because what
    is left of the error grows on the way to the image (measured, parataa/README.md).

    Args:
        table: nodes.
        settings: tolerance, order and data_std (1 where it is None or 0), `filled_in`.
    Source: ParaDiGMS (arXiv 2305.16317) slides its window by the movement too, relative to an ancestral step's noise.
    """
    assert settings.order is not None
    share = min(_FINISHED, settings.order / table.num_rows)
    return settings.tolerance * share * torch.hypot(table.alpha[1:] * (settings.data_std or 1.0), table.sigma[1:])
