"""Recording pipelines, and pipelines as denoisers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from data.pipeline_recorder import record_trajectories
from data.trajectories import TrajectoryCache
from denoisers import class_labels, load_denoiser, with_guidance
from denoisers.diffusers_models import from_pipeline
from denoisers.pipeline import PipelineDenoiser
from olss.path import uniform_path
from olss.plan import CallPlan
from olss.run import fit_on_teacher, fit_run, teacher_columns
from solvers import (
    TableScheduler,
    export_solver,
    load_solver,
    named_solver,
    sample,
    sample_trace,
    save_solver,
    start_noise,
    tabulate,
)
from solvers.identity import identify
from solvers.standalone.table_scheduler import pipeline_guidance
from tests.denoisers.test_adapters import as_pipeline_output, condition_of, relative_error, run_pipeline
from tests.tiny_pipelines import KINDS, call_arguments, tiny_pipeline

PROMPTS = ["a cat", "dog", "tree"]
STEPS = 4


def call_of(kind: str, prompts: list[str], guidance_scale: float) -> tuple[list, dict[str, Any]]:
    """Prompts and the further arguments of a call."""
    arguments = call_arguments(kind, prompts, guidance_scale, STEPS)
    del arguments["num_inference_steps"]
    if kind == "dit":
        return arguments.pop("class_labels"), arguments | {"prompt_argument": "class_labels"}
    return arguments.pop("prompt"), arguments


def assert_runs_of_its_table(cache: TrajectoryCache, tolerance: float = 1e-5) -> None:
    """Each recorded state follows from the recorded ones before it by the rows of the table."""
    found, table = cache.load().to(torch.float64), cache.table
    following = torch.einsum("ij,bj...->bi...", table.state_coef, found.states[:, :-1])
    following += torch.einsum("ij,bj...->bi...", table.output_coef, found.outputs)
    assert float((following - found.states[:, 1:]).abs().max()) < tolerance * float(found.states.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_trajectories_are_the_sampler_s(kind: str, tmp_path: Path) -> None:
    """The whole trajectory equals that of the adapter, the tabulated scheduler and the project's sampler."""
    pipe = tiny_pipeline(kind)
    prompts, call = call_of(kind, PROMPTS, 3.0)
    cache = record_trajectories(pipe, prompts, tmp_path, STEPS, batch_size=2, shard_size=2, progress=False, **call)
    found = cache.load()
    assert found.states.shape[:2] == (3, cache.table.nfe + 1)
    denoiser = with_guidance(from_pipeline(pipe, 16, 16), 3.0)
    condition = condition_of(kind, pipe, [PROMPTS[i] for i in found.condition[:, 0].tolist()])
    trace = sample_trace(denoiser, cache.table, found.states[:, 0] / cache.table.start_scale, condition)
    scale = float(found.states.abs().max())
    assert float((torch.stack(trace.states, 1) - found.states).abs().max()) < 1e-5 * scale
    assert float((torch.stack(trace.outputs, 1) - found.outputs).abs().max()) < 1e-4 * scale
    assert (cache.schedule, cache.sample_shape) == (denoiser.schedule, denoiser.sample_shape)
    cache.check(denoiser)


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_as_a_denoiser_equals_its_adapter(kind: str) -> None:
    """Guided outputs at any state and at fractional timesteps of their own for each sample."""
    pipe = tiny_pipeline(kind)
    prompts, call = call_of(kind, PROMPTS, 3.0)
    denoiser, adapter = PipelineDenoiser(pipe, prompts, batch_size=2, **call), from_pipeline(pipe, 16, 16)
    assert (denoiser.sample_shape, denoiser.schedule) == (adapter.sample_shape, adapter.schedule)
    x, indices = start_noise([0, 1, 2], adapter.sample_shape), class_labels(denoiser, [1, 2, 3])
    condition = condition_of(kind, pipe, [PROMPTS[i] for i in indices[:, 0].tolist()])
    guided = with_guidance(adapter, 3.0)
    for timestep in (torch.tensor(700.0), torch.tensor([500.25, 20.0, 500.25])):
        expected = guided(x, timestep, condition)
        error = float((denoiser(x, timestep, indices) - expected).abs().max())
        assert error < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("kind", "scheduler", "rows"),
    [
        ("sd", PNDMScheduler, STEPS + 9),
        ("sd", EulerDiscreteScheduler, STEPS),
        ("pixart", HeunDiscreteScheduler, 2 * STEPS - 1),
        ("sd3", FlowMatchHeunDiscreteScheduler, 2 * STEPS - 1),
    ],
)
def test_other_schedulers_are_recorded(kind: str, scheduler: Any, rows: int, tmp_path: Path) -> None:
    """States are those the network sees, also under `scale_model_input`; rows are evaluations."""
    pipe = tiny_pipeline(kind)
    pipe.scheduler = own = scheduler.from_config(pipe.scheduler.config)
    before = copy.deepcopy(own.__dict__)
    prompts, call = call_of(kind, PROMPTS[:1], 2.0)
    cache = record_trajectories(pipe, prompts, tmp_path, STEPS, progress=False, **call)
    assert cache.table.nfe == rows
    assert_runs_of_its_table(cache, tolerance=1e-4)
    assert pipe.scheduler is own
    assert own.__dict__.keys() == before.keys()


