"""TableScheduler in real pipelines: what a pipeline computes with it is what `sample` computes."""

import inspect
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)

from solvers import (
    Bands,
    DenoiserIdentity,
    NoiseSchedule,
    SolverError,
    SolverTable,
    TableScheduler,
    export_solver,
    load_solver,
    named_solver,
    row_noise,
    sample,
    sample_trace,
    save_solver,
    start_noise,
    tabulate,
)
from solvers.standalone.table_scheduler import TableScheduler as StandaloneScheduler
from solvers.table_json import table_to_dict
from tests.analytic import gaussian_denoiser, two_point_denoiser
from tests.tiny_pipelines import KINDS, call_arguments, tiny_pipeline

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["a cat", "the dogs"]
VP = NoiseSchedule.linear()


def solver(name=DPMSolverMultistepScheduler, steps: int = 4, **config) -> SolverTable:
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"}
    return tabulate(name(**settings | config), steps)


def pipeline_table(pipe, kind: str, steps: int) -> SolverTable:
    """A solver of the pipeline's own schedule: second order where it is VP, with the call's shift for Flux."""
    if kind == "flux":
        return tabulate(
            pipe.scheduler, None, set_timesteps={"sigmas": [1 - i / steps for i in range(steps)], "mu": 0.5}
        )
    if kind == "sd3":
        return tabulate(pipe.scheduler, steps)
    config = dict(pipe.scheduler.config) | {"timestep_spacing": "trailing"}
    return tabulate(DPMSolverMultistepScheduler.from_config(config), steps)


class Recorder(TableScheduler):
    """Keeps what a pipeline passes to `step` and gets from it."""

    def _select(self, count, device):
        super()._select(count, device)
        self.calls = []

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        result = super().step(model_output, timestep, sample, generator, return_dict)
        previous = result.prev_sample if return_dict else result[0]
        self.calls.append([value.clone() for value in (sample, timestep, model_output, previous)])
        return result


def assert_same_as_sample(calls, table: SolverTable, size: int, seeds=None) -> None:
    """Replay the network's outputs through `sample`: states, timesteps and the result are the pipeline's."""
    rows = iter(calls)

    def replay(x, timestep, condition):
        state, told, output, _ = next(rows)
        scale = state.abs().max()
        assert (x - state[:size]).abs().max() <= 1e-6 * scale
        assert timestep == told
        return output[:size]

    noise = calls[0][0][:size] / table.start_scale
    image = sample(replay, table, noise, seeds=seeds)
    assert len(calls) == table.nfe
    assert (image - calls[-1][3][:size]).abs().max() <= 1e-6 * image.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_compute_what_sample_computes(kind):
    pipe = tiny_pipeline(kind)
    table = pipeline_table(pipe, kind, 4)
    pipe.scheduler = Recorder.from_solver(table)
    pipe(**call_arguments(kind, PROMPTS, 3.0, table.nfe), generator=torch.Generator().manual_seed(0))
    calls = pipe.scheduler.calls
    assert len(calls[0][0]) == (4 if kind == "dit" else 2)  # DiT doubles the batch under guidance
    assert_same_as_sample(calls, table, 2)


def test_a_pipeline_with_the_table_equals_the_pipeline_with_the_scheduler():
    pipe = tiny_pipeline("sd")
    arguments = call_arguments("sd", PROMPTS, 3.0, 4) | {"output_type": "latent"}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    pipe.scheduler = TableScheduler.from_solver(tabulate(pipe.scheduler, 4))
    found = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_noise_comes_from_the_scheduler_seed(kind):
    pipe = tiny_pipeline(kind)
    config = dict(pipe.scheduler.config) | {"timestep_spacing": "trailing"}
    table = tabulate(EulerAncestralDiscreteScheduler.from_config(config), 3)
    pipe.scheduler = Recorder.for_pipeline(table_artifact(table, pipe), pipe, seed=5)
    pipe(**call_arguments(kind, PROMPTS, 3.0, 3), generator=torch.Generator().manual_seed(0))
    assert_same_as_sample(pipe.scheduler.calls, table, 2, seeds=[5, 6])


def table_artifact(table: SolverTable, pipe) -> SolverTable:
    """The table as if loaded from an artifact made for a pipeline."""
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    info = {"schedule": schedule.to_dict() | {"fingerprint": schedule.fingerprint()}, "guidance_scale": 3.0}
    return SolverTable(
        **{name: getattr(table, name) for name in table.__dataclass_fields__ if name != "info"}, info=info
    )


def run(scheduler, denoiser, noise, steps=None, generator=None):
    """The loop every Stable Diffusion pipeline runs."""
    scheduler.set_timesteps(steps)
    state = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = denoiser(scheduler.scale_model_input(state, timestep), timestep)
        state = scheduler.step(output, timestep, state, generator=generator).prev_sample
    return state


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_loop_equals_sample_in_float64(kind):
    table = solver(steps=6, prediction_type=kind)
    denoiser = two_point_denoiser(NoiseSchedule.linear(prediction_type=kind))
    noise = start_noise([3, 4], (2, 5), torch.float64)
    expected = sample(denoiser, table, noise)
    found = run(TableScheduler.from_solver(table), lambda x, t: denoiser(x, t.double()), noise)
    assert (found - expected).abs().max() < 1e-6  # timesteps are float32 in a scheduler


