"""Tables against diffusers' own loops, with a network that is nonlinear in state, timestep and condition."""

import copy
import inspect
import threading

import diffusers
import numpy as np
import pytest
import torch

from solvers import NoiseSchedule, SolverTable, sample, tabulate

EXACT, SINGLE = 1e-12, 3e-5  # the second where diffusers rounds samples or coefficients to float32
DISCRETE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# class, settings, n, rows, tolerance, further arguments of set_timesteps and step
CASES = {
    "ddim": ("DDIM", {"clip_sample": False}, 7, 7, EXACT),
    "ddim-linspace": ("DDIM", {"clip_sample": False, "timestep_spacing": "linspace"}, 7, 7, EXACT),
    "ddim-trailing": ("DDIM", {"clip_sample": False, "timestep_spacing": "trailing"}, 7, 7, EXACT),
    "ddim-leading": ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 7, 7, EXACT),
    "ddim-v": ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction"}, 7, 7, EXACT),
    "ddim-x": ("DDIM", {"clip_sample": False, "prediction_type": "sample"}, 7, 7, EXACT),
    "ddim-zero-snr": (
        "DDIM",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        7,
        7,
        EXACT,
    ),
    "ddim-eta": ("DDIM", {"clip_sample": False}, 7, 7, EXACT, {}, {"eta": 0.7}),
    "ddim-parallel": ("DDIMParallel", {"clip_sample": False}, 7, 7, EXACT, {}, {"eta": 1.0}),
    "ddim-cogvideox": ("CogVideoXDDIM", {"clip_sample": False, "prediction_type": "v_prediction"}, 6, 6, EXACT),
    "ddpm": ("DDPM", {"clip_sample": False}, 7, 7, EXACT),
    "ddpm-large": ("DDPM", {"clip_sample": False, "variance_type": "fixed_large"}, 7, 7, EXACT),
    "ddpm-timesteps": ("DDPM", {"clip_sample": False}, None, 3, EXACT, {"timesteps": [900, 500, 100]}),
    "unclip": ("UnCLIP", {"clip_sample": False}, 6, 6, EXACT),
    "lcm": ("LCM", DISCRETE, 4, 4, EXACT),
    "tcd": ("TCD", DISCRETE, 4, 4, EXACT, {}, {"eta": 0.3}),
    "pndm": ("PNDM", {}, 6, 15, EXACT),
    "plms": ("PNDM", {"skip_prk_steps": True}, 6, 7, EXACT),
    "euler": ("EulerDiscrete", {}, 7, 7, SINGLE),
    "euler-karras": ("EulerDiscrete", {"use_karras_sigmas": True}, 7, 7, SINGLE),
    "euler-v-leading": (
        "EulerDiscrete",
        {"prediction_type": "v_prediction", "timestep_spacing": "leading"},
        7,
        7,
        SINGLE,
    ),
    "euler-ancestral": ("EulerAncestralDiscrete", {}, 7, 7, SINGLE),
    "heun": ("HeunDiscrete", {}, 4, 7, SINGLE),
    "kdpm2": ("KDPM2Discrete", {}, 4, 7, SINGLE),
    "kdpm2-ancestral": ("KDPM2AncestralDiscrete", {}, 4, 7, SINGLE),
    "lms": ("LMSDiscrete", {}, 7, 7, SINGLE),
    "lms-order": ("LMSDiscrete", {}, 7, 7, SINGLE, {}, {"order": 2}),
    "dpmpp": ("DPMSolverMultistep", {}, 7, 7, SINGLE),
    "dpmpp-3-karras": ("DPMSolverMultistep", {"solver_order": 3, "use_karras_sigmas": True}, 7, 7, SINGLE),
    "dpm-heun": (
        "DPMSolverMultistep",
        {"algorithm_type": "dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"},
        7,
        7,
        SINGLE,
    ),
    "dpmpp-sde": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, 7, 7, SINGLE),
    "dpmpp-flow": (
        "DPMSolverMultistep",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        7,
        7,
        SINGLE,
    ),
    "dpm-single": ("DPMSolverSinglestep", {"lower_order_final": True}, 7, 7, SINGLE),
    "edm-euler": ("EDMEuler", {}, 7, 7, SINGLE),
    "edm-euler-v": ("EDMEuler", {"prediction_type": "v_prediction", "sigma_data": 0.8}, 7, 7, SINGLE),
    "edm-euler-exponential": ("EDMEuler", {"sigma_schedule": "exponential", "sigma_data": 1.0}, 7, 7, SINGLE),
    "edm-dpm": ("EDMDPMSolverMultistep", {}, 7, 7, SINGLE),
    "edm-dpm-3-v": ("EDMDPMSolverMultistep", {"solver_order": 3, "prediction_type": "v_prediction"}, 7, 7, SINGLE),
    "unipc": ("UniPCMultistep", {}, 7, 7, SINGLE),
    "unipc-3-bh1": (
        "UniPCMultistep",
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        7,
        7,
        SINGLE,
    ),
    "unipc-flow": ("UniPCMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, 7, 7, SINGLE),
    "unipc-flow-mu": (
        "UniPCMultistep",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True},
        7,
        7,
        SINGLE,
        {"mu": 0.8},
    ),
    "deis": ("DEISMultistep", {}, 7, 7, SINGLE),
    "deis-3": ("DEISMultistep", {"solver_order": 3}, 7, 7, SINGLE),
    "sa": ("SASolver", {}, 7, 7, SINGLE),
    "sa-tau-0": ("SASolver", {"tau_func": lambda timestep: 0}, 7, 7, SINGLE),
    "flow-euler": ("FlowMatchEulerDiscrete", {"shift": 3.0}, 7, 7, SINGLE),
    "flow-euler-mu": (
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True},
        5,
        5,
        SINGLE,
        {"mu": 1.1, "sigmas": np.linspace(1, 0.2, 5)},
    ),
    "flow-euler-noise": ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, 7, 7, SINGLE),
    "flow-heun": ("FlowMatchHeunDiscrete", {"shift": 2.0}, 4, 7, SINGLE),
    "flow-lcm": ("FlowMatchLCM", {}, 5, 5, SINGLE),
    "flow-ltx": ("LTXEulerAncestralRF", {}, 5, 5, SINGLE),
}
STOCHASTIC = {
    *("ddim-eta", "ddim-parallel", "ddpm", "ddpm-large", "ddpm-timesteps", "unclip", "lcm", "tcd", "euler-ancestral"),
    *("kdpm2-ancestral", "dpmpp-sde", "sa", "flow-euler-noise", "flow-lcm", "flow-ltx"),
}


