"""Students of U-Nets: start as the teacher, are told gamma as diffusers tells a guidance scale, and come back whole."""

from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

from denoisers import load_denoiser, with_guidance
from denoisers.diffusers_models import from_pipeline
from denoisers.gamma import Student, with_gamma
from denoisers.pipeline_folder import lcm_scheduler
from denoisers.prompt_unet import gamma_sinusoids
from denoisers.prompts import encode_prompts
from solvers import sample, start_noise, tabulate
from tests.tiny_pipelines import tiny_pipeline

PROMPTS = ["a cat", "dog"]
GAMMA = torch.tensor([0.0, 0.7])


def inputs(pipe):
    return torch.randn(2, 4, 8, 8), torch.tensor([999.0, 259.5]), encode_prompts(pipe, PROMPTS)


def stirred(student):
    """The same student after some training."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        student.gamma_embedding.weight.normal_(std=0.1)
    return student


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_starts_as_the_teacher_at_every_gamma(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    teacher = from_pipeline(pipe)
    student = with_gamma(with_guidance(teacher, 7.5))
    assert isinstance(student, Student)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    x, timestep, condition = inputs(pipe)
    for gamma in (None, GAMMA):
        assert torch.equal(student(x, timestep, condition, gamma), teacher(x, timestep, condition))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_gamma_is_embedded_as_diffusers_embeds_a_guidance_scale() -> None:
    pipe = LatentConsistencyModelPipeline(**tiny_pipeline("sd").components, requires_safety_checker=False)
    expected = pipe.get_guidance_scale_embedding(10 - 10 * GAMMA, embedding_dim=256)
    torch.testing.assert_close(gamma_sinusoids(GAMMA, 256), expected, rtol=0, atol=2e-3)  # angles up to 10,000 radians
    small = torch.tensor([1.0, 0.99999])
    expected = pipe.get_guidance_scale_embedding(10 - 10 * small, embedding_dim=256)
    torch.testing.assert_close(gamma_sinusoids(small, 256), expected, rtol=0, atol=1e-6)


def test_a_trained_student_depends_on_gamma_and_one_is_the_default() -> None:
    pipe = tiny_pipeline("sd")
    student = stirred(with_gamma(from_pipeline(pipe)))
    x, timestep, condition = inputs(pipe)
    plain = student(x, timestep, condition)
    assert torch.equal(plain, student(x, timestep, condition, torch.ones(2)))
    assert (plain - student(x, timestep, condition, torch.zeros(2))).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_gradient() -> None:
    pipe = tiny_pipeline("sd")
    gradients = []
    for checkpointing in (False, True):
        student = with_gamma(from_pipeline(pipe))
        student.gradient_checkpointing = checkpointing
        assert student.gradient_checkpointing is checkpointing
        torch.manual_seed(0)
        student(*inputs(pipe), GAMMA).square().mean().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    assert all(torch.allclose(*pair, atol=1e-7) for pair in zip(*gradients))


def test_blocks_are_parts_of_the_network_none_twice() -> None:
    student = with_gamma(from_pipeline(tiny_pipeline("sd")))
    owned = [id(parameter) for block in student.blocks for parameter in block.parameters()]
    assert len(owned) == len(set(owned)) > 0
    assert set(owned) < {id(parameter) for parameter in student.parameters()}
    student.gradient_checkpointing = True
    student.gradient_checkpointing = False
    assert not student.gradient_checkpointing


@pytest.fixture
def saved(tmp_path: Path):
    """(student, folder it was saved in, its weights file, its hash), of a teacher on disk with prompts."""
    tiny_pipeline("sd").save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "denoiser.yaml").write_text("prompts: [a cat, dog]\ndecoder: true\n")
    student = stirred(with_gamma(load_denoiser(tmp_path / "teacher"))).eval().requires_grad_(False)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    path, digest = student.save(tmp_path / "out", {"teacher_points": 40}, weights)
    return student, tmp_path / "out", path, digest


@pytest.mark.parametrize("place", [".", "unet"])
def test_a_saved_student_is_a_denoiser(saved, place: str) -> None:
    student, folder, path, digest = saved
    assert path == folder / "unet" / "diffusion_pytorch_model.safetensors"
    loaded = load_denoiser(folder / place)
    assert loaded.weight_hash == digest
    assert (loaded.schedule, loaded.sample_shape) == (student.schedule, student.sample_shape)
    x, timestep = torch.randn(2, 4, 8, 8), torch.tensor(500.0)
    assert torch.equal(loaded(x, timestep, loaded.conditions), student(x, timestep, student.conditions))
    assert loaded.decode(x).shape == (2, 3, 16, 16)
    assert "teacher_points" in (folder / "unet" / "training.json").read_text()


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, LatentConsistencyModelPipeline])
@pytest.mark.parametrize("steps", [1, 4])
def test_pipelines_draw_the_sampler_s_image(saved, kind, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, folder, *_ = saved
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert pipe.scheduler.config.original_inference_steps == 40
    noise = start_noise([0, 1], student.sample_shape)
    fresh = torch.randn(steps, *noise.shape)
    rows = iter(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(rows))
    scale = {"guidance_scale": 1.0, "num_inference_steps": steps, "output_type": "latent"}
    found = pipe(PROMPTS, latents=noise, height=16, width=16, **scale).images
    monkeypatch.undo()
    table = tabulate(lcm_scheduler(student.scheduler_config, 40), steps)
    wanted = sample(student, table, noise, student.conditions, step_noise=fresh)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_half_precision_stays_and_a_missing_part_is_said(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "teacher")
    student = with_gamma(load_denoiser(tmp_path / "teacher", dtype="bfloat16"))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    (tmp_path / "teacher" / "text_encoder" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"without the other parts of .*teacher"):
        _, digest = student.save(tmp_path / "out", {}, student.state_dict())
    loaded = load_denoiser(tmp_path / "out" / "unet")
    assert loaded.weight_hash == digest
    assert loaded.network.dtype == torch.bfloat16


def test_a_student_in_memory_is_saved_without_the_pipeline(tmp_path: Path) -> None:
    student = with_gamma(from_pipeline(tiny_pipeline("sd")))
    _, digest = student.save(tmp_path, {}, student.state_dict())
    assert load_denoiser(tmp_path / "unet").weight_hash == load_denoiser(tmp_path).weight_hash == digest
    assert not (tmp_path / "model_index.json").exists()


def test_a_student_is_no_teacher() -> None:
    student = with_gamma(from_pipeline(tiny_pipeline("sd")))
    with pytest.raises(ValueError, match=r"guidance embedding already \(time_cond_proj_dim 256\).*distil the model"):
        with_gamma(student)