def test_start_scale_and_repeated_timesteps():
    table = solver(EulerDiscreteScheduler, 5)
    assert table.start_scale != 1
    repeated = SolverTable(
        **{name: getattr(table, name) for name in table.__dataclass_fields__ if name not in ("timesteps", "info")},
        timesteps=torch.tensor([900.25, 900.25, 500.5, 500.5, 1.0], dtype=torch.float64),
    )
    noise = start_noise([3, 4], (2, 5), torch.float64)
    denoiser = gaussian_denoiser(VP)
    scheduler = TableScheduler.from_solver(repeated)
    assert scheduler.timesteps.tolist() == [900.25, 900.25, 500.5, 500.5, 1.0]  # fractions stay
    assert scheduler.init_noise_sigma == table.start_scale
    assert torch.allclose(run(scheduler, denoiser, noise), sample(denoiser, repeated, noise), rtol=0, atol=1e-12)


def test_runs_leave_nothing_behind():
    table = solver(steps=4)
    scheduler, denoiser = TableScheduler.from_solver(table), two_point_denoiser(VP)
    noise = start_noise([0], (2, 3))
    first = run(scheduler, denoiser, noise)
    scheduler.set_timesteps(4)
    scheduler.step(noise, scheduler.timesteps[0], noise)  # a run that stops early
    assert torch.equal(run(scheduler, denoiser, noise), first)
    assert scheduler.step_index == 4
    assert all(not values for values in scheduler._history)
    with pytest.raises(ValueError, match="all 4 steps are done"):
        scheduler.step(noise, scheduler.timesteps[-1], noise)


def test_the_received_sample_is_stored():
    """A pipeline that changes the sample between steps (inpainting) is followed."""
    table, noise = solver(steps=3), start_noise([0], (4,), torch.float64)
    scheduler = TableScheduler.from_solver(table)
    changed, outputs = noise + 0.5, [torch.ones_like(noise) * k for k in (0.3, -0.2, 0.1)]
    first = scheduler.step(outputs[0], 999, noise).prev_sample
    second = scheduler.step(outputs[1], 666, changed).prev_sample
    assert not torch.allclose(first, changed)
    expected = table.state_coef[1, 0] * noise + table.state_coef[1, 1] * changed
    expected = expected + table.output_coef[1, 0] * outputs[0] + table.output_coef[1, 1] * outputs[1]
    assert torch.allclose(second, expected, rtol=0, atol=1e-12)


def test_half_precision_pipelines_accumulate_in_float32():
    """The state a half-precision pipeline hands back is a rounding of what `step` knows: 100 of them do not add up."""
    steps = 100
    eye, zero = torch.eye(steps, dtype=torch.float64), torch.zeros(steps, steps, dtype=torch.float64)
    nodes = torch.ones(steps + 1, dtype=torch.float64)
    table = SolverTable(nodes[1:], nodes, nodes, eye, 1e-4 * eye, zero, 1.0, "sample")
    noise = torch.ones(2, 3, dtype=torch.float16)
    found = run(TableScheduler.from_solver(table), lambda x, t: torch.ones_like(x), noise)
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.full_like(noise, 1.01))  # each 1e-4 alone would be rounded away
    scheduler = TableScheduler.from_solver(table)
    first = scheduler.step(noise, 1, noise).prev_sample
    assert torch.equal(scheduler.step(noise, 1, first + 1).prev_sample, first + 1)  # a changed sample counts


def test_noise_of_a_generator_of_a_list_and_of_seeds():
    table, noise = solver(EulerAncestralDiscreteScheduler, 3), start_noise([7, 8], (4, 4))
    denoiser = gaussian_denoiser(VP)
    scheduler = TableScheduler.from_solver(table)
    draws = torch.stack(
        [torch.randn(2, 4, 4, generator=g) for g in [torch.Generator().manual_seed(1)] for _ in range(2)]
    )
    step_noise = torch.cat([draws, torch.zeros(1, 2, 4, 4)])
    assert table.noise_coef[2].abs().sum() == 0
    found = run(scheduler, denoiser, noise, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found, sample(denoiser, table, noise, step_noise=step_noise), rtol=0, atol=1e-6)
    scheduler.seed = [70, 7]
    found = run(scheduler, denoiser, noise, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found, sample(denoiser, table, noise, seeds=[70, 7]), rtol=0, atol=1e-6)
    assert torch.equal(scheduler._noise(2, noise, None), row_noise([70, 7], 2, (4, 4)))
    scheduler.seed = [1, 2, 3]
    with pytest.raises(ValueError, match="3 seeds for a batch of 2"):
        run(scheduler, denoiser, noise)
    scheduler.seed = 2**32
    with pytest.raises(ValueError, match="outside 0 to"):
        run(scheduler, denoiser, noise)


