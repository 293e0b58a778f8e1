"""SLAM on the transformers of tiny pipelines: two steps, and the student draws the same in its pipeline and here."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.callbacks import ModelCheckpoint

from denoisers import class_labels, load_denoiser, with_scale
from denoisers.diffusers_models import from_pipeline
from denoisers.gamma import Student, with_gamma
from slam.export import Exports
from slam.module import SLAM
from slam.objective import Objective
from solvers import load_solver, sample, start_noise
from solvers.accelerate import accelerate_pipeline
from solvers.errors import SolverError
from tests.tiny_pipelines import call_arguments, encoding, size, tiny_pipeline
from training.ema import EMA
from training.network import AdamW

KINDS = ("pixart", "sd3", "flux", "qwen", "wan")
PROMPTS = ["a cat", "dog"]
GUIDANCE = 3.0


def tiny_model(kind: str, folder: Path, **options: Any) -> Path:
    """A pipeline's folder with prompts."""
    tiny_pipeline(kind).save_pretrained(folder)
    lines = {"prompts": PROMPTS, "negative_prompt": "", **size(kind), "encode": encoding(kind), **options}
    (folder / "denoiser.yaml").write_text("".join(f"{key}: {value!r}\n" for key, value in lines.items()))
    return folder


def batches(model: Path, count: int = 4) -> torch.utils.data.DataLoader:
    """Pairs of made-up latents and the prompts' embeddings."""
    denoiser = load_denoiser(model)
    data = [(start_noise([2 * k, 2 * k + 1], denoiser.sample_shape), class_labels(denoiser, [0, 1])) for k in range(9)]
    return torch.utils.data.DataLoader(data[:count], batch_size=None)


def distil(model: Path, output: Path, **options: Any) -> SLAM:
    """A student of two steps."""
    torch.manual_seed(0)
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 2}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer |= {
        name: options.pop(name) for name in ("precision", "callbacks", "enable_checkpointing") if name in options
    }
    start = {"ckpt_path": options.pop("ckpt_path"), "weights_only": True} if "ckpt_path" in options else {}
    made = {"objective": Objective(teacher_points=10), "optimizer": AdamW(3e-2), "exports": Exports((1, 4))}
    made |= {"guidance_scale": GUIDANCE, "sample_every": 0}
    module = SLAM(str(model), str(output), **made | options)
    lightning.Trainer(**trainer).fit(module, batches(model), **start)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_starts_as_its_teacher_and_is_told_gamma(kind: str, tmp_path: Path) -> None:
    teacher = load_denoiser(tiny_model(kind, tmp_path))
    student = with_gamma(teacher)
    assert isinstance(student, Student)
    x, timestep, gamma = start_noise([0, 1], teacher.sample_shape), torch.tensor(400.0), torch.tensor([0.0, 0.6])
    asked = x, timestep, teacher.conditions
    assert torch.equal(student(*asked, gamma), teacher(*asked))
    torch.nn.init.normal_(student.gamma_embedding.mlp[2].weight, std=0.3)
    plain = student(*asked)
    assert torch.equal(student(*asked, torch.ones(2)), plain)
    assert (student(*asked, gamma) - plain).abs().max() > 1e-3
    assert torch.equal(student(*asked), plain)  # nothing of gamma stays behind
    owned = [id(value) for block in student.blocks for value in block.parameters()]
    assert 0 < len(owned) == len(set(owned))
    assert not any(value.requires_grad for value in teacher.parameters())


@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_draws_the_sampler_s_picture(
    kind: str, lora_rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind, tmp_path / "model")
    distil(model, tmp_path / "out", lora_rank=lora_rank)
    scale = GUIDANCE if kind == "flux" else 1.0  # a network that is told the scale
    student, teacher = (load_denoiser(path, scale) for path in (tmp_path / "out" / "student", model))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "student")
    pipe.set_progress_bar_config(disable=True)
    noise = start_noise([3, 4], student.sample_shape)
    for steps in (1, 4):
        table = load_solver(tmp_path / "out" / f"slam-{steps}.json", student)
        fresh = torch.randn(steps, *noise.shape)
        rows = iter(fresh)
        monkeypatch.setattr("solvers.standalone.table_scheduler.randn_tensor", lambda *_, rows=rows, **__: next(rows))
        with accelerate_pipeline(pipe, tmp_path / "out" / f"slam-{steps}.json"):
            found = pipe(**call_arguments(kind, PROMPTS, scale, steps), latents=noise.clone())[0]
        wanted, before = (sample(one, table, noise, one.conditions, step_noise=fresh) for one in (student, teacher))
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert (found - before).abs().max() > 1e-4 * before.abs().max()


