"""How pipelines call TableScheduler: what counts of their arguments, and what is refused."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    DDIMPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    MochiPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)

from denoisers.pipeline import PipelineDenoiser
from solvers import (
    DenoiserIdentity,
    NoiseSchedule,
    TableScheduler,
    identify,
    named_solver,
    sample,
    save_solver,
    tabulate,
)
from solvers.standalone.table_scheduler import further_guidance, is_guidance, pipeline_guidance
from tests.analytic import two_point_denoiser
from tests.bridge.builders import hunyuan_video_15, klein, qwen_image, wan
from tests.bridge.parts import embedded, ready
from tests.bridge.rows import BOTH, SHORT, SIZE, TWO_TEXTS
from tests.solvers.test_scheduler import PROMPTS, VP, artifact, flow_solver, pipeline_table, solver
from tests.tiny_pipelines import KINDS, call_arguments, tiny_pipeline, tiny_unet


def test_a_mu_that_the_scheduler_ignores_is_ignored(tmp_path):
    """FLUX.1-schnell as released: the pipeline passes mu, its scheduler shifts by a constant."""
    pipe = tiny_pipeline("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    table = tabulate(pipe.scheduler, None, set_timesteps={"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.6})
    path = artifact(tmp_path, pipe, table)
    arguments = call_arguments("flux", PROMPTS, 3.0, 4)
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    pipe.scheduler = TableScheduler.for_pipeline(path, pipe)
    found = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert torch.allclose(found, expected, atol=1e-5)
    pipe.scheduler = TableScheduler.from_solver(path)  # it knows no pipeline
    with pytest.raises(ValueError, match=r"the pipeline's shift is .* or allow_mismatch='shift'"):
        pipe(**arguments)


def test_sigmas_that_a_pipeline_always_passes_are_its_own(tmp_path):
    """MochiPipeline has no argument `sigmas`: nobody asked for the ones that it passes."""
    path = artifact(tmp_path, tiny_pipeline("sd3"), flow_solver(4))
    original = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for pipeline_class, fits in ((MochiPipeline, True), (StableDiffusion3Pipeline, False)):
        pipe = object.__new__(pipeline_class)
        object.__setattr__(pipe, "scheduler", original)
        scheduler = TableScheduler.for_pipeline(path, pipe)
        with nullcontext() if fits else pytest.raises(ValueError, match="this solver has its own steps"):
            scheduler.set_timesteps(sigmas=[1.0, 0.99, 0.9, 0.5])


def test_a_pipeline_may_write_over_what_it_gave():
    """Kandinsky 5 steps as `latents[...] = step(...)`: states and outputs that outlive a step are copies."""
    table, noise = solver(steps=4), torch.randn(2, 3, 4)
    denoiser = two_point_denoiser(VP)
    expected, scheduler = sample(denoiser, table, noise), TableScheduler.from_solver(table)
    latents, output = noise * scheduler.init_noise_sigma, torch.empty_like(noise)
    for timestep in scheduler.timesteps:
        output[...] = denoiser(latents, timestep)
        latents[...] = scheduler.step(output, timestep, latents, return_dict=False)[0]
    assert torch.allclose(latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_other_than_the_table_s_is_refused_at_the_call(kind, tmp_path):
    """By any scheduler that knows its scale, in a pipeline that keeps the scale or hides it."""
    pipe = tiny_pipeline(kind)
    table = pipeline_table(pipe, kind, 4)
    path = artifact(tmp_path, pipe, table, guidance_scale=3.0)
    pipe.scheduler = TableScheduler.from_solver(path, allow_mismatch="shift")
    assert pipe(**call_arguments(kind, PROMPTS, 3.0, 4)).images is not None
    with pytest.raises(ValueError, match=r"called at guidance scale 7\.5, this solver was made for 3\.0"):
        pipe(**call_arguments(kind, PROMPTS, 7.5, 4))
    pipe.scheduler = TableScheduler.from_solver(path, allow_mismatch=["shift", "guidance scale"])
    assert pipe(**call_arguments(kind, PROMPTS, 7.5, 4)).images is not None


def test_arguments_of_other_schedulers():
    """DDIMPipeline passes eta to `step` and LCM's pipelines original_inference_steps, whichever scheduler they have."""
    pipe = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    generators = [[torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(3)]
    expected = pipe(**arguments, generator=generators[0]).images
    table = tabulate(pipe.scheduler, 4)
    pipe.scheduler = TableScheduler.for_pipeline(table, pipe, allow_mismatch="noise schedule")
    assert abs(pipe(**arguments, generator=generators[1]).images - expected).max() < 1e-5
    with pytest.raises(ValueError, match=r"eta is 0\.5: this solver's noises stand in its table"):
        pipe(**arguments, eta=0.5, generator=generators[2])
    pipe.scheduler.set_timesteps(4, original_inference_steps=None)
    with pytest.raises(ValueError, match="original_inference_steps is 50: this solver has its own steps"):
        pipe.scheduler.set_timesteps(4, original_inference_steps=50)


def test_what_pipelines_tell_other_schedulers_is_refused():
    scheduler = TableScheduler.from_solver(solver(steps=4))
    scheduler.set_timesteps(4, stage_index=None)
    with pytest.raises(ValueError, match="passes stage_index to the set_timesteps of its scheduler, which no"):
        scheduler.set_timesteps(4, stage_index=0)
    sample = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="passes per_token_timesteps to the step of its scheduler, which no"):
        scheduler.step(sample, 0, sample, per_token_timesteps=torch.ones(1))
    assert scheduler.step(sample, 0, sample, per_token_timesteps=None).prev_sample.shape == sample.shape


