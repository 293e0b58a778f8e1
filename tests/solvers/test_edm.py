"""EDM: the preconditioning by its formulas, its schedulers in every consumer, its networks from diffusers folders."""

import json

import diffusers
import numpy as np
import pytest
import torch

from denoisers import load_denoiser
from denoisers.checkpoint import save_denoiser
from denoisers.diffusers_models import from_pipeline
from denoisers.dit import DiT
from olss.plan import CallPlan
from olss.run import fit_run
from solver_search.parameters import FreeParameters, PaperParameters
from solvers import (
    NoiseSchedule,
    TableScheduler,
    export_solver,
    identify,
    load_solver,
    named_solver,
    sample,
    save_solver,
    start_noise,
    tabulate,
)
from solvers.prediction import check_prediction_type, edm_prediction, to_data, to_output, velocity_scale
from tests.olss.toy import Toy
from tests.tiny_pipelines import call_arguments, tiny_pipeline
from timestep_tuner.ratios import Ratios

EDM = NoiseSchedule.edm()
LEVELS = torch.tensor([80.0, 3.0, 0.5, 0.002], dtype=torch.float64)


@pytest.mark.parametrize("data_std", [0.5, 1.3, -0.5])
def test_node_timestep_and_output_are_the_papers(data_std):
    """Table 1 of arXiv 2206.00364, on x = data + s noise."""
    schedule = NoiseSchedule.edm(sigma_data=abs(data_std), prediction_type=edm_prediction(data_std))
    power = LEVELS**2 + data_std**2
    c_in, c_skip, c_out = power.rsqrt(), data_std**2 / power, LEVELS * data_std * power.rsqrt()
    told = schedule.timestep(torch.ones(4), LEVELS)
    alpha, sigma = schedule.alpha_sigma(told)
    torch.testing.assert_close(told, LEVELS.log() / 4)
    torch.testing.assert_close((alpha, sigma), (c_in, LEVELS * c_in))
    data, noise = torch.randn(2, 4, 5, dtype=torch.float64)
    x = data + LEVELS[:, None] * noise
    output = to_output(schedule.prediction_type, data, noise, alpha, sigma)
    torch.testing.assert_close(c_skip[:, None] * x + c_out[:, None] * output, data)
    torch.testing.assert_close(to_data(schedule.prediction_type, c_in[:, None] * x, output, alpha, sigma), data)


def test_a_network_at_its_best_has_outputs_of_unit_variance():
    """What the preconditioning is for, at data of standard deviation sigma_data."""
    alpha, sigma = EDM.alpha_sigma(EDM.at_time(torch.linspace(0, 1, 5, dtype=torch.float64)))
    on_data, on_noise = to_output(
        EDM.prediction_type,
        torch.eye(2).double()[:, 0],
        torch.eye(2).double()[:, 1],
        *[torch.stack([value[2], value[2]]) for value in (alpha, sigma)],
    )
    assert float((0.5 * on_data) ** 2 + on_noise**2) == pytest.approx(1)
    torch.testing.assert_close((0.5 * alpha) ** 2 + sigma**2, torch.ones(5).double())


def test_even_times_are_karras_steps():
    """sigma^(1/7) is even, as diffusers spaces them."""
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(6)
    told = EDM.at_time(torch.linspace(1, 0, 6, dtype=torch.float64))
    torch.testing.assert_close((4 * told).exp(), scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)


def test_v_prediction_is_the_member_at_minus_one():
    assert edm_prediction(-1) == "v_prediction"
    assert velocity_scale("v_prediction") == -1
    assert velocity_scale(edm_prediction(0.5)) == 0.5
    assert velocity_scale("epsilon") is None