@pytest.mark.parametrize("kind", ["sd3", "flux", "qwen", "wan"])
def test_a_lora_file_makes_the_teacher_the_student(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, tmp_path / "model")
    distil(model, tmp_path / "out", lora_rank=2)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "out" / "lora")
    student, adapted = load_denoiser(tmp_path / "out" / "student"), from_pipeline(pipe, **size(kind))
    asked = start_noise([0, 1], student.sample_shape), torch.tensor(400.0), student.conditions
    wanted = student(*asked)
    assert (adapted(*asked) - wanted).abs().max() < 1e-5
    pipe.unload_lora_weights()
    assert (from_pipeline(pipe, **size(kind))(*asked) - wanted).abs().max() > 1e-4


def storages(*networks: torch.nn.Module) -> int:
    """Bytes of all weights, each counted once."""
    found = {value.untyped_storage().data_ptr(): value.nbytes for one in networks for value in one.parameters()}
    return sum(found.values())


def test_adapters_stand_around_the_teacher_s_own_weights(tmp_path: Path) -> None:
    """Teacher, student and target are one copy of the weights, in the teacher's format, and their adapters."""
    model = tiny_model("flux", tmp_path / "model", dtype="bfloat16")
    module = SLAM(str(model), guidance_scale=GUIDANCE, lora_rank=2)
    networks = module.student, module.target, module.teacher
    trained = sum(value.nbytes for value in module.student.parameters() if value.requires_grad)
    whole = sum(value.nbytes for value in module.teacher.parameters())
    assert storages(*networks) == whole + 2 * trained
    assert {value.dtype for value in module.student.parameters() if value.requires_grad} == {torch.float32}
    before = {name: value.clone() for name, value in module.teacher.named_parameters()}
    trained = distil(model, tmp_path / "out", lora_rank=2, precision="bf16-mixed")
    assert all(torch.equal(value, before[name]) for name, value in trained.teacher.named_parameters())
    assert load_denoiser(tmp_path / "out" / "student").network.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"in bfloat16, and trainer\.precision is 32-true: train with --trainer\.prec"):
        distil(model, tmp_path / "other", lora_rank=2)


def test_a_student_is_told_any_scale_of_a_range(tmp_path: Path) -> None:
    """Every sample has one of its own, which teacher and student are told; pipelines choose one."""
    model = tiny_model("flux", tmp_path / "model")
    module = distil(model, tmp_path / "out", guidance_scale=(1.5, 4.0))
    scales = module._scaled(module.teacher.conditions, 64, 0)["guidance_scale"]
    assert 1.5 <= scales.min() < 2 < 3.5 < scales.max() <= 4
    ranged, teacher = load_denoiser(model, (1.5, 4.0)), load_denoiser(model)
    x, timestep = start_noise([0, 1], teacher.sample_shape), torch.tensor(400.0)
    found = ranged(x, timestep, with_scale(ranged, teacher.conditions, torch.tensor([2.0, 3.0])))
    wanted = [teacher.told(scale)(x, timestep, teacher.conditions)[k] for k, scale in enumerate((2.0, 3.0))]
    assert torch.allclose(found, torch.stack(wanted), atol=1e-6)
    assert (wanted[0] - teacher.told(3.0)(x, timestep, teacher.conditions)[0]).abs().max() > 1e-4
    student = load_denoiser(tmp_path / "out" / "student", 2.5)
    table = load_solver(tmp_path / "out" / "slam-1.json", student)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "student")
    with accelerate_pipeline(pipe, tmp_path / "out" / "slam-1.json"):
        drawn = pipe(**call_arguments("flux", PROMPTS, 2.5, 1), latents=x.clone()).images
    assert (drawn - sample(student, table, x, student.conditions, seeds=[0, 1])).abs().max() < 1e-5
    with pytest.raises(SolverError, match="made for guidance scale"):
        load_solver(tmp_path / "out" / "slam-1.json", load_denoiser(tmp_path / "out" / "student", 5.0))


def test_a_range_of_scales_needs_a_network_that_is_told_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale is \[1\.5, 4\.0\]: a student of model is told no scale"):
        SLAM(str(tiny_model("sd3", tmp_path / "model")), guidance_scale=(1.5, 4.0))


def test_a_checkpoint_of_adapters_knows_its_teacher(tmp_path: Path) -> None:
    """It holds the adapters alone, in every role, and goes on around no other weights."""
    first, second = (tiny_model("sd3", tmp_path / name) for name in ("first", "second"))
    tiny_pipeline("sd3", seed=1).transformer.save_pretrained(second / "transformer")
    keep = ModelCheckpoint(tmp_path, "one", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    distil(first, tmp_path / "out", lora_rank=2, callbacks=[keep, EMA(0.5, "student")], enable_checkpointing=True)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    names = [*saved["state_dict"], *saved["callbacks"]["EMA"]]
    assert all("lora_" in name or "gamma_embedding" in name for name in names)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"student", "target"}
    with pytest.raises(ValueError, match="the checkpoint is of teacher"):
        distil(second, tmp_path / "other", lora_rank=2, ckpt_path=tmp_path / "one.ckpt")
