"""The mathematics of sub-paths: ends, noise levels, boundaries, and data for which nothing is left to learn."""

import pytest
import torch

from slam.lines import (
    boundary,
    consistency_weights,
    ddim_weights,
    huber,
    l2,
    line_call,
    line_node,
    line_weights,
    teacher_points,
    weighted,
)
from slam.objective import Objective, Weights, predictions, teacher_end
from solvers import NoiseSchedule, named_solver, sample
from solvers.prediction import to_output
from tests.analytic import gaussian_denoiser, gaussian_solution

SCHEDULES = {
    "epsilon": NoiseSchedule.linear(),
    "v_prediction": NoiseSchedule.scaled_linear(prediction_type="v_prediction"),
    "sample": NoiseSchedule.cosine(prediction_type="sample"),
    "continuous": NoiseSchedule.continuous_vp(),
    "flow": NoiseSchedule.flow(),
    "shifted": NoiseSchedule.flow(shift=3.0),
}
VP = [name for name in SCHEDULES if name not in ("flow", "shifted")]


def every(name, num_points=50):
    """All sub-paths of a schedule, and states: (schedule, points, x_s, x_e)."""
    points = teacher_points(SCHEDULES[name], num_points)
    start, end = torch.randn(2, num_points, 3, dtype=torch.float64)
    return SCHEDULES[name], points, start, end


def test_points_of_the_discrete_schedule():
    points = teacher_points(NoiseSchedule.linear(), 50)
    assert points.start[:3].tolist() == [19, 39, 59]
    assert points.end[:3].tolist() == [0, 19, 39]
    assert (points.start[-1], points.end[-1]) == (999, 979)
    alpha, sigma = NoiseSchedule.linear().alpha_sigma(points.end)
    assert torch.equal(points.alpha_end, alpha)
    assert torch.equal(points.sigma_end, sigma)


@pytest.mark.parametrize(("name", "shift"), [("flow", 1.0), ("shifted", 3.0)])
def test_points_of_a_flow(name, shift):
    points = teacher_points(SCHEDULES[name], 4)
    line = torch.arange(5, dtype=torch.float64) / 4
    sigma = shift * line / (1 + (shift - 1) * line)
    torch.testing.assert_close(points.sigma_start, sigma[1:])
    torch.testing.assert_close(points.end, 1000 * sigma[:-1])
    assert points.end[0] == 0


@pytest.mark.parametrize("count", [0, 1001])
def test_too_many_points(count):
    with pytest.raises(ValueError, match=f"teacher_points is {count}: this schedule has room for 1 to 1000"):
        teacher_points(NoiseSchedule.linear(), count)