def test_several_numbers_of_steps_in_one_scheduler():
    tables = [solver(steps=4), solver(steps=6)]
    scheduler = TableScheduler.from_solver(tables)
    noise, denoiser = start_noise([0], (3,)), gaussian_denoiser(VP)
    for table in tables:
        expected = sample(denoiser, table, noise)
        assert torch.allclose(run(scheduler, denoiser, noise, table.nfe), expected, rtol=0, atol=1e-6)
        assert scheduler.num_inference_steps == len(scheduler.timesteps) == len(scheduler.sigmas) - 1 == table.nfe
    assert scheduler.available_steps == [4, 6]
    for count in (5, None):
        with pytest.raises(ValueError, match=rf"num_inference_steps is {count}: .* tables for \[4, 6\] steps"):
            scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match="each with another number"):
        TableScheduler.from_solver([tables[0], tables[0]])
    with pytest.raises(SolverError, match="different models or scales"):
        TableScheduler.from_solver([tables[0], solver(steps=6, prediction_type="sample")])


def test_sigmas_and_timesteps_of_a_pipeline_are_counted_and_checked():
    scheduler = TableScheduler.from_solver(solver(steps=4))
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], device="cpu")
    scheduler.set_timesteps(timesteps=scheduler.timesteps.tolist())
    with pytest.raises(ValueError, match="this solver has its own steps"):
        scheduler.set_timesteps(sigmas=[14.6, 3.0, 1.0, 0.2])
    with pytest.raises(ValueError, match="this solver's own are"):
        scheduler.set_timesteps(timesteps=[999, 700, 400, 100])
    allowed = TableScheduler.from_solver(solver(steps=4), allow_mismatch="timesteps")
    allowed.set_timesteps(timesteps=[999, 700, 400, 100])
    assert torch.equal(allowed.timesteps, scheduler.timesteps)
    with pytest.raises(ValueError, match="this solver has its own steps"):
        allowed.set_timesteps(sigmas=[14.6, 3.0, 1.0, 0.2])
    with pytest.raises(SolverError, match="allow_mismatch is True: name the check that it lifts, one of prediction"):
        TableScheduler.from_solver(solver(steps=4), allow_mismatch=True)


def test_sigmas_are_ratios_of_the_nodes():
    vp, flow = solver(steps=4), flow_solver(4)
    assert torch.allclose(TableScheduler.from_solver(vp).sigmas.double(), vp.sigma / vp.alpha, rtol=1e-6)
    assert torch.allclose(TableScheduler.from_solver(flow).sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]), atol=1e-6)


def flow_solver(steps: int) -> SolverTable:
    """Euler on a flow with shift 3."""
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma = 3 * sigma / (1 + 2 * sigma)
    zero = torch.zeros(steps, steps, dtype=torch.float64)
    return SolverTable(
        1000 * sigma[:-1],
        1 - sigma,
        sigma,
        torch.eye(steps).double(),
        sigma.diff().diag(),
        zero,
        1.0,
        "flow_prediction",
    )


def test_add_noise_uses_the_row_or_the_schedule():
    table = solver(steps=4)
    scheduler = TableScheduler.from_solver(table, schedule=VP)
    data, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    found = scheduler.add_noise(data, noise, scheduler.timesteps[:1])
    assert torch.allclose(found, table.alpha[0] * data + table.sigma[0] * noise, rtol=0, atol=1e-12)
    alpha, sigma = (value.reshape(2, 1, 1) for value in VP.alpha_sigma(torch.tensor([10.0, 400.5])))
    found = scheduler.add_noise(data, noise, torch.tensor([10.0, 400.5]))
    assert torch.allclose(found, alpha * data + sigma * noise, rtol=0, atol=1e-6)
    bare = TableScheduler.from_solver(table)
    found = bare.add_noise(data, noise, bare.timesteps[2])
    assert torch.allclose(found, table.alpha[2] * data + table.sigma[2] * noise, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="add_noise knows the timesteps"):
        bare.add_noise(data, noise, torch.tensor([10.0, 400.5]))