def test_a_pipeline_of_pipelines_is_refused(tmp_path):
    """Its `scheduler` is not what makes the picture."""
    combined = object.__new__(KandinskyV22CombinedPipeline)
    original = DDIMScheduler(clip_sample=False)
    object.__setattr__(combined, "scheduler", original)
    table, schedule = tabulate(original, 4), NoiseSchedule.from_scheduler(original)
    path = save_solver(table, tmp_path / "s.json", DenoiserIdentity(schedule, 1.0), method="test")
    with pytest.raises(ValueError, match=r"the pipeline runs others, .* as pipe\.decoder_pipe"):
        TableScheduler.for_pipeline(path, combined)


def test_a_pipeline_derived_from_a_known_one_fits_as_that_does(tmp_path):
    class Mine(StableDiffusionPipeline):
        """In a file of the user's, which says nothing of schedulers."""

    Mine.__module__ = "tests.analytic"
    pipe, own = tiny_pipeline("sd"), object.__new__(Mine)
    object.__setattr__(own, "scheduler", pipe.scheduler)
    path = artifact(tmp_path, pipe, solver(steps=4))
    assert [TableScheduler.for_pipeline(path, one).config["scale_start"] for one in (pipe, own)] == [False, False]


def test_a_scale_that_qwen_image_ignores_is_none():
    """diffusers #12223: without a negative prompt `true_cfg_scale` does nothing, nor does `guidance_scale` ever."""
    pipe, (prompt, _) = ready(qwen_image), embedded(8, (*BOTH, "prompt_embeds_mask", "negative_prompt_embeds_mask"))
    bare = {name: value for name, value in prompt.items() if "negative" not in name}
    for arguments, expected in (
        (bare | {"true_cfg_scale": 4.0}, 1.0),
        (bare | {"guidance_scale": 4.0}, 1.0),
        (prompt | {"true_cfg_scale": 1.0}, 1.0),
        (prompt | {"true_cfg_scale": 4.0, "guidance_scale": 7.0}, 4.0),
    ):
        denoiser = PipelineDenoiser(pipe, [arguments], **SIZE)
        assert denoiser.guidance_scale == expected
        output = denoiser.record(2, denoiser.condition_of([0]))[1]
        without = PipelineDenoiser(pipe, [bare], **SIZE).record(2, denoiser.condition_of([0]))[1]
        assert torch.equal(output, without) == (expected == 1.0)


def test_a_second_guidance_is_compared(tmp_path):
    """Wan's second expert has a scale of its own: recorded with it, the solver asks for it, and without, refuses it."""
    pipe = ready(lambda: wan(boundary_ratio=0.7))
    prompts, call = embedded(8, BOTH), SIZE | {"num_frames": 5, "guidance_scale": 5.0}
    own, arguments = pipe.scheduler, {**prompts[0], **call, "num_inference_steps": 4}
    for recorded, called in ((3.0, None), (None, 3.0)):
        pipe.scheduler = own
        denoiser = PipelineDenoiser(pipe, prompts, guidance_scale_2=recorded, **call)
        assert denoiser.thresholding == (recorded and {"guidance_scale_2": recorded})
        path = save_solver(denoiser.table(4), tmp_path / "solver.json", identify(denoiser), method="test")
        pipe.scheduler = TableScheduler.for_pipeline(path, pipe)
        assert pipe(**arguments, guidance_scale_2=recorded)[0].isfinite().all()
        with pytest.raises(
            ValueError, match=r"called with guidance_scale_2 .*, this solver was made (at 3\.0|without):"
        ):
            pipe(**arguments, guidance_scale_2=called)