def make(name: str):
    return getattr(diffusers, f"{CASES[name][0]}Scheduler")(**CASES[name][1])


def arguments(name: str) -> tuple[dict, dict]:
    further = [*CASES[name][5:], {}, {}]
    return further[0], further[1]


def network(x, timestep, condition):
    phase = torch.sin(0.01 * torch.as_tensor(timestep).to(x) + condition)
    return torch.tanh(0.8 * x + phase) + 0.1 * x.roll(1, -1) ** 2 / (1 + x.abs())


def diffusers_loop(scheduler, n, noise, condition, further, step):
    """What a pipeline does, and the noises the scheduler drew for it."""
    scheduler.set_timesteps(**({} if n is None else {"num_inference_steps": n}), **further)
    generator = torch.Generator().manual_seed(3)
    x, noises = noise * getattr(scheduler, "init_noise_sigma", 1.0), []
    accepted = inspect.signature(scheduler.step).parameters
    for i, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        extra = dict(step)
        if "generator" in accepted:
            extra["generator"] = generator
        if "prev_timestep" in accepted:
            extra["prev_timestep"] = scheduler.timesteps[i + 1] if i + 1 < len(scheduler.timesteps) else None
        before = generator.get_state()
        output = network(seen, timestep, condition)
        x = scheduler.step(output, timestep, x, return_dict=False, **extra)[0]
        noises.append(replayed(before, generator, noise))
    return x, torch.stack(noises)