def test_image_to_image_starts_later_with_a_one_step_solver_only():
    pipe = tiny_pipeline("sd")
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    config = dict(pipe.scheduler.config) | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    table = tabulate(DDIMScheduler.from_config(config), 4)
    scheduler = Recorder.from_solver(table, schedule=schedule)
    image_pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_pipe.set_progress_bar_config(disable=True)
    image_pipe.scheduler = scheduler
    arguments = {"prompt": ["a cat"], "image": torch.zeros(1, 3, 16, 16), "num_inference_steps": 4, "strength": 0.5}
    arguments |= {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    result = image_pipe(**arguments).images
    calls = scheduler.calls
    assert [float(call[1]) for call in calls] == table.timesteps.tolist()[2:]
    state = calls[0][0]
    for row, call in enumerate(calls, start=2):
        assert torch.allclose(call[0], state, atol=1e-6)
        state = table.state_coef[row, row] * call[0] + table.output_coef[row, row] * call[2]
    assert torch.allclose(result, state.float(), atol=1e-5)
    image_pipe.scheduler = TableScheduler.from_solver(pipeline_table(pipe, "sd", 4), schedule=schedule)
    with pytest.raises(ValueError, match="cannot start at row 2"):
        image_pipe(**arguments)


def test_image_to_image_takes_a_later_table_where_the_first_cannot_start_later():
    """As diffusers does, whose multistep schedulers begin anew at first order: the same images."""
    pipe = tiny_pipeline("sd")
    image_pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_pipe.set_progress_bar_config(disable=True)
    own = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    arguments = {"prompt": ["a cat"], "image": torch.zeros(1, 3, 16, 16), "num_inference_steps": 6, "strength": 0.5}

    def run_with(scheduler):
        image_pipe.scheduler = scheduler
        return image_pipe(**arguments, output_type="latent", generator=torch.Generator().manual_seed(0)).images

    expected, whole = run_with(own), tabulate(own, 6)
    later = tabulate(own, None, set_timesteps={"timesteps": whole.timesteps[3:].long().tolist()})
    scheduler = TableScheduler.from_solver(whole, later=later)
    found = run_with(scheduler)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (scheduler.begin_index, scheduler.step_index) == (3, 6)
    assert scheduler.available_steps == [6]
    scheduler.set_timesteps(6)
    assert scheduler.init_noise_sigma == whole.start_scale
    assert scheduler.sigmas.tolist() == TableScheduler.from_solver(whole).sigmas.tolist()
    with pytest.raises(ValueError, match="cannot start at row 4"):
        scheduler.set_begin_index(4)


@pytest.mark.parametrize(
    ("kind", "image_class"), [("sd3", StableDiffusion3Img2ImgPipeline), ("flux", FluxImg2ImgPipeline)]
)
def test_image_to_image_of_flows_equals_the_pipeline_with_its_own_scheduler(kind, image_class):
    pipe = tiny_pipeline(kind)
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    image_pipe = image_class(**parts)
    image_pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(kind, PROMPTS, 1.0, 4) | {"image": torch.zeros(2, 3, 16, 16), "strength": 0.5}

    def run_with(scheduler):
        image_pipe.scheduler = scheduler
        return image_pipe(**arguments, generator=torch.Generator().manual_seed(0)).images

    expected = run_with(pipe.scheduler)
    mu = 0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)  # of Flux's 16 tokens
    steps = {"sigmas": [1 - row / 4 for row in range(4)], "mu": mu} if kind == "flux" else None
    table = tabulate(pipe.scheduler, None if steps else 4, set_timesteps=steps)
    ours = TableScheduler.from_solver(table)
    assert (run_with(ours) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert ours.begin_index == 2


def test_a_later_start_needs_no_noise_from_before():
    table = solver(EulerAncestralDiscreteScheduler, 3)
    TableScheduler.from_solver(table).set_begin_index(1)
    again = table.noise_coef.clone()
    again[1, 0] = 0.5  # as SA-Solver's corrector
    with pytest.raises(ValueError, match="cannot start at row 1"):
        TableScheduler.from_solver(replace(table, noise_coef=again)).set_begin_index(1)


ORIGINALS = {
    "sd": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    "zero-snr": DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
    "betas": DDPMScheduler(trained_betas=[1e-4, 1e-3, 5e-3, 2e-2], num_train_timesteps=4),
    "cogvideo": CogVideoXDDIMScheduler(snr_shift_scale=1.0, prediction_type="v_prediction"),
    "edm": EDMEulerScheduler(sigma_max=70.0, sigma_data=0.7, prediction_type="v_prediction"),
    "sd3": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.2),
}
FOLLOWERS = (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, CogVideoXDDIMScheduler)
PAIRS = [(name, follower) for name in ("sd", "zero-snr", "betas", "cogvideo") for follower in FOLLOWERS]
PAIRS += [("edm", EDMEulerScheduler), ("edm", EDMDPMSolverMultistepScheduler)]
PAIRS += [(name, FlowMatchEulerDiscreteScheduler) for name in ("sd3", "flux")]


def scheduler_after(original) -> TableScheduler:
    """Ours in the place of a pipeline's scheduler, its numbers of no matter."""
    schedule = NoiseSchedule.from_scheduler(original)
    table = named_solver("euler:4", schedule) if schedule.kind in ("flow", "edm") else solver(steps=4)
    table = replace(table, prediction_type=schedule.prediction_type)
    info = {"schedule": schedule.to_dict(), "guidance_scale": 1.0}
    return TableScheduler.for_pipeline(replace(table, info=info), original)


@pytest.mark.parametrize(("name", "follower"), PAIRS)
def test_the_next_scheduler_has_the_schedule_of_the_one_before(tmp_path, name, follower):
    """zai-org/CogVideo #454 lost the SNR shift; so did every class that came after ours."""
    original = ORIGINALS[name]
    ours = scheduler_after(original)
    ours.save_pretrained(tmp_path / "ours")
    original.save_pretrained(tmp_path / "original")
    wanted = (follower.from_config(original.config), follower.from_pretrained(tmp_path / "original"))
    found = (follower.from_config(ours.config), follower.from_pretrained(tmp_path / "ours"))
    for expected, follows in zip(wanted, found):
        keys = inspect.signature(follower).parameters
        assert {key: follows.config[key] for key in keys} == {key: expected.config[key] for key in keys}
    again = TableScheduler.from_config(found[0].config)
    assert again.config["tables"] == ours.config["tables"]


