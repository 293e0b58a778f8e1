"""Measured orders against the exact flow of Gaussian data, and twins: tables that theory says are the same."""

import math

import diffusers
import numpy as np
import pytest
import torch

from solvers import NoiseSchedule, SolverTable, ipndm, named_solver, sample, sample_trace, tabulate
from solvers.ipndm import ADAMS_BASHFORTH
from solvers.prediction import to_output
from tests.analytic import two_point_denoiser

STEPS = 4000  # training steps, so that halved step sizes stay whole numbers of them
BETAS = {"num_train_timesteps": STEPS, "beta_start": 0.1 / STEPS, "beta_end": 20 / STEPS}
SCHEDULE = NoiseSchedule.linear(0.1 / STEPS, 20 / STEPS, STEPS)
FLOW = NoiseSchedule.flow()
EDM = NoiseSchedule.edm()
MEAN, STD = 0.3, 0.6


def diffusers_table(name: str, step=None, **settings):
    def build(n: int) -> SolverTable:
        config = BETAS | {"timestep_spacing": "trailing"} | settings
        return tabulate(getattr(diffusers, f"{name}Scheduler")(**config), n, step=step)

    return build


def own(order: int):
    return lambda n: ipndm(SCHEDULE, STEPS - 1 - torch.arange(n) * (STEPS / n), order)


def flow(name: str):
    return lambda n: named_solver(f"{name}:{n}", FLOW)


# builder, order by theory, rows of one step, extra rows of the warm-up. Multistep solvers start with first-order steps,
# so 2 is their order unless a corrector (UniPC) lifts it; iPNDM takes Adams-Bashforth weights of equal steps for
# unequal ones.
ORDERS = {
    "ddim": (diffusers_table("DDIM", clip_sample=False), 1, 1, 0),
    "euler": (diffusers_table("EulerDiscrete"), 1, 1, 0),
    "heun": (diffusers_table("HeunDiscrete"), 2, 2, 0),
    "dpmpp order 1": (diffusers_table("DPMSolverMultistep", solver_order=1), 1, 1, 0),
    "dpmpp": (diffusers_table("DPMSolverMultistep"), 2, 1, 0),
    "dpmpp order 3": (diffusers_table("DPMSolverMultistep", solver_order=3), 2, 1, 0),
    "unipc order 1": (diffusers_table("UniPCMultistep", solver_order=1), 2, 1, 0),
    "unipc": (diffusers_table("UniPCMultistep"), 3, 1, 0),
    "deis": (diffusers_table("DEISMultistep"), 2, 1, 0),
    "lms order 1": (diffusers_table("LMSDiscrete", step={"order": 1}), 1, 1, 0),
    "pndm": (diffusers_table("PNDM"), 2, 1, 9),
    "plms": (diffusers_table("PNDM", skip_prk_steps=True), 2, 1, 1),
    "sa tau 0": (diffusers_table("SASolver", tau_func=lambda timestep: 0), 2, 1, 0),
    "ipndm order 1": (own(1), 1, 1, 0),
    "ipndm order 2": (own(2), 2, 1, 0),
    "ipndm": (own(4), 2, 1, 0),
    "flow euler": (flow("euler"), 1, 1, 0),
    "flow ipndm": (flow("ipndm"), 2, 1, 0),
    "flow dpmpp": (flow("dpmpp"), 2, 1, 0),
    "edm euler": (lambda n: named_solver(f"euler:{n}", EDM), 1, 1, 0),
    "edm dpmpp": (lambda n: named_solver(f"dpmpp:{n}", EDM), 2, 1, 0),
    "edm ipndm": (lambda n: named_solver(f"ipndm:{n}", EDM), 2, 1, 0),
    "flow heun": (lambda n: named_solver(f"heun:{2 * n - 1}", FLOW), 2, 2, 0),
}


def gaussian(table: SolverTable):
    """The exact network of N(MEAN, STD^2) data, told the node rather than the (rounded) timestep."""

    def denoiser(x, timestep, condition, node):
        alpha, sigma = node
        data = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return to_output(table.prediction_type, data, (x - alpha * data) / sigma, alpha, sigma)

    denoiser.needs_node = True
    return denoiser


