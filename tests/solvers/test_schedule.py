"""NoiseSchedule: the map from timestep to node, its inverse, and its identity."""

import json
import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NoiseSchedule

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled": NoiseSchedule.scaled_linear(prediction_type="v_prediction"),
    "cosine": NoiseSchedule.cosine(),
    "zero-snr": NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "betas": NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.4]),
    "continuous": NoiseSchedule.continuous_vp(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "flow-unit": NoiseSchedule.flow(timestep_scale=1.0),
    "edm": NoiseSchedule.edm(),
}


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (NoiseSchedule.linear(), {}),
        (NoiseSchedule.scaled_linear(), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ),
        (NoiseSchedule.linear(num_train_timesteps=500), {"num_train_timesteps": 500}),
        (NoiseSchedule.from_betas([0.1, 0.2, 0.3]), {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}),
    ],
)
def test_discrete_schedules_are_diffusers(schedule, config):
    scheduler = diffusers.DDIMScheduler(**config)
    alpha, sigma = schedule.alpha_sigma(torch.arange(len(scheduler.alphas_cumprod)))
    cumulative = scheduler.alphas_cumprod.double()
    assert torch.allclose(alpha**2, cumulative, atol=1e-6)
    assert torch.allclose(sigma**2, 1 - cumulative, atol=1e-6)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-14)
    assert schedule == NoiseSchedule.from_scheduler(scheduler)
    assert schedule == NoiseSchedule.from_scheduler(dict(scheduler.config))


def test_zero_snr_ends_without_data():
    alpha, sigma = SCHEDULES["zero-snr"].alpha_sigma(999)
    assert float(alpha) == pytest.approx(0, abs=1e-15)
    assert float(sigma) == 1


def test_flow_schedulers_are_recognised():
    flow = NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert flow == NoiseSchedule.flow(shift=3.0)
    unipc = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    assert NoiseSchedule.from_scheduler(unipc) == NoiseSchedule.flow(shift=2.0)
    alpha, sigma = flow.alpha_sigma(torch.tensor([0.0, 250.0, 1000.0]))
    assert alpha.tolist() == [1.0, 0.75, 0.0]
    assert sigma.tolist() == [0.0, 0.25, 1.0]


def test_flow_schedulers_say_how_many_timesteps_and_where_they_end():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=2.0, shift_terminal=0.1)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule == NoiseSchedule.flow(shift=2.0, timestep_scale=100, shift_terminal=0.1)
    assert schedule.t_max == 100
    scheduler.set_timesteps(5, sigmas=torch.linspace(1, 0.2, 5).tolist())
    timesteps = scheduler.timesteps.double()
    assert torch.allclose(schedule.alpha_sigma(timesteps)[1], scheduler.sigmas[:-1].double(), atol=1e-7)
    assert schedule.fingerprint() != NoiseSchedule.flow(shift=2.0, timestep_scale=100).fingerprint()


@pytest.mark.parametrize("kind", [diffusers.CogVideoXDDIMScheduler, diffusers.CogVideoXDPMScheduler])
@pytest.mark.parametrize(
    "config",
    [{}, {"rescale_betas_zero_snr": True}, {"snr_shift_scale": 1.0}, {"trained_betas": [0.1, 0.2, 0.3, 0.4]}],
)
def test_a_scaled_signal_to_noise_ratio(kind, config):
    """CogVideoX divides the signal-to-noise ratio by `snr_shift_scale`, 3 by default."""
    scheduler = kind(**config)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    alpha, _ = schedule.alpha_sigma(torch.arange(len(scheduler.alphas_cumprod)))
    assert torch.allclose(alpha**2, scheduler.alphas_cumprod.double(), atol=1e-6)
    assert ("snr_shift_scale" in schedule.parameters) == (scheduler.config.snr_shift_scale != 1)