def test_a_schedule_without_a_pipeline_is_told_too():
    schedule = NoiseSchedule.scaled_linear(beta_start=2e-4, prediction_type="v_prediction")
    table = solver(steps=4, prediction_type="v_prediction")
    follows = EulerDiscreteScheduler.from_config(TableScheduler.from_solver(table, schedule=schedule).config)
    assert (follows.config["beta_start"], follows.config["beta_schedule"]) == (2e-4, "scaled_linear")
    assert follows.config["prediction_type"] == "v_prediction"
    flow = TableScheduler.from_solver(flow_solver(4), schedule=NoiseSchedule.flow(shift=2.5, shift_terminal=0.1))
    follows = FlowMatchEulerDiscreteScheduler.from_config(flow.config)
    assert (follows.config["shift"], follows.config["shift_terminal"]) == (2.5, 0.1)
    continuous = TableScheduler.from_solver(table, schedule=NoiseSchedule.continuous_vp(prediction_type="v_prediction"))
    assert "beta_min" not in continuous.config


def test_another_scheduler_says_briefly_what_it_does_not_take(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    DDIMScheduler.from_config(TableScheduler.from_solver([solver(steps=4), solver(steps=6)]).config)
    assert "'tables': <tables of [4, 6] steps>" in caplog.text
    assert len(caplog.text) < 1000


@pytest.mark.parametrize("name", ORIGINALS)
def test_training_numbers_are_those_of_the_original(name):
    ours, original = scheduler_after(ORIGINALS[name]), ORIGINALS[name]
    numbers = ("alphas_cumprod", "betas", "alphas", "sigma_min", "sigma_max")
    for number in numbers:
        assert hasattr(ours, number) == hasattr(original, number)
        if hasattr(original, number):
            assert torch.equal(torch.as_tensor(getattr(ours, number)), torch.as_tensor(getattr(original, number)))
    kind = NoiseSchedule.from_scheduler(original).kind
    assert hasattr(ours, "alphas_cumprod") == (kind == "discrete_vp")
    kinds = {kind.__name__ for kind in ours.compatibles}
    assert ("FlowMatchEulerDiscreteScheduler" in kinds) == (kind == "flow")
    assert ("UniPCMultistepScheduler" in kinds) == (kind == "discrete_vp")
    assert ("EDMDPMSolverMultistepScheduler" in kinds) == (kind == "edm")


def test_without_a_schedule_there_are_no_training_numbers():
    bare = TableScheduler.from_solver(solver(steps=4))
    with pytest.raises(AttributeError, match="'TableScheduler' object has no attribute 'alphas_cumprod'"):
        _ = bare.alphas_cumprod


def test_flow_pipelines_scale_noise():
    """bcmi/Light-A-Video #16: pipelines of flows call `scale_noise`."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_timesteps(4)
    ours = TableScheduler.from_solver(tabulate(own, 4), schedule=NoiseSchedule.flow(shift=3.0))
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for row, timestep in enumerate(own.timesteps):
        own.set_begin_index(row)
        expected = own.scale_noise(data, timestep[None], noise)
        assert torch.allclose(ours.scale_noise(data, timestep[None], noise), expected, atol=1e-6)
    between = ours.scale_noise(data, torch.tensor([250.0, 125.0]), noise)
    weight = torch.tensor([0.25, 0.125]).reshape(2, 1, 1)
    assert torch.allclose(between, (1 - weight) * data + weight * noise, atol=1e-6)
    assert torch.equal(ours.get_velocity(data, noise, own.timesteps[:1]), noise - data)


def test_velocities_are_those_of_diffusers():
    original = ORIGINALS["sd"]
    training = DDPMScheduler.from_config(original.config)
    data, noise, timesteps = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([17, 801])
    for scheduler in (ours := scheduler_after(original), StandaloneScheduler.from_config(ours.config)):
        expected = training.get_velocity(data, noise, timesteps)
        assert torch.allclose(scheduler.get_velocity(data, noise, timesteps), expected, atol=1e-6)
        assert torch.allclose(scheduler.add_noise(data, noise, timesteps), training.add_noise(data, noise, timesteps))


def test_noise_is_added_at_the_right_one_of_repeated_timesteps():
    """Solvers of second order tell the network one timestep at two nodes."""
    table = replace(solver(steps=4), timesteps=torch.tensor([900.0, 600, 600, 300], dtype=torch.float64))
    for kind in (TableScheduler, StandaloneScheduler):
        scheduler = kind.from_config(TableScheduler.from_solver(table, schedule=VP).config)
        data, noise = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
        for done, row in enumerate((1, 1, 2, 1)):  # the first from the current row on; else the first
            found = scheduler.add_noise(data, noise, torch.tensor([600.0]))
            assert torch.allclose(found, table.alpha[row] * data + table.sigma[row] * noise, rtol=0, atol=1e-12), done
            scheduler.step(noise, 0, noise)
        both = scheduler.add_noise(data.repeat(2, 1), noise.repeat(2, 1), torch.tensor([300.0, 900.0]))
        for one, row in zip(both, (3, 0)):
            assert torch.allclose(one, (table.alpha[row] * data + table.sigma[row] * noise)[0], rtol=0, atol=1e-12)


def test_a_flow_is_shifted_once():
    """huggingface/diffusers #13243: `set_timesteps` of its flow scheduler shifts what is shifted already."""
    trained = FlowMatchEulerDiscreteScheduler(shift=3.0)
    once = named_solver("euler:1000", NoiseSchedule.from_scheduler(trained))
    assert torch.allclose(once.sigma[:-1].float(), trained.sigmas, atol=1e-6)
    ours = TableScheduler.from_solver(once, schedule=NoiseSchedule.flow(shift=3.0))
    assert (ours.sigma_min, ours.sigma_max) == (trained.sigma_min, trained.sigma_max)
    follows = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert torch.equal(follows.sigmas, trained.sigmas)


def test_one_step_pixart_reads_the_image():
    pipe = tiny_pipeline("pixart")
    pipe.scheduler = Recorder.from_solver(pipeline_table(pipe, "pixart", 1))
    images = pipe(**call_arguments("pixart", PROMPTS, 3.0, 1), generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(images, pipe.scheduler.calls[0][3])


def test_save_and_load_by_the_documented_line(tmp_path):
    table = solver(steps=4)
    scheduler = TableScheduler.from_solver([table, solver(steps=5)], seed=3, schedule=VP)
    scheduler.save_pretrained(tmp_path)
    loaded = TableScheduler.from_pretrained(tmp_path)
    assert loaded.config == TableScheduler.from_pretrained(str(tmp_path)).config
    assert loaded.config["tables"] == scheduler.config["tables"]  # exact doubles
    assert (loaded.seed, loaded.available_steps) == (3, [4, 5])
    assert loaded.config["tables"][0]["output_coef"] == table.output_coef.tolist()
    config = tmp_path / "scheduler_config.json"
    values = json.loads(config.read_text())
    values["tables"][0]["alpha"].pop()
    config.write_text(json.dumps(values))
    with pytest.raises(SolverError, match="alpha has shape"):
        TableScheduler.from_pretrained(tmp_path)


def test_another_scheduler_config_is_no_table():
    with pytest.raises(ValueError, match="load it with from_solver"):
        TableScheduler.from_config(DDIMScheduler().config)


def test_push_to_hub_uploads_the_config(monkeypatch):
    uploaded = {}

    def upload(self, folder, repo_id, **options):
        uploaded[repo_id] = json.loads(Path(folder, "scheduler_config.json").read_text())
        assert Path(folder, "solvers.py").is_file()
        return "done"

    monkeypatch.setattr(
        "diffusers.utils.hub_utils.create_repo", lambda repo_id, **_: type("R", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: _Card())
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card: card)
    monkeypatch.setattr(TableScheduler, "_upload_folder", upload)
    table = solver(steps=4)
    scheduler = TableScheduler.from_solver(table)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SolverError, match="nothing was uploaded, offline mode is on"):
        scheduler.push_to_hub("me/solver")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert scheduler.push_to_hub("me/solver", token="secret") == "done"
    assert uploaded["me/solver"]["tables"][0]["timesteps"] == table.timesteps.tolist()


class _Card:
    def save(self, path):
        Path(path).write_text("card")


def artifact(tmp_path, pipe, table, guidance_scale=3.0, schedule=None) -> Path:
    return save_solver(
        table,
        tmp_path / "solver.json",
        DenoiserIdentity(schedule or NoiseSchedule.from_scheduler(pipe.scheduler), guidance_scale),
        method="olss",
    )


def test_a_pipeline_that_fits_and_those_that_do_not(tmp_path):
    pipe = tiny_pipeline("sd")
    path = artifact(tmp_path, pipe, pipeline_table(pipe, "sd", 4))
    scheduler = TableScheduler.for_pipeline(path, pipe, guidance_scale=3.0)
    assert not scheduler.config["scale_start"]
    with pytest.raises(SolverError, match=r"made for guidance scale 3.0, found 7.5"):
        TableScheduler.for_pipeline(path, pipe, guidance_scale=7.5)
    dit = tiny_pipeline("dit")
    with pytest.raises(SolverError, match=r"made for noise schedule .*'beta_end': 0.012.* found .*'beta_end': 0.02}"):
        TableScheduler.for_pipeline(path, dit)
    assert TableScheduler.for_pipeline(path, dit, allow_mismatch="noise schedule")
    with pytest.raises(SolverError, match="made for noise schedule"):
        TableScheduler.for_pipeline(path, dit, allow_mismatch="guidance scale")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(SolverError, match="made for prediction type epsilon, found v_prediction"):
        scheduler.check_pipeline(pipe)
    scheduler.check_pipeline(pipe, allow_mismatch="prediction type")
    with pytest.raises(SolverError, match="its schedule is not known"):
        TableScheduler.for_pipeline(solver(), pipe)


def test_the_static_shift_is_compared(tmp_path):
    pipe = tiny_pipeline("sd3")
    path = artifact(tmp_path, pipe, flow_solver(4))
    TableScheduler.for_pipeline(path, pipe)
    path = artifact(tmp_path, pipe, flow_solver(4), schedule=NoiseSchedule.flow(shift=1.5))
    with pytest.raises(SolverError, match=r"made for .*'shift': 1.5.* found .*'shift': 3.0"):
        TableScheduler.for_pipeline(path, pipe)


def test_the_dynamic_shift_is_compared_at_each_call(tmp_path):
    pipe = tiny_pipeline("flux")
    tokens = 16 * 16 // 16  # packed 2x2 latents of 16x16 pixels
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    table = pipeline_table(pipe, "flux", 4)
    schedule = NoiseSchedule.flow(shift=float(torch.tensor(mu, dtype=torch.float64).exp()))
    arguments = call_arguments("flux", PROMPTS, 3.0, 4)
    pipe.scheduler = TableScheduler.for_pipeline(artifact(tmp_path, pipe, table, schedule=schedule), pipe)
    assert pipe.scheduler.config["max_shift"] == 1.15
    pipe(**arguments)
    with pytest.raises(ValueError, match=r"the pipeline's shift is .* this solver was made for"):
        pipe(**arguments | {"height": 64, "width": 64})


def test_a_start_scale_reaches_pipelines_that_ignore_it(tmp_path):
    pipe = tiny_pipeline("dit")
    table = solver(EulerDiscreteScheduler, 3, timestep_spacing="linspace")
    path = artifact(tmp_path, pipe, table)
    with pytest.raises(SolverError, match="ignores init_noise_sigma"):
        TableScheduler.from_solver(path).check_pipeline(pipe)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler = Recorder.for_pipeline(path, pipe)
    pipe(**call_arguments("dit", PROMPTS, 3.0, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.scheduler.calls[0][0][:2], noise * table.start_scale)
    assert_same_as_sample(pipe.scheduler.calls, table, 2)
    scaled = SolverTable(
        **{name: getattr(flow_solver(4), name) for name in table.__dataclass_fields__ if name != "start_scale"},
        start_scale=1.5,
    )
    with pytest.raises(SolverError, match="never scales its start noise"):
        TableScheduler.for_pipeline(artifact(tmp_path, tiny_pipeline("sd3"), scaled), tiny_pipeline("sd3"))


def test_a_saved_pipeline_brings_its_scheduler_along(tmp_path):
    """By plain trust; without, by the documented line; and saved again by who loaded it."""
    pipe = tiny_pipeline("dit")
    pipe.scheduler = TableScheduler.from_solver([pipeline_table(pipe, "dit", steps) for steps in (3, 5)])
    arguments = call_arguments("dit", PROMPTS, 3.0, 3)
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded.scheduler).__module__.startswith("diffusers_modules")
    loaded.save_pretrained(tmp_path / "again")
    scheduler = TableScheduler.from_pretrained(tmp_path / "saved", subfolder="scheduler")
    ways = [
        loaded,
        DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True),
        DiffusionPipeline.from_pretrained(tmp_path / "saved", scheduler=scheduler),
    ]
    for way in ways:
        way.set_progress_bar_config(disable=True)
        assert way.scheduler.available_steps == [3, 5]
        found = way(**arguments, generator=torch.Generator().manual_seed(0)).images
        assert (torch.as_tensor(found) - torch.as_tensor(expected)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")


FRESH = """
import sys
import torch
from diffusers import DiffusionPipeline

images = []
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(0)
    images.append(pipe([1, 2], guidance_scale=3.0, num_inference_steps=3, generator=source, output_type="pt").images)
assert "solvers" not in sys.modules
torch.save(images, "images.pt")
"""


@pytest.mark.slow
def test_saved_pipelines_load_in_a_fresh_process_without_this_project(tmp_path):
    pipe = tiny_pipeline("dit")
    path = artifact(tmp_path, pipe, pipeline_table(pipe, "dit", 3))
    pipe.save_pretrained(tmp_path / "exported")
    export_solver(path, "diffusers", tmp_path / "export", pipeline=tmp_path / "exported")
    pipe.scheduler = TableScheduler.for_pipeline(path, pipe)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    (tmp_path / "fresh.py").write_text(FRESH)
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    command = [sys.executable, "fresh.py", "exported", "saved", "again"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pipe.scheduler = TableScheduler.from_solver(load_solver(path))
    arguments = {"guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "pt"}
    expected = torch.as_tensor(pipe([1, 2], generator=torch.Generator().manual_seed(0), **arguments).images)
    for found in torch.load(tmp_path / "images.pt", weights_only=True):
        assert (torch.as_tensor(found) - expected).abs().max() < 1e-6


def test_the_standalone_scheduler_is_the_same():
    table, noise, denoiser = (
        solver(EulerAncestralDiscreteScheduler, 4),
        start_noise([1, 2], (3,)),
        gaussian_denoiser(VP),
    )
    mine = TableScheduler.from_solver(table, seed=9)
    theirs = StandaloneScheduler.from_config(mine.config)
    trace = sample_trace(denoiser, table, noise, seeds=[9, 10])
    assert torch.allclose(run(theirs, denoiser, noise), trace.states[-1], rtol=0, atol=1e-6)
    assert torch.equal(run(theirs, denoiser, noise), run(mine, denoiser, noise))


def operators(channels: int, edges: tuple[float, ...], steps: int = 4) -> SolverTable:
    """A stochastic solver whose every weight is random matrices."""
    table, space = solver(EulerAncestralDiscreteScheduler, steps), Bands(edges, channels)
    generator, coef = torch.Generator().manual_seed(steps), {}
    for name in ("state_coef", "output_coef", "noise_coef"):
        mixed = space.embed(getattr(table, name))
        coef[name] = mixed + 0.1 * mixed * torch.randn(mixed.shape, generator=generator, dtype=torch.float64)
        coef[name] += 0.01 * torch.randn(mixed.shape, generator=generator, dtype=torch.float64) * (mixed != 0).any()
        coef[name] *= torch.ones(steps, steps, dtype=torch.float64).tril()[..., None, None, None]
    supports = {"state_support": None, "output_support": None}
    return replace(table, space=space, start_scale=1.0, **coef, **supports)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 6), (3, 6, 7), (3, 2, 4, 5)])