def test_guidance_on_top_of_a_distilled_network_is_compared(tmp_path):
    """Flux with a negative prompt: its network is told one scale, and guided by another."""
    pipe, call = tiny_pipeline("flux"), SIZE | SHORT | {"guidance_scale": 3.0}
    twice = {"negative_prompt": "fog", "true_cfg_scale": 4.0}
    denoisers = [PipelineDenoiser(pipe, PROMPTS, **call | more) for more in ({}, twice, {"true_cfg_scale": 4.0})]
    assert [denoiser.thresholding for denoiser in denoisers] == [None, {"true_cfg_scale": 4.0}, None]
    path = save_solver(denoisers[0].table(4), tmp_path / "s.json", identify(denoisers[0]), method="test")
    pipe.scheduler = TableScheduler.for_pipeline(path, pipe)
    assert pipe(PROMPTS[0], num_inference_steps=4, **call).images.isfinite().all()
    with pytest.raises(ValueError, match=r"called with true_cfg_scale 4\.0, this solver was made without"):
        pipe(PROMPTS[0], num_inference_steps=4, **call | twice)


def test_guidance_by_an_object_is_compared(tmp_path):
    """HunyuanVideo 1.5 and HunyuanImage: nothing in the call says how they guide."""
    plain, guided = (ready(partial(hunyuan_video_15, ClassifierFreeGuidance(scale))) for scale in (1.0, 3.0))
    prompts, call = embedded(8, TWO_TEXTS), SIZE | {"height": 32, "width": 32, "num_frames": 5}
    denoisers = [PipelineDenoiser(pipe, prompts, **call) for pipe in (plain, guided)]
    assert [denoiser.guidance_scale for denoiser in denoisers] == [1.0, 3.0]
    path = save_solver(denoisers[1].table(4), tmp_path / "s.json", identify(denoisers[1]), method="test")
    arguments = {**prompts[0], **call, "num_inference_steps": 4}
    guided.scheduler = TableScheduler.for_pipeline(path, guided)
    assert guided(**arguments)[0].isfinite().all()
    for guider, reason in (
        (ClassifierFreeGuidance(5.0), r"called at guidance scale 5\.0, this solver was made for 3\.0"),
        (ClassifierFreeGuidance(3.0, enabled=False), r"called at guidance scale 1\.0"),
        (ClassifierFreeGuidance(3.0, use_original_formulation=True), r"called at guidance scale 4\.0"),
        (
            ClassifierFreeGuidance(3.0, stop=0.5),
            r"with guider ClassifierFreeGuidance \{'stop': 0\.5\}, this solver was",
        ),
        (AdaptiveProjectedGuidance(3.0), "with guider AdaptiveProjectedGuidance.*, this solver was made without"),
    ):
        guided.guider = guider
        with pytest.raises(ValueError, match=reason):
            guided(**arguments)
    assert further_guidance(guided, {}) == {"guider": "AdaptiveProjectedGuidance"}
    assert pipeline_guidance("a/folder", {"guidance_scale": 3.0}) == 3.0


@pytest.mark.parametrize("name", ["pag_scale", "sag_scale", "stg_scale", "audio_modality_scale", "cfg_trunc_ratio"])
def test_guidance_by_attention_frames_and_sound_is_guidance(name):
    assert is_guidance(name)
    assert not is_guidance("controlnet_conditioning_scale")


def test_a_shift_that_depends_on_the_number_of_steps(tmp_path):
    """FLUX.2 klein: a solver of 4 steps recorded from 12 is asked for the shift of 4, of the same size alone."""
    pipe, prompts = ready(klein), embedded(8, BOTH)
    denoiser = PipelineDenoiser(pipe, prompts, **SIZE)
    shifts = [denoiser.schedule.shift_at(steps) for steps in (4, 12, 100)]
    assert shifts[0] != shifts[1]
    assert shifts[2] == denoiser.schedule.parameters["shift"]
    assert denoiser.table(12).sigma[1] == pytest.approx(shifts[1] * 11 / (shifts[1] * 11 + 1), rel=1e-5)
    path = save_solver(
        named_solver("euler:4", denoiser.schedule), tmp_path / "s.json", identify(denoiser), method="test"
    )
    arguments = {**prompts[0], **SIZE, "num_inference_steps": 4}
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
    pipe.scheduler = TableScheduler.for_pipeline(path, pipe)
    found = pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="the pipeline's shift is"):
        pipe(**arguments | {"height": 64, "width": 64})


def test_a_shift_that_a_scheduler_applies_twice():
    """diffusers 13243: without sigmas a constant shift moves the last step twice; the table is where it really is."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    trained = float(scheduler.sigmas[-1])
    scheduler.set_timesteps(8)
    table, schedule = tabulate(scheduler, 8), NoiseSchedule.from_scheduler(scheduler)
    assert float(table.sigma[-2]) == pytest.approx(3 * trained / (1 + 2 * trained), rel=1e-4)
    assert torch.allclose(table.sigma.float(), scheduler.sigmas, atol=1e-6)
    assert torch.allclose(schedule.alpha_sigma(table.timesteps)[1], table.sigma[:-1], atol=1e-6)
    even = named_solver("euler:8", schedule)
    assert float(even.sigma[-2]) == pytest.approx(3 / 8 / (1 + 2 / 8), rel=1e-6)
