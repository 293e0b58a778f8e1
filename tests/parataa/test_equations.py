from dataclasses import replace

import pytest
import torch

from parataa import ParallelSettings
from parataa.equations import Equations, finished_tolerance, output_slope
from solvers import NoiseSchedule, SolverTable
from solvers.named import named_solver
from tests.analytic import gaussian_denoiser
from tests.parataa.problems import euler_table

VP = NoiseSchedule.linear()


def equations(table, order, window, data_std=None):
    settings = ParallelSettings(order=order, window=window, data_std=data_std)
    return Equations(table, settings, like=torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_slope_is_the_derivative_for_gaussian_data(prediction_type):
    schedule = (NoiseSchedule.flow if prediction_type == "flow_prediction" else NoiseSchedule.linear)(
        prediction_type=prediction_type
    )
    timesteps = torch.linspace(900, 100, 4, dtype=torch.float64)
    nodes = [torch.cat([value, value[-1:]]) for value in schedule.alpha_sigma(timesteps)]
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    table = SolverTable(timesteps, *nodes, zeros, zeros, zeros, 1.0, prediction_type)
    x = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    gaussian_denoiser(schedule, std=0.6)(x, timesteps).sum().backward()
    assert torch.allclose(output_slope(table, 0.6), x.grad[:, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("order", "share"), [(None, 0.2), (5, 0.2), (1, 0.125)])
def test_the_tolerance_is_relative_to_a_state_of_gaussian_data(order, share):
    """A fifth, or less where an equation reaches back over few of the eight rows."""
    table = named_solver("ddpm:8", VP)
    settings = ParallelSettings(tolerance=1e-2, order=order, data_std=0.6).filled_in(8)
    deviation = (table.alpha[1:].square() * 0.36 + table.sigma[1:].square()).sqrt()
    torch.testing.assert_close(finished_tolerance(table, settings), 1e-2 * share * deviation)
    assert float(finished_tolerance(table, replace(settings, data_std=None))[-1]) == pytest.approx(1e-2 * share)


def test_a_window_sees_what_its_rows_use_and_no_more():
    rows = equations(euler_table(VP, 12, noisy=0.5), order=12, window=4).at(5)
    assert rows.columns == ((5, 6, 7, 8), (5, 6, 7, 8), (5, 6, 7, 8))
    multistep = equations(named_solver("dpmpp3m:12", VP), order=12, window=4).at(5)
    assert multistep.columns == ((3, 4, 5, 6, 7, 8), (3, 4, 5, 6, 7, 8), ())


def test_full_order_never_uses_unfinished_states():
    rows = equations(named_solver("dpmpp:12", VP), order=12, window=12).at(4)
    inside = rows.reaching[0][:, rows.columns[0].index(5) :]
    assert not inside.any()
    assert bool(rows.plain[0].any())


def test_a_slope_changes_the_equations_but_not_their_solution():
    table = named_solver("dpmpp:8", VP)
    states, outputs = torch.randn(9, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    for row in range(8):
        states[row + 1] = table.state_coef[row] @ states[:8] + table.output_coef[row] @ outputs
    for data_std in (None, 0.5):
        rows = equations(table, 8, 8, data_std).at(0)
        found = rows.reaching[0] @ states[:8] + rows.reaching[1] @ (outputs - rows.slope[:, None] * states[:8])
        assert torch.allclose(found, states[1:], rtol=1e-9, atol=1e-9)