@pytest.mark.parametrize("edges", [(), (0.2,), (0.05, 0.2, 0.7)])
def test_weights_per_band_equal_sample(tmp_path, edges, shape):
    """Images of any size, and videos; from the config alone, in double and single precision."""
    table, denoiser = operators(3, edges), gaussian_denoiser(VP)
    TableScheduler.from_solver(table, seed=9).save_pretrained(tmp_path)
    assert table_to_dict(table) == TableScheduler.from_pretrained(tmp_path).config["tables"][0]
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        noise = start_noise([3, 4], shape, dtype)
        expected = sample(denoiser, table, noise, step_noise=noises(shape, dtype))
        for kind in (TableScheduler, StandaloneScheduler):
            found = run(kind.from_pretrained(tmp_path), denoiser, noise)
            assert found.dtype == dtype
            assert (found - expected).abs().max() <= bound * expected.abs().max()


def noises(shape, dtype):
    return lambda row: row_noise([9, 10], row, shape).to(dtype)


def test_weights_per_band_run_in_pipelines_that_step_a_doubled_batch():
    pipe = tiny_pipeline("dit")
    table = operators(4, (0.1, 0.3))
    pipe.scheduler = Recorder.from_solver(table, seed=5)
    pipe(**call_arguments("dit", PROMPTS, 3.0, 4), generator=torch.Generator().manual_seed(0))
    assert_same_as_sample(pipe.scheduler.calls, table, 2, seeds=[5, 6])