def replayed(before, generator, noise):
    """The noise drawn between two states of a generator, or zeros when none was."""
    if torch.equal(before, generator.get_state()):
        return torch.zeros_like(noise)
    for dtype in (torch.float64, torch.float32):
        again = torch.Generator()
        again.set_state(before)
        drawn = torch.randn(noise.shape, generator=again, dtype=dtype)
        if torch.equal(again.get_state(), generator.get_state()):
            return drawn.double()
    raise AssertionError("more than one draw")


@pytest.mark.parametrize("name", CASES)
def test_table_reproduces_diffusers(name):
    _, _, n, rows, tolerance, *_ = CASES[name]
    further, step = arguments(name)
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    condition = torch.tensor([0.3, -1.2], dtype=torch.float64).reshape(2, 1, 1, 1)
    table = tabulate(make(name), n, set_timesteps=further, step=step)
    expected, noises = diffusers_loop(make(name), n, noise, condition, further, step)
    actual = sample(network, table, noise, condition, step_noise=noises)
    assert table.nfe == rows
    assert table.is_stochastic == (name in STOCHASTIC)
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def test_the_network_of_these_tests_depends_on_everything():
    x, t = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.tensor(300.0)
    base = network(x, t, 0.0)
    assert all(
        float((other - base).abs().max()) > 1e-3
        for other in (network(x, t + 20, 0.0), network(x, t, 0.2), network(1.1 * x, t, 0.0))
    )


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("ddpm", 1e-6), ("dpmpp", 2e-5), ("euler", 2e-5), ("heun", 2e-5), ("unipc", 2e-5), ("euler-ancestral", 1e-5)],
)
def test_nodes_are_where_the_scheduler_is(name, tolerance):
    """Sums over all rows, so the tolerance is that of float32 coefficients."""
    scheduler = make(name)
    table = tabulate(scheduler, CASES[name][2])
    scheduler.set_timesteps(CASES[name][2])
    index = torch.linspace(0, 999, 1000, dtype=torch.float64).numpy()
    ratio = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double().numpy()
    told = torch.from_numpy(np.interp(scheduler.timesteps.double().numpy(), index, ratio)).atan()
    assert torch.allclose(torch.atan2(table.sigma, table.alpha)[:-1], told, atol=tolerance, rtol=0)
    assert torch.allclose(table.alpha**2 + table.sigma**2, torch.ones(table.nfe + 1).double(), atol=tolerance)
    assert abs(float(table.alpha[-1]) - 1) < tolerance
    assert table.consistency().worst < 1e-12