def error(build, n: int, rows: int, extra: int) -> float:
    """Distance to the exact flow after three quarters of the steps, before the singular last one."""
    table = build(n)
    i = rows * (3 * n // 4) + extra
    noise = torch.tensor([[-1.2], [0.2], [1.7]], dtype=torch.float64)
    start = noise * table.start_scale
    (a0, s0), (a1, s1) = ((table.alpha[j], table.sigma[j]) for j in (0, i))
    scale = ((a1**2 * STD**2 + s1**2) / (a0**2 * STD**2 + s0**2)).sqrt()
    exact = a1 * MEAN + scale * (start - a0 * MEAN)
    return float((sample_trace(gaussian(table), table, noise).states[i] - exact).abs().max())


@pytest.mark.parametrize("name", ORDERS)
def test_measured_order(name):
    build, order, rows, extra = ORDERS[name]
    coarse, fine = (error(build, n, rows, extra) for n in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials_below_its_order(order):
    """sum_k w_k (-k)^p = 1 / (p + 1), the integral of t^p over the next step."""
    weights = ADAMS_BASHFORTH[order - 1]
    for power in range(order):
        assert sum(w * (-k) ** power for k, w in enumerate(weights)) == pytest.approx(1 / (power + 1))
    assert sum(w * (-k) ** order for k, w in enumerate(weights)) != pytest.approx(1 / (order + 1))


def same(first: SolverTable, second: SolverTable, tolerance: float) -> bool:
    """Equal last canonical rows per unit of start noise, timesteps and nodes."""
    one, two = first.canonical(), second.canonical()
    return (
        torch.allclose(one.start / first.start_scale, two.start / second.start_scale, rtol=tolerance, atol=tolerance)
        and torch.allclose(one.output, two.output, rtol=tolerance, atol=tolerance)
        and torch.allclose(one.noise, two.noise, rtol=tolerance, atol=tolerance)
        and torch.allclose(first.timesteps, second.timesteps, atol=tolerance)
    )


def test_ddim_is_euler_is_first_order_dpm_is_first_order_ipndm():
    """One step, x' = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps, in four notations."""
    n = 10
    ddim = diffusers_table("DDIM", clip_sample=False)(n)
    for other in (
        diffusers_table("EulerDiscrete")(n),
        diffusers_table("DPMSolverMultistep", solver_order=1)(n),
        own(1)(n),
    ):
        assert torch.allclose(ddim.timesteps, other.timesteps)
        assert torch.allclose(ddim.alpha, other.alpha, atol=3e-5)
        assert torch.allclose(ddim.canonical().output[-1], other.canonical().output[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ddim.canonical().output[-1], own(2)(n).canonical().output[-1], rtol=1e-4, atol=1e-5)


def test_named_ddim_is_diffusers_ddim_where_that_keeps_its_timesteps():
    schedule = NoiseSchedule.linear()
    theirs = tabulate(diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), 8)
    assert same(named_solver("ddim:8", schedule), theirs, 2e-5)


def test_eta_interpolates_between_ddim_and_ddpm():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    ddpm = tabulate(diffusers.DDPMScheduler(clip_sample=False), 10)
    assert not tabulate(scheduler, 10, step={"eta": 0.0}).is_stochastic
    assert same(tabulate(scheduler, 10, step={"eta": 1.0}), ddpm, 1e-5)
    assert not same(tabulate(scheduler, 10, step={"eta": 0.9}), ddpm, 1e-3)


def test_one_step_lcm_is_one_step_ddim():
    """The boundary scaling of LCM is 1 to within (0.5 / 9990)^2 at the first timestep."""
    lcm = tabulate(diffusers.LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"), 1)
    ddim = tabulate(diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), 1)
    assert torch.allclose(lcm.output_coef, ddim.output_coef, rtol=1e-6)
    assert torch.allclose(lcm.state_coef, ddim.state_coef, rtol=1e-6)


def test_one_step_heun_is_one_step_euler():
    assert same(diffusers_table("HeunDiscrete")(1), diffusers_table("EulerDiscrete")(1), 1e-6)


def test_unipc_without_corrector_is_dpmpp():
    """The predictor of order 1 is the exponential Euler step in both."""
    unipc = diffusers_table("UniPCMultistep", solver_order=1, disable_corrector=list(range(9)))(8)
    assert same(unipc, diffusers_table("DPMSolverMultistep", solver_order=1)(8), 1e-5)


def test_flow_euler_is_first_order_ipndm():
    sigmas = np.linspace(1, 0.125, 8)
    euler = tabulate(diffusers.FlowMatchEulerDiscreteScheduler(), 8, set_timesteps={"sigmas": sigmas})
    assert same(euler, ipndm(FLOW, torch.from_numpy(1000 * sigmas), 1), 1e-7)


@pytest.mark.parametrize("name", ["ddim:8", "dpmpp:8", "unipc:8", "ipndm:8", "deis:8", "euler:8"])
def test_prediction_types_are_one_solver(name):
    """The exact network in every notation gives the same image."""
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    images = []
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        schedule = NoiseSchedule.linear(prediction_type=prediction_type)
        images.append(sample(two_point_denoiser(schedule), named_solver(name, schedule), noise))
    assert torch.allclose(images[0], images[2], atol=2e-3)
    assert torch.allclose(images[1], images[2], atol=2e-3)
    assert float(images[0].abs().median()) == pytest.approx(1, abs=0.15)
