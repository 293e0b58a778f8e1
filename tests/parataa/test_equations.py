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


def test_the_tolerance_is_relative_to_the_data_in_a_state_or_the_noise_of_the_step():
    table = named_solver("ddpm:5", VP)
    assert torch.equal(finished_tolerance(table, 1e-3, 0.0), 1e-3 * table.alpha[1:] / 5)
    by_noise = finished_tolerance(table, 1e-9, 0.1)
    fresh = table.noise_coef.diagonal()  # the ancestral step's own noise
    assert torch.allclose(by_noise[:-1], 0.1 * fresh[:-1], rtol=1e-6)
    assert float(by_noise[-1]) < 1e-8


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
