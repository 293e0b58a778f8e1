"""The student's sampler equals diffusers' own loops with the same noises."""

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler, TCDScheduler

from slam.tables import student_table
from solvers import NoiseSchedule, named_solver, sample, tabulate
from solvers.prediction import to_data

SHAPE = (2, 1, 4, 4)
TYPES = ("epsilon", "v_prediction", "sample")


def network(x, timestep, condition=None):
    """Non-linear, and dependent on the timestep."""
    return torch.tanh(x * (1 + timestep / 1000)) + 0.3 * torch.roll(x, 1, -1)


class Draws:
    """`randn_tensor` that hands out given noises."""

    def __init__(self, noises):
        self.noises = iter(noises)

    def __call__(self, shape, generator=None, device=None, dtype=None, layout=None):
        return next(self.noises).to(dtype)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_equals_the_lcm_scheduler_loop(monkeypatch, steps, prediction_type):
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
    noise, fresh = torch.randn(SHAPE), torch.randn(steps, *SHAPE)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", Draws(fresh))
    betas = {name: schedule.parameters[name] for name in ("beta_schedule", "beta_start", "beta_end")}
    scheduler = LCMScheduler(**betas, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(steps)
    state = noise
    for timestep in scheduler.timesteps:
        state = scheduler.step(network(state, timestep), timestep, state).prev_sample
    table = student_table(schedule, steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(sample(network, table, noise, step_noise=fresh), state, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_the_flow_lcm_scheduler_loop(monkeypatch, steps, shift):
    schedule = NoiseSchedule.flow(shift=shift)
    noise, fresh = torch.randn(SHAPE), torch.randn(steps, *SHAPE)
    table = student_table(schedule, steps)
    scheduler = FlowMatchLCMScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=table.sigma[:-1].tolist())
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", Draws(fresh))
    state = noise
    for timestep in scheduler.timesteps:
        state = scheduler.step(network(state, timestep), timestep, state).prev_sample
    torch.testing.assert_close(sample(network, table, noise, step_noise=fresh), state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_is_the_tabulated_scheduler(steps):
    """Odd counts, and another number of teacher points."""
    schedule = NoiseSchedule.scaled_linear()
    betas = {name: schedule.parameters[name] for name in ("beta_schedule", "beta_start", "beta_end")}
    expected = tabulate(LCMScheduler(**betas, clip_sample=False, original_inference_steps=25), steps)
    found = student_table(schedule, steps, 25)
    assert found.timesteps.tolist() == expected.timesteps.tolist()
    for name in ("state_coef", "output_coef", "noise_coef"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.flow(), NoiseSchedule.continuous_vp()])
def test_rows_keep_to_their_nodes(schedule):
    for steps in (1, 2, 4, 8):
        table = student_table(schedule, steps)
        assert table.nfe == steps
        assert table.consistency().worst < 1e-7
        assert table.timesteps[0] == schedule.t_max
        assert table.unused_evaluations() == []
        assert table.is_stochastic == (steps > 1)


def test_one_step_is_the_data_prediction():
    schedule = NoiseSchedule.flow()
    noise = torch.randn(SHAPE)
    alpha, sigma = schedule.alpha_sigma(1000.0)
    expected = to_data("flow_prediction", noise, network(noise, torch.tensor(1000.0)), alpha, sigma)
    torch.testing.assert_close(sample(network, student_table(schedule, 1), noise), expected)


@pytest.mark.parametrize("steps", [0, 51])
def test_too_many_steps(steps):
    with pytest.raises(ValueError, match=f"is sampled in 1 to 50 steps, not {steps}"):
        student_table(NoiseSchedule.linear(), steps)


def test_all_noise_kept_is_euler():
    schedule = NoiseSchedule.flow()
    table = student_table(schedule, 4, 48, kept_noise=1.0)
    assert not table.is_stochastic
    noise = torch.randn(SHAPE, dtype=torch.float64)
    expected = sample(network, named_solver("euler:4", schedule), noise)
    torch.testing.assert_close(sample(network, table, noise), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [0.0, 0.7, [0.2, 0.5, 0.9]])
@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.flow(), NoiseSchedule.continuous_vp()])
def test_kept_noise_leaves_the_nodes(schedule, kept):
    """What is fresh and what is kept are independent for an exact student, so that their powers add up."""
    table = student_table(schedule, 4, kept_noise=kept)
    assert table.consistency().worst < 1e-7
    assert table.is_stochastic


@pytest.mark.parametrize("eta", [0.3, 0.6])
def test_equals_the_tcd_scheduler_with_its_shares(eta):
    """TCD goes down to a timestep of (1 - eta) and adds noise up to the next."""
    schedule = NoiseSchedule.scaled_linear()
    betas = {name: schedule.parameters[name] for name in ("beta_schedule", "beta_start", "beta_end")}
    expected = tabulate(TCDScheduler(**betas), 4, step={"eta": eta})
    between = ((1 - eta) * expected.timesteps[1:]).floor()
    alpha, sigma = schedule.alpha_sigma(between)
    kept = expected.alpha[1:-1] * sigma / (alpha * expected.sigma[1:-1])
    found = student_table(schedule, 4, 50, kept.tolist())
    assert found.timesteps.tolist() == expected.timesteps.tolist()
    for name in ("state_coef", "output_coef", "noise_coef"):
        torch.testing.assert_close(getattr(found, name)[:-1], getattr(expected, name)[:-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kept", "said"),
    [(1.5, r"kept_noise 1.5 must lie in \[0, 1\]"), ([0.5], "1 shares for 3 steps"), (-0.1, "must lie")],
)
def test_refuses_other_shares(kept, said):
    with pytest.raises(ValueError, match=said):
        student_table(NoiseSchedule.flow(), 4, kept_noise=kept)