@pytest.mark.parametrize("noise_level", ["paper", "shared"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gamma_one_is_the_start(name, noise_level):
    schedule, points, start, end = every(name)
    one = torch.ones(50, dtype=torch.float64)
    assert torch.equal(weighted(line_weights(schedule.kind, points, one), start, end), start)
    alpha, sigma = line_node(schedule.kind, points, one, noise_level)
    torch.testing.assert_close(alpha, points.alpha_start, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sigma, points.sigma_start)


@pytest.mark.parametrize("noise_level", ["paper", "shared"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gamma_zero_is_the_end_scaled_by_the_drift(name, noise_level):
    schedule, points, start, end = every(name)
    zero = torch.zeros(50, dtype=torch.float64)
    ratio = points.alpha_start / points.alpha_end if name in VP else torch.ones(50, dtype=torch.float64)
    torch.testing.assert_close(weighted(line_weights(schedule.kind, points, zero), start, end), ratio[:, None] * end)
    alpha, sigma = line_node(schedule.kind, points, zero, noise_level)
    torch.testing.assert_close(alpha, ratio * points.alpha_end)
    torch.testing.assert_close(sigma, ratio * points.sigma_end)


@pytest.mark.parametrize("index", [3, 24, 47])
@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_noise_level_on_the_line_by_monte_carlo(name, index):
    """x_s follows from x_e by the forward process: fresh noise, independent of that of x_e."""
    points = teacher_points(SCHEDULES[name])[torch.tensor([index])]
    data, first, second = torch.randn(3, 400_000, dtype=torch.float64)
    ratio = points.alpha_start / points.alpha_end
    end = points.alpha_end * data + points.sigma_end * first
    start = ratio * end + (points.sigma_start**2 - (ratio * points.sigma_end) ** 2).sqrt() * second
    for value in (0.0, 0.3, 0.8, 1.0):
        gamma = torch.tensor([value], dtype=torch.float64)
        on_start, on_end = line_weights("discrete_vp", points, gamma)
        alpha, sigma = line_node("discrete_vp", points, gamma)
        noise = on_start * start + on_end * end - alpha * data
        assert float(noise.std()) == pytest.approx(float(sigma), rel=5e-3)


def test_figures_of_the_middle():
    """Noise level at s = 499, gamma = 1/2: .887 in the paper's form, .911 with shared noise (Stable Diffusion)."""
    points = teacher_points(NoiseSchedule.scaled_linear())[torch.tensor([24])]
    half = torch.tensor([0.5], dtype=torch.float64)
    paper, shared = (float(line_node("discrete_vp", points, half, level)[1]) for level in ("paper", "shared"))
    assert shared > paper
    ratio = float(points.alpha_start / points.alpha_end)
    expected = float((ratio * points.sigma_end) ** 2 * 0.75 + points.sigma_start**2 * 0.25) ** 0.5
    assert paper == pytest.approx(expected)


@pytest.mark.parametrize("name", VP)
def test_shared_noise_is_exact_for_a_perfect_teacher(name):
    """With one data point and one noise, x_g = alpha_s data + sigma_g noise at the `shared` level."""
    schedule, points, data, noise = every(name)
    gamma = torch.rand(50, dtype=torch.float64)
    start = weighted((points.alpha_start, points.sigma_start), data, noise)
    end = weighted((points.alpha_end, points.sigma_end), data, noise)
    node = line_node(schedule.kind, points, gamma, "shared")
    torch.testing.assert_close(
        weighted(line_weights(schedule.kind, points, gamma), start, end), weighted(node, data, noise)
    )


@pytest.mark.parametrize("name", ["flow", "shifted"])
def test_flow_is_exact_on_a_straight_path(name):
    schedule, points, data, noise = every(name)
    gamma = torch.rand(50, dtype=torch.float64)
    start = weighted((points.alpha_start, points.sigma_start), data, noise)
    end = weighted(ddim_weights("flow_prediction", points), start, noise - data)
    point = weighted(line_weights("flow", points, gamma), start, end)
    level = gamma * points.sigma_start + (1 - gamma) * points.sigma_end
    torch.testing.assert_close(point, (1 - level)[:, None] * data + level[:, None] * noise)
    node = line_node("flow", points, gamma)
    torch.testing.assert_close(weighted(consistency_weights(schedule, points.start, *node), point, noise - data), data)


@pytest.mark.parametrize("name", SCHEDULES)
def test_step_is_the_ddim_step(name):
    """The teacher's step between all points is DDIM (flow: Euler), exact outputs or not."""
    schedule, points, start, _ = every(name)
    output = torch.randn_like(start)
    found = weighted(ddim_weights(schedule.prediction_type, points), start, output)
    alpha, sigma = points.alpha_start[:, None], points.sigma_start[:, None]
    if name in ("flow", "shifted"):
        expected = start + (points.sigma_end[:, None] - sigma) * output
    else:
        data, noise = {
            "epsilon": ((start - sigma * output) / alpha, output),
            "v_prediction": (alpha * start - sigma * output, sigma * start + alpha * output),
            "sample": (output, (start - alpha * output) / sigma),
        }[schedule.prediction_type]
        expected = points.alpha_end[:, None] * data + points.sigma_end[:, None] * noise
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_data_prediction_on_the_line(name):
    """An output that is perfect at the node of the line gives the data, up to c_skip."""
    schedule, points, data, noise = every(name)
    node = line_node(schedule.kind, points, torch.rand(50, dtype=torch.float64))
    state = weighted(node, data, noise)
    output = to_output(schedule.prediction_type, data, noise, *node)
    c_skip, c_out = boundary(schedule, points.start)
    found = weighted(consistency_weights(schedule, points.start, *node), state, output)
    torch.testing.assert_close(found, weighted((c_skip, c_out), state, data), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample", "flow", "shifted"])
def test_the_consistency_function_is_the_identity_at_zero(name):
    schedule, zero = SCHEDULES[name], torch.zeros(1, dtype=torch.float64)
    on_state, on_output = consistency_weights(schedule, zero, *schedule.alpha_sigma(zero))
    assert (float(on_state), float(on_output)) == (1.0, 0.0)


def test_boundary_figures():
    c_skip, c_out = boundary(NoiseSchedule.linear(), torch.tensor([0.0, 0.05, 999.0], dtype=torch.float64))
    torch.testing.assert_close(c_skip[:2], torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(c_out[1], torch.tensor(0.5, dtype=torch.float64).sqrt())
    assert 1 - c_out[2] < 1e-8


@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussian_data_leave_no_loss(name):
    """At gamma = 1 with the exact teacher: f_s = rho f_e, rho = (a_e a_s v + s_e s_s) / (a_s^2 v + s_s^2)."""
    schedule, points, data, noise = every(name)
    variance = 0.36
    teacher = gaussian_denoiser(schedule, mean=0.0, std=variance**0.5)
    a_s, s_s, a_e, s_e = points.alpha_start, points.sigma_start, points.alpha_end, points.sigma_end
    rho = (a_e * a_s * variance + s_e * s_s) / (a_s**2 * variance + s_s**2)
    gain = torch.randn(50, dtype=torch.float64)  # of f_e, anything
    weights = Weights.of(schedule, points, torch.ones(50, dtype=torch.float64))

    def solving(gains, pair):
        """A network whose consistency function is gains * x."""
        return lambda x, *_: torch.where(
            pair[1][:, None] == 0, torch.zeros_like(x), (gains - pair[0])[:, None] / pair[1][:, None] * x
        )

    gain = torch.where(weights.target[1] == 0, weights.target[0], gain)
    found, aim = predictions(
        solving(rho * gain, weights.student), solving(gain, weights.target), teacher, weights, data, noise, None, False
    )
    torch.testing.assert_close(found, aim, rtol=1e-7, atol=1e-9)
    assert huber(found - aim, 0.001) < 1e-9
    worse, _ = predictions(
        solving(1.01 * rho * gain, weights.student),
        solving(gain, weights.target),
        teacher,
        weights,
        data,
        noise,
        None,
        False,
    )
    assert huber(worse - aim, 0.001) > 1e-4


def test_the_true_solution_is_nearly_consistent():
    """f = the exact probability flow to t = 0; between 50 points DDIM is inexact by O(step^2)."""
    schedule = NoiseSchedule.linear()
    teacher = gaussian_denoiser(schedule, mean=0.0, std=0.6)

    def error(num_points):
        points = teacher_points(schedule, num_points)
        state = torch.randn(num_points, 5, dtype=torch.float64)
        weights = Weights.of(schedule, points, torch.ones(num_points, dtype=torch.float64))
        end = weighted(weights.step, state, teacher(state, points.start))
        exact = torch.stack(
            [gaussian_solution(schedule, x, s, e, 0.0, 0.6) for x, s, e in zip(state, points.start, points.end)]
        )
        return (end - exact).abs().max()

    assert error(100) < 0.5 * error(50) < 0.05


@pytest.mark.parametrize("name", SCHEDULES)
def test_heuns_step_is_of_second_order(name):
    """Half the step divides the error of DDIM by 4, of this one by 8; and it is smaller."""
    schedule = SCHEDULES[name]
    teacher = gaussian_denoiser(schedule)

    def error(num_points, teacher_step):
        points = teacher_points(schedule, num_points)[torch.arange(num_points // 4, 3 * num_points // 4)]
        state = torch.full((len(points.start), 1), 0.7, dtype=torch.float64)
        gamma = torch.ones(len(points.start), dtype=torch.float64)
        weights = Weights.of(schedule, points, gamma, Objective(teacher_step=teacher_step))
        found = teacher_end(lambda x, time, _: teacher(x, time), weights, state)
        exact = torch.stack([gaussian_solution(schedule, x, s, e) for x, s, e in zip(state, points.start, points.end)])
        return float((found - exact).abs().mean())

    assert error(100, "heun") < 0.18 * error(50, "heun")
    assert 0.2 < error(100, "ddim") / error(50, "ddim") < 0.35
    assert error(50, "heun") < 0.25 * error(50, "ddim")


def test_heuns_last_step_is_ddims():
    """At a noiseless end there is nothing to correct."""
    schedule = NoiseSchedule.flow()
    points = teacher_points(schedule, 4)[torch.tensor([0])]
    state = torch.randn(1, 5, dtype=torch.float64)
    ends = [
        teacher_end(
            lambda x, time, _: gaussian_denoiser(schedule)(x, time.clamp_min(1e-9)),
            Weights.of(schedule, points, torch.ones(1, dtype=torch.float64), Objective(teacher_step=step)),
            state,
        )
        for step in ("ddim", "heun")
    ]
    torch.testing.assert_close(*ends)


def test_losses():
    difference = torch.tensor([0.0, 0.003, -4.0])
    expected = (0.0 + (9e-6 + 1e-6) ** 0.5 - 1e-3 + (16 + 1e-6) ** 0.5 - 1e-3) / 3
    assert float(huber(difference, 0.001)) == pytest.approx(expected, rel=1e-5)
    assert float(l2(difference)) == pytest.approx((9e-6 + 16) / 3)


def test_weights_of_the_loss():
    schedule = NoiseSchedule.linear()
    points, gamma = teacher_points(schedule), torch.ones(50, dtype=torch.float64)
    snr = Weights.of(schedule, points, gamma, Objective(weighting="snr")).loss
    assert snr[0] == 1
    assert float(snr[-1]) == pytest.approx(0.006353 / 0.999980, rel=1e-3)
    assert (Weights.of(schedule, points, gamma).loss == 1).all()


def test_epsilon_without_any_data_is_refused():
    schedule = NoiseSchedule.linear(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="epsilon outputs at alpha = 0"):
        teacher_points(schedule)


def test_weights_move_as_they_are():
    schedule = NoiseSchedule.linear()
    weights = Weights.of(schedule, teacher_points(schedule), torch.rand(50, dtype=torch.float64))
    moved = weights.to(torch.device("cpu"), torch.float32)
    for name, value in vars(weights).items():
        pairs = zip(value, getattr(moved, name)) if isinstance(value, tuple) else [(value, getattr(moved, name))]
        for before, after in pairs:
            assert torch.equal(before.float(), after), name


def test_a_perfect_student_is_sampled_in_one_step():
    """The exact solution map as the consistency function: one step of the table is the whole probability flow."""
    from slam.tables import student_table

    schedule = NoiseSchedule.flow()
    noise = torch.randn(64, 2, dtype=torch.float64)
    table = student_table(schedule, 1)

    def student(x, timestep, condition=None):
        return x - gaussian_solution(schedule, x, timestep, torch.zeros(()), 0.3, 0.6)  # data = x - 1 * v

    found = sample(student, table, noise)
    teacher = sample(gaussian_denoiser(schedule, 0.3, 0.6), named_solver("euler:400", schedule), noise)
    torch.testing.assert_close(found, teacher, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_paper_tells_the_start(name):
    schedule, points, _, _ = every(name)
    node = line_node(schedule.kind, points, torch.rand(50, dtype=torch.float64))
    told, scale = line_call(schedule, points, node)
    assert torch.equal(told, points.start)
    assert torch.equal(scale, torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("noise_level", ["paper", "shared"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_node_of_a_point_is_one_of_the_schedule(name, noise_level):
    """Scaled, the state is what the network knows from its training at the timestep it is told."""
    schedule, points, _, _ = every(name)
    node = line_node(schedule.kind, points, torch.rand(50, dtype=torch.float64), noise_level)
    told, scale = line_call(schedule, points, node, "node")
    alpha, sigma = schedule.alpha_sigma(told)
    torch.testing.assert_close(alpha, node[0] / scale, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(sigma, node[1] / scale, rtol=2e-3, atol=1e-3)
    assert ((told <= points.start + 1e-6) & (told >= points.end - 1e-6)).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_at_gamma_one_both_tell_the_start(name):
    schedule, points, _, _ = every(name)
    node = line_node(schedule.kind, points, torch.ones(50, dtype=torch.float64))
    told, scale = line_call(schedule, points, node, "node")
    torch.testing.assert_close(told, points.start, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(scale, torch.ones_like(scale))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_perfect_student_finds_the_data_from_its_node(name):
    """With one data point and one noise f is c_skip x_g + c_out data, at the timestep that the student is told."""
    schedule, points, data, noise = every(name)
    objective = Objective(noise_level="shared", line_timestep="node")
    weights = Weights.of(schedule, points, torch.rand(50, dtype=torch.float64), objective)
    start = weighted((points.alpha_start, points.sigma_start), data, noise)
    end = weighted((points.alpha_end, points.sigma_end), data, noise)
    point = weighted(weights.line, start, end)
    node = schedule.alpha_sigma(weights.told)
    output = to_output(schedule.prediction_type, data, noise, *(value[:, None] for value in node))
    expected = weighted(boundary(schedule, weights.told), point, data)
    torch.testing.assert_close(weighted(weights.student, point, output), expected, rtol=2e-3, atol=2e-3)