class Sounds(DiffusionPipeline):
    """A pipeline nobody has heard of: sounds (batch, channels, length), one number as the prompt, its own guidance.

    From the second step on, `blend` is added to a part of the state, as inpainting does, and `rise` to the guidance.
    """

    blend = rise = 0.0

    def __init__(self, network: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, pitch: list[float], num_inference_steps: int = 50, generator: Any = None, push: float = 2.0):
        sounds = randn_tensor((len(pitch), 2, 30), generator=generator, device=torch.device("cpu"))
        self.scheduler.set_timesteps(num_inference_steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            told = torch.tensor(pitch)[:, None, None]
            told = told * (1 + timestep / 1000)
            output = torch.tanh(self.network(sounds) + (push + self.rise * (step > 1)) * told)
            sounds = self.scheduler.step(model_output=output, timestep=timestep, sample=sounds).prev_sample
            sounds[..., :10] += self.blend * (step > 0)
        return sounds


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(30, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def sounds() -> Sounds:
    return Sounds(Mixer().requires_grad_(False), DDIMScheduler(clip_sample=False))


@pytest.mark.parametrize("basis", ["teacher", "own"])
def test_olss_on_an_unknown_pipeline(basis: str, tmp_path: Path) -> None:
    """Fitted on recordings alone, run inside the pipeline: beats DDIM of as many steps on unseen seeds."""
    pipe, pitches = sounds(), [-0.5, 0.1, 0.7]
    call = {"prompt_argument": "pitch", "push": 1.5}
    cache = record_trajectories(pipe, pitches, tmp_path, 40, num_trajectories=12, progress=False, **call)
    assert_runs_of_its_table(cache)
    path = uniform_path(40, 4)
    if basis == "teacher":
        fit = fit_on_teacher(teacher_columns(cache.table, cache.batches()), cache.table, CallPlan(tuple(path)))
    else:
        denoiser = PipelineDenoiser(pipe, pitches, **call)
        fit = fit_run(denoiser, cache.table, [cache.load()], CallPlan(tuple(path))).fit
    table = fit.table(cache.table)

    def run(scheduler: Any, steps: int) -> Tensor:
        pipe.scheduler = scheduler
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        return pipe(pitch=pitches * 2, num_inference_steps=steps, generator=generators, push=1.5)

    reference = run(pipe.scheduler, 40)
    ddim = run(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), 4)
    scheduler = TableScheduler.from_solver(table, schedule=cache.schedule)
    fitted = run(scheduler, 4)
    errors = [float((image - reference).square().mean().sqrt()) for image in (fitted, ddim)]
    assert errors[0] < 0.5 * errors[1]
    denoiser = PipelineDenoiser(pipe, pitches, batch_size=3, **call)
    sampled = sample(denoiser, table, start_noise(range(6), (2, 30)), class_labels(denoiser, range(6)))
    assert torch.allclose(sampled, fitted, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdxl", "dit", "flux"])
def test_student_of_as_many_steps_is_the_teacher(kind: str, tmp_path: Path) -> None:
    """Alternating runs of a guided pipeline: with every state on the path, the fit reproduces each of them."""
    pipe = tiny_pipeline(kind)
    prompts, call = call_of(kind, PROMPTS, 2.0)
    cache = record_trajectories(pipe, prompts, tmp_path, 3, progress=False, **call)
    denoiser, found = PipelineDenoiser(pipe, prompts, batch_size=3, **call), cache.load()
    table = fit_run(denoiser, cache.table, [found], CallPlan((0, 1, 2))).fit.table(cache.table)
    images = sample(denoiser, table, found.states[:, 0] / table.start_scale, found.condition)
    assert float((images - found.states[:, -1]).abs().max()) < 1e-4 * float(found.states.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_saved_pipeline_to_a_fast_one(kind: str, tmp_path: Path) -> None:
    """Load, record, fit, save, export, and run the pipeline with the exported scheduler: equals the sampler."""
    tiny_pipeline(kind).save_pretrained(tmp_path / kind)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / kind)
    pipe.set_progress_bar_config(disable=True)
    prompts, call = call_of(kind, PROMPTS, 2.0)
    cache = record_trajectories(pipe, prompts, tmp_path / "recorded", 8, progress=False, **call)
    denoiser = PipelineDenoiser(pipe, prompts, batch_size=3, **call)
    plan = CallPlan(tuple(uniform_path(cache.table.num_rows, STEPS)))
    fit = fit_run(denoiser, cache.table, [cache.load()], plan).fit
    artifact = tmp_path / "olss.json"
    save_solver(fit.table(cache.table), artifact, cache.identity, method="olss")
    export_solver(artifact, "diffusers", tmp_path / "scheduler")
    exported = TableScheduler.from_pretrained(tmp_path / "scheduler")
    guided = with_guidance(from_pipeline(pipe, 16, 16), 2.0)
    loaded, noise = load_solver(artifact, guided), start_noise([3, 4], guided.sample_shape)
    expected = sample(guided, loaded, noise, condition_of(kind, pipe, PROMPTS[:2]))
    for scheduler in (TableScheduler.for_pipeline(artifact, pipe, guidance_scale=2.0), exported):
        pipe.scheduler = scheduler
        found = run_pipeline(kind, pipe, noise, 2.0)
        assert relative_error(as_pipeline_output(kind, pipe, expected), found) < 1e-5


def test_recording_goes_on_where_it_was(tmp_path: Path) -> None:
    """Complete shards are kept; trajectories do not depend on what was recorded before."""
    pipe, pitches = sounds(), [-0.5, 0.1, 0.7]
    call: dict[str, Any] = {"prompt_argument": "pitch", "shard_size": 1, "progress": False}
    whole = record_trajectories(pipe, pitches, tmp_path / "a", 5, **call).load()
    record_trajectories(pipe, pitches, tmp_path / "b", 5, **call)
    (tmp_path / "b" / "shard-00001.tar").unlink()
    kept = (tmp_path / "b" / "shard-00000.tar").stat().st_mtime_ns
    again = record_trajectories(pipe, pitches, tmp_path / "b", 5, **call).load()
    assert (tmp_path / "b" / "shard-00000.tar").stat().st_mtime_ns == kept
    assert torch.equal(again.states, whole.states)
    assert torch.equal(again.condition, whole.condition)
    with pytest.raises(ValueError, match="another pipeline"):
        record_trajectories(pipe, pitches, tmp_path / "b", 5, push=3.0, **call)


def test_loaded_pipeline_records_and_samples(tmp_path: Path) -> None:
    """`family: pipeline` in a description file makes any pipeline folder a denoiser."""
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "sd")
    file = tmp_path / "sd.yaml"
    file.write_text(f"path: {tmp_path}/sd\nfamily: pipeline\nprompts: [a cat, dog]\ncall: {{height: 16, width: 16}}\n")
    denoiser = load_denoiser(file, guidance_scale=2.0)
    assert denoiser.guidance_scale == 2.0
    seeds = [0, 1]
    noise, table = start_noise(seeds, denoiser.sample_shape), named_solver("ddim:3", denoiser.schedule)
    condition = condition_of("sd", pipe, ["a cat", "dog"])
    expected = sample(with_guidance(from_pipeline(pipe, 16, 16), 2.0), table, noise, condition)
    found = sample(denoiser, table, noise, class_labels(denoiser, seeds))
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_a_pipeline_guides_above_one_only(tmp_path: Path) -> None:
    """Called with 0 it gives the conditional output, which is scale 1 here; 0 is the unconditional output here."""
    pipe = tiny_pipeline("sd")
    prompts, size, seeds = ["a cat", "dog"], {"height": 16, "width": 16}, [0, 1]
    condition, plain = condition_of("sd", pipe, prompts), from_pipeline(pipe, 16, 16)
    recorded = PipelineDenoiser(pipe, prompts, guidance_scale=0.0, **size)
    x, timestep = start_noise(seeds, recorded.sample_shape), torch.tensor(500.0)
    assert recorded.guidance_scale == 1.0
    found = recorded(x, timestep, class_labels(recorded, seeds))
    torch.testing.assert_close(found, plain(x, timestep, condition), rtol=1e-4, atol=1e-5)
    unconditional = with_guidance(plain, 0.0)(x, timestep, condition)
    torch.testing.assert_close(unconditional, plain(x, timestep, plain.null_condition(condition)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, unconditional, atol=1e-3)

    pipe.save_pretrained(tmp_path / "sd")
    file = tmp_path / "sd.yaml"
    file.write_text(f"path: {tmp_path}/sd\nfamily: pipeline\nprompts: [a cat, dog]\n")
    with pytest.raises(ValueError, match=r"cannot be guided by 0\.0: StableDiffusionPipeline called with it has"):
        load_denoiser(file, guidance_scale=0.0)
    table = named_solver("ddim:3", plain.schedule)
    for scale, fits in ((1.0, True), (0.0, False)):
        path = save_solver(table, tmp_path / "s.json", identify(with_guidance(plain, scale)), method="test")
        for called in (0.0, 0.7, 1.0):
            if fits:
                assert TableScheduler.for_pipeline(path, pipe, guidance_scale=called)
            else:
                with pytest.raises(ValueError, match=r"made for guidance scale 0\.0, found 1\.0"):
                    TableScheduler.for_pipeline(path, pipe, guidance_scale=called)


def test_a_network_that_is_told_its_scale_keeps_it() -> None:
    assert pipeline_guidance(tiny_pipeline("flux"), {"guidance_scale": 0.5}) == 0.5
    assert pipeline_guidance(tiny_pipeline("sd3"), {"guidance_scale": 0.5}) == 1.0


def test_recording_errors(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(ValueError, match="at least one prompt"):
        record_trajectories(pipe, [], tmp_path, 4)
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no hight: its arguments are"):
        record_trajectories(pipe, PROMPTS, tmp_path, 4, hight=16)
    own = pipe.scheduler
    with pytest.raises(ValueError, match="steps 2 samples for 1 prompts"):
        PipelineDenoiser(pipe, PROMPTS, num_images_per_prompt=2).record(4, torch.tensor([[0, 0]]))
    assert pipe.scheduler is own
    pipe.scheduler = DDIMScheduler(clip_sample=True)
    with pytest.raises(ValueError, match="not linear"):
        record_trajectories(pipe, PROMPTS, tmp_path, 4, height=16, width=16)
    partial = StableDiffusionImg2ImgPipeline(**tiny_pipeline("sd").components, requires_safety_checker=False)
    partial.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"makes 1 of 2 steps as it is called, .* with strength=1\.0"):
        record_trajectories(
            partial, PROMPTS, tmp_path, 4, image=torch.zeros(1, 3, 16, 16), strength=0.5, progress=False
        )


def test_predict_records_a_pipeline(tmp_path: Path) -> None:
    """`train.py predict` writes what `record_trajectories` writes."""
    from train import main

    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "sd")
    file = tmp_path / "sd" / "denoiser.yaml"
    file.write_text("family: pipeline\nprompts: [a cat, dog, tree]\nbatch_size: 2\n")
    arguments = [
        "--model.denoiser",
        str(file.parent),
        "--model.folder",
        str(tmp_path / "a"),
        "--model.guidance_scale",
        "2",
    ]
    steps = ["--model.num_inference_steps", str(STEPS), "--model.shard_size", "2", "--trainer.accelerator", "cpu"]
    main(["predict", "--config", "configs/trajectories/pipeline.yaml", *arguments, *steps])
    call = {"guidance_scale": 2.0, "batch_size": 2, "shard_size": 2, "progress": False}
    expected = record_trajectories(pipe, PROMPTS, tmp_path / "b", STEPS, **call)
    found = TrajectoryCache(tmp_path / "a")
    assert torch.equal(found.load().states, expected.load().states)
    teachers = [cache.manifest["teacher"] for cache in (found, expected)]
    assert teachers[0] == teachers[1]


def test_what_recordings_do_not_show_is_refused(tmp_path: Path) -> None:
    """Noise of a stochastic scheduler, and states that the pipeline changes between steps."""
    pipe, call = sounds(), {"prompt_argument": "pitch", "progress": False}
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    with pytest.raises(
        ValueError, match=r"DDPMScheduler of Sounds draws fresh noise at its steps.*DDIMScheduler\.from"
    ):
        record_trajectories(pipe, [0.5], tmp_path, 4, **call)
    pipe.scheduler = FlowMatchLCMScheduler()
    with pytest.raises(ValueError, match=r"draws fresh noise.*FlowMatchEulerDiscreteScheduler\.from_config"):
        record_trajectories(pipe, [0.5], tmp_path, 4, **call)
    pipe.scheduler, pipe.blend = DDIMScheduler(clip_sample=False), 0.3
    with pytest.raises(ValueError, match=r"changes its state, or its scheduler, between the steps \(step 1 is off by"):
        record_trajectories(pipe, [0.5], tmp_path, 4, **call)
    pipe.blend, pipe.rise = 0.0, 0.5
    with pytest.raises(
        ValueError, match=r"called again at the state of step 2 of its run, gives another output \(off by"
    ):
        record_trajectories(pipe, [0.5], tmp_path, 4, **call)
    assert not list(tmp_path.glob("*.tar"))


class Drawing(Sounds):
    """Draws a part of the condition from the generator, and writes its state in place."""

    def __call__(self, pitch, num_inference_steps=50, generator=None, push=2.0):
        sounds, drawn = (randn_tensor((len(pitch), 2, 30), generator=generator) for _ in range(2))
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            output = torch.tanh(self.network(sounds) + push * drawn)
            sounds[...] = self.scheduler.step(model_output=output, timestep=timestep, sample=sounds).prev_sample
        return sounds


def test_conditioning_drawn_from_the_generator_is_drawn_again(tmp_path: Path) -> None:
    """As encoded pictures of inpainting and control: the seed is a part of the condition."""
    pipe = Drawing(sounds().network, DDIMScheduler(clip_sample=False))
    call: dict[str, Any] = {"prompt_argument": "pitch", "progress": False, "batch_size": 2}
    cache = record_trajectories(pipe, [0.5, 0.7], tmp_path, 4, num_trajectories=3, **call)
    assert_runs_of_its_table(cache)
    found = cache.load()
    assert found.condition.tolist() == [[0, 2**31], [1, 2**31 + 1], [0, 2**31 + 2]]
    outputs = PipelineDenoiser(pipe, [0.5, 0.7], prompt_argument="pitch")(
        found.states[:, 2], cache.table.timesteps[2], found.condition
    )
    torch.testing.assert_close(outputs, found.outputs[:, 2], rtol=1e-4, atol=1e-5)


class DrawingElsewhere(Drawing):
    """From torch's global generator."""

    def __call__(self, pitch, num_inference_steps=50, generator=None):
        torch.randn(3)
        drawn = [torch.Generator().manual_seed(int(torch.randint(99, ()))) for _ in pitch]
        return super().__call__(pitch, num_inference_steps, drawn)


def test_conditioning_drawn_from_the_global_generator_is_the_seed_s_too(tmp_path: Path) -> None:
    """As Stable Diffusion 3's control networks do; the user's own draws are as they were."""
    pipe, call = DrawingElsewhere(sounds().network, DDIMScheduler(clip_sample=False)), {"prompt_argument": "pitch"}
    torch.manual_seed(5)
    expected = torch.randn(2)
    torch.manual_seed(5)
    cache = record_trajectories(pipe, [0.5], tmp_path / "one", 4, num_trajectories=2, progress=False, **call)
    assert torch.equal(torch.randn(2), expected)
    found = cache.load()
    denoiser = PipelineDenoiser(pipe, [0.5], **call)
    again = denoiser(found.states[:, 2], cache.table.timesteps[2], found.condition)
    torch.testing.assert_close(again, found.outputs[:, 2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"draws from torch's global generator.* record it with batch_size=1"):
        record_trajectories(pipe, [0.5, 0.7], tmp_path / "two", 4, progress=False, batch_size=2, **call)


class Broken(Sounds):
    def __call__(self, pitch, num_inference_steps=50, generator=None):
        self.network = lambda x: x * torch.nan
        return super().__call__(pitch, num_inference_steps, generator)


class Combined(Sounds):
    def __init__(self, network, scheduler):
        super().__init__(network, scheduler)
        self.inner = Sounds(network, scheduler)

    def __call__(self, pitch, num_inference_steps=50, generator=None):
        return self.inner(pitch, num_inference_steps, generator)


class Framewise(Sounds):
    """A copy of the scheduler does the steps."""

    def __call__(self, pitch, num_inference_steps=50, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        return Sounds(self.network, copy.deepcopy(self.scheduler))(pitch, num_inference_steps, generator)


class Telling(Sounds):
    def __call__(self, pitch, num_inference_steps=50, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.zeros(1, 2, 30)
        for timestep in self.scheduler.timesteps:
            sample = self.scheduler.step(sample, timestep, sample, variance_noise=torch.ones(1, 2, 30))[0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Broken, "gives an output that is not finite at step 0: run it in float32"),
        (Combined, r"does not step its scheduler itself: it runs other pipelines \(take the one that makes"),
        (Framewise, "does not step its scheduler itself: .* a copy of it for each frame"),
        (Telling, "tells its scheduler variance_noise at each step, which no table knows"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(kind: type, reason: str, tmp_path: Path) -> None:
    pipe = kind(sounds().network, DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match=reason) as refusal:
        record_trajectories(pipe, [0.5], tmp_path, 4, prompt_argument="pitch", progress=False)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("*.tar"))


def test_a_scheduler_that_needs_its_own_past_is_refused(tmp_path: Path) -> None:
    pipe = sounds()
    pipe.scheduler = CogVideoXDPMScheduler()
    with pytest.raises(TypeError, match="missing"):
        pipe([0.5])  # CogVideoX's own pipelines tell it, others cannot
    with pytest.raises(
        ValueError, match="has to tell CogVideoXDPMScheduler its old_pred_original_sample and timestep_b"
    ):
        tabulate(pipe.scheduler, 4)