def test_nodes_of_flow_and_edm_schedulers():
    flow = tabulate(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
    assert torch.allclose(flow.alpha + flow.sigma, torch.ones(6).double(), atol=1e-7)
    assert torch.allclose(flow.timesteps, 1000 * flow.sigma[:-1], atol=1e-3)
    edm = tabulate(make("edm-euler"), 5)
    alpha, sigma = NoiseSchedule.edm().alpha_sigma(edm.timesteps)
    torch.testing.assert_close(edm.alpha, torch.cat([alpha, torch.ones(1).double()]), rtol=1e-6, atol=0)
    torch.testing.assert_close(edm.sigma, torch.cat([sigma, torch.zeros(1).double()]), rtol=1e-6, atol=1e-6)
    assert edm.prediction_type == "edm:0.5"
    assert tabulate(make("edm-euler-v"), 5).prediction_type == "edm:-0.8"


def test_nodes_are_not_taken_from_the_timesteps():
    """diffusers' DDIM steps back by 1000 // 7 = 142 while its timesteps are 166 apart with linspace spacing."""
    table = tabulate(make("ddim-linspace"), 7)
    cumulative = make("ddim-linspace").alphas_cumprod.double()
    assert table.timesteps[:2].tolist() == [999, 832]
    assert float(table.alpha[1]) == pytest.approx(float(cumulative[999 - 142].sqrt()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "n", "unused"),
    [("pndm", 6, [14]), ("plms", 6, [6]), ("dpmpp", 6, []), ("ddim-leading", 5, []), ("heun", 4, [])],
)
def test_unused_evaluations(name, n, unused):
    assert tabulate(make(name), n).unused_evaluations() == unused


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        lambda: diffusers.DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_last_evaluations_in_vain(scheduler):
    assert tabulate(scheduler(), 5).unused_evaluations() == [4]


def test_scheduler_is_left_alone():
    scheduler = make("dpmpp")
    scheduler.set_timesteps(4)
    before = copy.deepcopy(vars(scheduler))
    tabulate(scheduler, 9)
    assert torch.equal(scheduler.timesteps, before["timesteps"])
    assert scheduler._step_index == before["_step_index"]


def test_other_threads_keep_their_noise_while_a_scheduler_is_tabulated():
    module = inspect.getmodule(diffusers.DDPMScheduler)
    drawn, original = [], module.randn_tensor

    class Watched(diffusers.DDPMScheduler):
        def step(self, *args, **kwargs):
            thread = threading.Thread(target=lambda: drawn.append(module.randn_tensor((3, 5))))
            thread.start()
            thread.join()
            return super().step(*args, **kwargs)

    tabulate(Watched(clip_sample=False), 2)
    assert all(values.shape == (3, 5) and float(values.std()) > 0.1 for values in drawn)
    assert len(drawn) == 4
    assert module.randn_tensor is original


class TwoDraws(diffusers.DDPMScheduler):
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        first = super().step(model_output, timestep, sample, return_dict=False)[0]
        return (super().step(model_output, timestep, first, return_dict=False)[0],)


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (lambda: diffusers.DDIMScheduler(), "DDIMScheduler is not linear with these settings"),
        (lambda: diffusers.DDPMScheduler(), "use DDPMScheduler.from_config.scheduler.config, clip_sample=False"),
        (lambda: diffusers.DDIMScheduler(clip_sample=False, thresholding=True), "is not linear"),
        (lambda: diffusers.DPMSolverMultistepScheduler(thresholding=True), "is not linear"),
        (lambda: diffusers.UniPCMultistepScheduler(thresholding=True), "is not linear"),
        (lambda: diffusers.LCMScheduler(clip_sample=True), "is not linear"),
        (lambda: diffusers.HeunDiscreteScheduler(clip_sample=True), "is not linear"),
        (lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"), "learned_range"),
        (lambda: diffusers.DDIMInverseScheduler(clip_sample=False), "runs from image to noise"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (lambda: diffusers.IPNDMScheduler(), "solvers.ipndm builds iPNDM"),
        (lambda: diffusers.SCMScheduler(), "prediction type 'trigflow'"),
        (lambda: diffusers.CogVideoXDPMScheduler(clip_sample=False), "has to tell CogVideoXDPMScheduler its old"),
        (lambda: diffusers.UniPCMultistepScheduler(solver_type="bh1"), "not finite with these settings"),
        (lambda: TwoDraws(clip_sample=False), "draws more than one noise"),
        (lambda: torch.nn.Identity(), "Identity is no diffusers scheduler"),
    ],
)
def test_refusals(scheduler, match):
    with pytest.raises(ValueError, match=match):
        tabulate(scheduler(), 5)


def test_wrong_arguments_are_one_clear_error():
    with pytest.raises(ValueError, match=r"DDIMScheduler\.set_timesteps\(mu=1.0, num_inference_steps=5\) fails"):
        tabulate(make("ddim"), 5, set_timesteps={"mu": 1.0})
    with pytest.raises(ValueError, match=r"DDIMScheduler\.step cannot be tabulated"):
        tabulate(make("ddim"), 5, step={"order": 2})


def test_large_tables_are_quick_and_triangular():
    table = tabulate(make("ddpm"), 250)
    assert isinstance(table, SolverTable)
    assert torch.equal(table.output_coef, torch.diag(table.output_coef.diagonal()))