@pytest.mark.parametrize(
    "text", ["edm:", "edm:0", "edm:nan", "edm:inf", "edm:0.50", "edm:1e400", "edm:-1.0", "edm:x", ["edm:1.0"], None]
)
def test_other_spellings_are_no_prediction_type(text):
    with pytest.raises(ValueError, match="unknown prediction type"):
        check_prediction_type(text)


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
@pytest.mark.parametrize("settings", [{}, {"sigma_data": 1.0, "prediction_type": "v_prediction"}, {"sigma_max": 40.0}])
def test_schedulers_are_recognised(name, settings):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule == NoiseSchedule.from_scheduler({"_class_name": f"{name}Scheduler", **scheduler.config})
    assert schedule.prediction_type == tabulate(scheduler, 3).prediction_type
    assert {"sigma_data": 0.5, "sigma_max": 80.0, **schedule.parameters} | settings == {
        **schedule.parameters,
        **settings,
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseSchedule.edm(sigma_min=80, sigma_max=1), "sigma_min is 80.0, sigma_max 1.0"),
        (lambda: NoiseSchedule.edm(sigma_data=0, prediction_type="sample"), "sigma_data is 0.0: it must be a"),
        (lambda: NoiseSchedule.edm(prediction_type="edm:0.7"), "edm:0.7 is for EDM with sigma_data 0.7, found 0.5"),
        (lambda: NoiseSchedule.linear(prediction_type="edm:0.5"), "is for EDM with sigma_data 0.5, found None"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def rmse(denoiser, table, data) -> float:
    image = sample(denoiser, table, data.states[:, 0], data.condition)
    return float((image - data.states[:, -1]).square().mean().sqrt())


def trajectories(denoiser, table, seeds):
    from data.trajectories import run_teacher

    return run_teacher(denoiser, table, seeds, torch.float64)


@pytest.mark.filterwarnings("ignore:row .* condition number")
@pytest.mark.parametrize(("nfe", "share"), [(3, 0.9), (5, 0.5)])
def test_olss_beats_plain_solvers_on_an_exact_denoiser(nfe, share):
    denoiser, teacher = Toy(EDM).requires_grad_(False), named_solver("euler:40", EDM)
    data, unseen = (trajectories(denoiser, teacher, range(first, first + 32)) for first in (2**31, 0))
    path = [round(i * 39 / nfe) for i in range(nfe)]
    learned = fit_run(denoiser, teacher, [data], CallPlan(tuple(path))).fit.table(teacher).detach()
    assert learned.prediction_type == "edm:0.5"
    plain = [rmse(denoiser, named_solver(f"{name}:{nfe}", EDM), unseen) for name in ("euler", "dpmpp", "ipndm")]
    assert rmse(denoiser, learned, unseen) < share * min(plain)


def test_artifact_and_numpy_export_keep_the_solver(tmp_path):
    denoiser, table = Toy(EDM).requires_grad_(False), named_solver("dpmpp:6", EDM)
    save_solver(table, tmp_path / "edm.json", identify(denoiser), method="test")
    loaded = load_solver(tmp_path / "edm.json", denoiser)
    assert NoiseSchedule.from_dict(loaded.info["schedule"]) == EDM
    assert loaded.prediction_type == "edm:0.5"
    noise, labels = start_noise(range(3), denoiser.sample_shape), torch.tensor([0, 1, 2])
    export_solver(tmp_path / "edm.json", "numpy", tmp_path)
    names: dict = {}
    exec((tmp_path / "solver.py").read_text(), names)

    def network(x, timestep):
        return denoiser(torch.from_numpy(x), torch.tensor(timestep), labels).numpy()

    expected = sample(denoiser, loaded, noise, labels).numpy()
    np.testing.assert_allclose(names["sample"](network, noise.numpy()), expected, atol=2e-5)


def test_the_searches_numbers_lie_on_the_schedule():
    free, paper = FreeParameters(named_solver("euler:5", EDM), (EDM.t_min, EDM.t_max)), PaperParameters(EDM, 5)
    for parameters in (free, paper):
        table = parameters.table(parameters.initial())
        noise = start_noise(range(64), (1, 4, 4), torch.float64)
        image = sample(Toy(EDM).requires_grad_(False), table, noise, torch.zeros(64))
        assert float(image.abs().median()) == pytest.approx(0.8, abs=0.1)
        assert table.consistency().worst < 1e-6
    ratios = Ratios(named_solver("euler:5", EDM), (EDM.t_min, EDM.t_max), free_last=True)
    torch.testing.assert_close(ratios.table(ratios.initial()).timesteps, ratios.base.timesteps, rtol=0, atol=1e-12)
    lowest = ratios.timesteps(torch.zeros(5, dtype=torch.float64))
    assert lowest.tolist() == [EDM.t_min] * 5


SCHEDULERS = {"EDMEuler": diffusers.EDMEulerScheduler, "EDMDPM": diffusers.EDMDPMSolverMultistepScheduler}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_as_playground_has_it(name, tmp_path):
    """Its own images, by the sampler on its tabulated scheduler and by that table as a scheduler inside it."""
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = SCHEDULERS[name]()
    arguments = call_arguments("sdxl", ["a cat", "dog"], 3.0, 4)
    denoiser = from_pipeline(pipe, 16, 16)
    assert denoiser.schedule == EDM
    noise = start_noise([3, 4], denoiser.sample_shape)
    expected = pipe(**arguments, latents=noise).images
    table = tabulate(pipe.scheduler, 4)
    save_solver(table, tmp_path / "edm.json", identify(denoiser, guidance_scale=3.0), method="test")
    pipe.scheduler = TableScheduler.for_pipeline(tmp_path / "edm.json", pipe, guidance_scale=3.0)
    found = pipe(**arguments, latents=noise).images
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_network_from_safetensors(tmp_path):
    """A checkpoint folder keeps the schedule; a network without output predicts c_skip x, and is sampled so."""
    network = DiT(EDM, input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2)
    save_denoiser(network, tmp_path)
    denoiser = load_denoiser(tmp_path)
    assert denoiser.schedule == EDM
    noise = start_noise([5, 6], denoiser.sample_shape, torch.float64)
    found = sample(lambda x, *_: denoiser(x.float(), *_).double(), named_solver("ipndm:1", EDM), noise)
    torch.testing.assert_close(found, 0.25 / (80**2 + 0.25) * (80**2 + 0.25) ** 0.5 * noise)


def test_a_network_from_a_diffusers_folder(tmp_path):
    """A U-Net and its scheduler, sampled as diffusers' own loop samples it."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = diffusers.UNet2DModel(sample_size=8, **blocks, **kinds).eval()
    scheduler = diffusers.EDMEulerScheduler()
    diffusers.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["_class_name"] == "EDMEulerScheduler"
    denoiser = load_denoiser(tmp_path)
    assert denoiser.schedule == EDM
    noise = start_noise([5, 6], denoiser.sample_shape)
    scheduler.set_timesteps(5)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = network(scheduler.scale_model_input(x, timestep), timestep).sample
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    found = sample(denoiser, named_solver("euler:5", denoiser.schedule), noise)
    assert float((found - x).abs().max() / x.abs().max()) < 1e-5