def test_trained_betas_are_rescaled_where_the_scheduler_rescales():
    scheduler = diffusers.DDIMScheduler(trained_betas=[0.1, 0.2, 0.3, 0.4], rescale_betas_zero_snr=True)
    alpha, _ = NoiseSchedule.from_scheduler(scheduler).alpha_sigma(torch.arange(4))
    assert torch.allclose(alpha**2, scheduler.alphas_cumprod.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"shift": 1.0}, "missing timestep_scale, unknown none"),
        ({"shift": 1.0, "timestep_scale": 1000.0, "beta_start": 0.1}, "missing none, unknown beta_start"),
        ({"shift": "3", "timestep_scale": 1000.0}, "shift is 3: it must be a positive number"),
        ({"shift": True, "timestep_scale": 1000.0}, "shift is True: it must be a positive number"),
        ({"shift": 1.0, "timestep_scale": 0}, "timestep_scale is 0: it must be a positive number"),
        ({"shift": 1.0, "timestep_scale": math.inf}, "timestep_scale is inf: it must be a positive number"),
        ({"shift": 1.0, "timestep_scale": 1000.0, "shift_terminal": 1.0}, "shift_terminal is 1.0: it must be between"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule("flow", "flow_prediction", parameters)


def test_continuous_vp_solves_its_equation():
    """d log alpha / dt = -beta(t) / 2 with beta linear from beta_min to beta_max."""
    time = torch.tensor([50.0, 500.0, 900.0], dtype=torch.float64, requires_grad=True)
    alpha, sigma = SCHEDULES["continuous"].alpha_sigma(time)
    (slope,) = torch.autograd.grad(alpha.log().sum(), time)
    beta = 0.1 + 19.9 * time.detach() / 1000
    assert torch.allclose(slope, -beta / 2 / 1000, rtol=1e-10)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(3).double())


def test_between_timesteps_the_angle_is_linear():
    schedule = SCHEDULES["linear"]
    angles = [math.atan2(*reversed([float(v) for v in schedule.alpha_sigma(t)])) for t in (400.0, 400.25, 401.0)]
    assert angles[1] == pytest.approx(0.75 * angles[0] + 0.25 * angles[2], abs=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=25)
@given(fraction=st.floats(1e-3, 1.0))
def test_round_trip(name, fraction):
    schedule = SCHEDULES[name]
    timestep = torch.tensor(fraction * schedule.t_max, dtype=torch.float64)
    assert float(schedule.timestep(*schedule.alpha_sigma(timestep))) == pytest.approx(float(timestep), rel=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_with_the_timestep(name):
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.alpha_sigma(torch.linspace(0, schedule.t_max, 101, dtype=torch.float64))
    assert bool((torch.atan2(sigma, alpha).diff() > 0).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_timestep_gradients(name):
    schedule = SCHEDULES[name]
    timestep = torch.tensor([0.31, 0.77], dtype=torch.float64) * schedule.t_max
    assert torch.autograd.gradcheck(lambda t: schedule.alpha_sigma(t), timestep.requires_grad_(), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_dictionary_and_fingerprint(name):
    schedule = SCHEDULES[name]
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert again.fingerprint() == schedule.fingerprint()


def test_fingerprints_tell_schedules_apart():
    prints = {schedule.fingerprint() for schedule in SCHEDULES.values()}
    assert len(prints) == len(SCHEDULES)
    assert NoiseSchedule.linear(beta_end=0.0201).fingerprint() != NoiseSchedule.linear().fingerprint()
    assert NoiseSchedule.linear(prediction_type="sample").fingerprint() != NoiseSchedule.linear().fingerprint()


def test_beyond_the_ends_is_the_end():
    schedule = SCHEDULES["linear"]
    assert float(schedule.timestep(torch.tensor(0.0), torch.tensor(1.0))) == 999
    assert float(schedule.timestep(torch.tensor(1.0), torch.tensor(0.0))) == 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: NoiseSchedule("vesde", "epsilon", {}), "unknown schedule kind 'vesde': use one of discrete_vp"),
        (lambda: NoiseSchedule.linear(prediction_type="score"), "unknown prediction type 'score'"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.5]), r"betas must be at least two numbers in \(0, 1\]"),
        (lambda: NoiseSchedule.from_betas([0.1]), "at least two numbers"),
        (
            lambda: SCHEDULES["linear"].alpha_sigma(999.5),
            r"timesteps \[999.5\] leave the schedule's range \[0.0, 999.0\]",
        ),
        (lambda: SCHEDULES["flow"].alpha_sigma(-1.0), "leave the schedule's range"),
        (lambda: SCHEDULES["flow"].alpha_sigma(math.nan), "leave the schedule's range"),
        (lambda: NoiseSchedule.from_scheduler({"beta_schedule": "sigmoid"}), "beta schedule 'sigmoid'"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