def test_half_precision_keeps_states_between_rows_of_matrices():
    table = operators(3, (0.2,))
    noise = start_noise([3, 4], (3, 8, 8)).half()
    outputs = torch.randn(4, 2, 3, 8, 8).half()
    mine, theirs = iter(outputs), iter(outputs)
    found = run(TableScheduler.from_solver(table, seed=9), lambda x, t: next(mine), noise)
    expected = sample(lambda x, t, c: next(theirs), table, noise, step_noise=noises((3, 8, 8), torch.float32))
    assert found.dtype == torch.float16
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()  # one rounding, at the end


def test_samples_that_matrices_do_not_act_on_are_refused():
    pipe = tiny_pipeline("flux")
    table = pipeline_table(pipe, "flux", 4)
    space = Bands((0.2,), 16)
    weights = {name: space.embed(getattr(table, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    supports = {"state_support": None, "output_support": None}
    pipe.scheduler = TableScheduler.from_solver(replace(table, space=space, **weights, **supports))
    with pytest.raises(ValueError, match=r"matrices of 16 channels, .* shape \(2, 16, 16\): .* not on packed tokens"):
        pipe(**call_arguments("flux", PROMPTS, 3.0, 4))
    scheduler = TableScheduler.from_solver(operators(3, ()))
    with pytest.raises(ValueError, match=r"matrices of 3 channels, the samples have shape \(2, 4, 8, 8\)"):
        scheduler.step(torch.zeros(2, 4, 8, 8), 999, torch.zeros(2, 4, 8, 8))


def test_a_later_start_looks_at_the_rows_of_calls():
    """Columns of outputs are calls: a one-step solver with two calls a row can start anywhere."""
    one_step = TableScheduler.from_solver(solver(EulerDiscreteScheduler, 3).guided(2.0))
    one_step.set_begin_index(2)
    assert one_step.branches == ("conditional", "unconditional")
    table = solver(EulerDiscreteScheduler, 3)
    fewer = {"output_coef": table.output_coef[:, 1:], "output_support": table.output_support[:, 1:]}
    without_first = TableScheduler.from_solver(replace(table, calls=table.calls[1:], **fewer))
    without_first.set_begin_index(1)
    assert without_first.branches == ("conditional",)
    multistep = TableScheduler.from_solver(solver(steps=3).guided(2.0, rows=[0]))
    with pytest.raises(ValueError, match="cannot start at row 1"):
        multistep.set_begin_index(1)
