"""SLAM on a tiny Stable Diffusion, from pictures with captions to a diffusers folder, by the shipped configs."""

import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import yaml
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from diffusers.models.embeddings import Timesteps
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig

import sample as command
from data.latents import LatentData
from denoisers import load_denoiser
from denoisers.prompt_unet import constant_reader
from slam.export import Exports
from slam.module import SLAM
from solvers import load_solver, sample, start_noise, student_path
from tests.image_text import image_text_folder, write_image_text
from tests.tiny_pipelines import tiny_pipeline
from train import main
from training.network import AdamW

PROMPTS = ["a cat", "dog"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def tiny_model(folder: Path, **options) -> Path:
    """A Stable Diffusion folder with prompts; returns it."""
    tiny_pipeline("sd").save_pretrained(folder)
    described = {"prompts": PROMPTS, "decoder": True} | options
    (folder / "denoiser.yaml").write_text(yaml.safe_dump(described))
    return folder


def encode(model: Path, images: Path, folder: Path, *options: str) -> None:
    places = [f"--model.model={model}", f"--model.images={images}", f"--model.folder={folder}"]
    main(["predict", "--config=configs/encode/sd15.yaml", *QUIET, *places, "--model.batch_size=2", *options])


def distil(model: Path, shards: Path, output: Path, *options: str) -> None:
    callbacks = output / "callbacks.yaml"
    output.mkdir(parents=True, exist_ok=True)
    callbacks.write_text("trainer: {callbacks: [], logger: false, enable_checkpointing: false}\n")
    places = [f"--model.teacher={model}", f"--data.folder={shards}", f"--model.output={output}"]
    small = [
        "--trainer.max_steps=3",
        "--data.batch_size=2",
        "--data.num_workers=0",
        "--model.optimizer.learning_rate=0.01",
    ]
    main(["fit", "--config=configs/slam/sd15.yaml", f"--config={callbacks}", *QUIET, *places, *small, *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, shards and a student of three steps."""
    folder = tmp_path_factory.mktemp("sd")
    encode(tiny_model(folder / "model"), image_text_folder(folder / "images"), folder / "shards")
    distil(folder / "model", folder / "shards", folder / "out")
    return folder


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, LatentConsistencyModelPipeline])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_diffusers_draws_the_same_picture(run: Path, kind: type, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_solver(run / "out" / f"slam-{steps}.json")
    assert student_path(table) == run / "out/student/unet/diffusion_pytorch_model.safetensors"
    student = load_denoiser(run / "out" / "student")
    load_solver(run / "out" / f"slam-{steps}.json", student)
    noise = start_noise([0, 1], student.sample_shape)
    fresh = torch.randn(steps, *noise.shape)
    wanted = student.decode(sample(student, table, noise, student.conditions, step_noise=fresh))
    pipe = kind.from_pretrained(run / "out" / "student")
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    rows = iter(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(rows))
    call = {"guidance_scale": 1.0, "num_inference_steps": steps, "height": 16, "width": 16, "output_type": "pt"}
    found = pipe(PROMPTS, latents=noise, **call).images
    assert (found - (wanted / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    assert found.std() > 0.01


def test_the_student_was_trained(run: Path) -> None:
    teacher, student = load_denoiser(run / "model"), load_denoiser(run / "out" / "student")
    x, timestep, gamma = torch.randn(2, 4, 8, 8), torch.tensor(500.0), torch.zeros(2)
    found = student(x, timestep, student.conditions)
    assert (found - teacher(x, timestep, teacher.conditions)).abs().max() > 1e-3
    assert (found - student(x, timestep, student.conditions, gamma)).abs().max() > 1e-4
    info = load_solver(run / "out" / "slam-4.json").info
    assert info["fitted_on"]["data"] == "6 pictures with captions, shards, encoded by model"
    assert info["fitted_on"]["guidance_scale"] == 9.0


def test_one_path_generates(run: Path, tmp_path: Path) -> None:
    command.main(["generate", f"--solver={run / 'out/slam-2.json'}", "--num_samples=2", f"--output={tmp_path}"])
    assert (tmp_path / "grid.png").is_file()


def lora_pipeline(run: Path, output: Path) -> StableDiffusionPipeline:
    """The teacher's pipeline with the student's LoRA and its scheduler."""
    pipe = StableDiffusionPipeline.from_pretrained(run / "model")
    pipe.load_lora_weights(output / "lora", adapter_name="slam")
    pipe.scheduler = LCMScheduler.from_pretrained(output / "student" / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("method", "share"), [("consistency", 1e-3), ("slam", 0.15)])
def test_a_lora_file_makes_the_teacher_the_student(run: Path, tmp_path: Path, method: str, share: float) -> None:
    """Up to what eight sinusoids can say of a constant, see `test_sinusoids_can_say_a_constant`."""
    distil(run / "model", run / "shards", tmp_path, "--model.lora_rank=2", f"--model.objective.method={method}")
    pipe = lora_pipeline(run, tmp_path)
    teacher, student = load_denoiser(run / "model"), load_denoiser(tmp_path / "student")
    x, condition = torch.randn(2, 4, 8, 8), student.conditions
    for timestep in (999.0, 259.0):
        wanted, before = (one(x, torch.tensor(timestep), condition) for one in (student, teacher))
        with torch.no_grad():
            found = pipe.unet(x, timestep, condition["encoder_hidden_states"]).sample
        assert (wanted - before).norm() > 1e-3 * before.norm()
        assert (found - wanted).norm() < share * (wanted - before).norm()


def test_a_lora_file_goes_beside_another(run: Path, tmp_path: Path) -> None:
    distil(run / "model", run / "shards", tmp_path, "--model.lora_rank=2")
    pipe = lora_pipeline(run, tmp_path)
    style = LoraConfig(r=4, target_modules=["to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(style, adapter_name="style")
    inputs = torch.randn(1, 4, 8, 8), 500.0, load_denoiser(run / "model").conditions["encoder_hidden_states"][:1]

    @torch.no_grad()
    def output(*names: str) -> torch.Tensor:
        pipe.set_adapters(list(names), [1.0] * len(names))
        return pipe.unet(*inputs).sample

    both = output("slam", "style")
    assert all((both - output(name)).norm() > 1e-3 * both.norm() for name in ("slam", "style"))
    output("slam", "style")
    pipe.fuse_lora(adapter_names=["slam", "style"])
    assert (pipe.unet(*inputs).sample - both).norm() < 1e-5 * both.norm()


def test_sinusoids_can_say_a_constant() -> None:
    """Of Stable Diffusion's 320 channels, also rounded to half precision."""
    network = SimpleNamespace(time_proj=Timesteps(320, True, 0))
    features, reader = network.time_proj(torch.arange(1000)), constant_reader(network)
    assert (features @ reader - 1).abs().max() < 1e-4
    assert (features @ reader.half().float() - 1).abs().max() < 2e-4


@pytest.mark.parametrize("options", [[], ["--model.lora_rank=2"], ["--model.gradient_checkpointing=true"]])
def test_a_teacher_in_half_precision_is_not_mixed_with_autocast_s(run: Path, tmp_path: Path, options: list) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "denoiser.yaml").write_text(yaml.safe_dump({"path": str(run / "model"), "dtype": "float16"}))
    distil(model, run / "shards", tmp_path / "out", "--trainer.max_steps=1", *options)
    found = load_denoiser(tmp_path / "out" / "student")
    assert found.network.dtype == torch.float16
    assert load_solver(tmp_path / "out" / "slam-2.json", found).nfe == 2


def one_step(run: Path, output: Path, strategy) -> None:
    """A step of two processes."""
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    more = {"logger": False, "use_distributed_sampler": False, "accelerator": "cpu", "devices": 2, "max_steps": 1}
    options = {"optimizer": AdamW(1e-2), "exports": Exports(steps=(1,)), "sample_every": 0}
    module = SLAM(str(run / "model"), str(output), guidance_scale=9.0, **options)
    data = LatentData(str(run / "shards"), batch_size=1)
    lightning.Trainer(strategy=strategy, **quiet, **more).fit(module, datamodule=data)


def sharded_rank(rank: int, port: int, run: Path, output: Path) -> None:
    """One of two processes of FSDP2, as torchrun starts them."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="slam")
    one_step(run, output, ModelParallelStrategy(process_group_backend="gloo", save_distributed_checkpoint=False))


def test_sharded_training_equals_ddp(run: Path, tmp_path: Path) -> None:
    """FSDP2 shards student, target and teacher over all processes; float32, so the export shows every difference."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, run, tmp_path / "sharded")
    torch.multiprocessing.start_processes(sharded_rank, arguments, nprocs=2, start_method="fork")
    one_step(run, tmp_path / "ddp", "ddp_fork")
    sharded, whole = (load_denoiser(tmp_path / name / "student").state_dict() for name in ("sharded", "ddp"))
    before = load_denoiser(run / "model").state_dict()
    assert max((whole[name] - before[name]).abs().max() for name in before) > 1e-4
    differ = torch.cat([(sharded[name] - whole[name]).abs().flatten() for name in whole])
    assert (differ > 1e-5).float().mean() < 0.01  # Adam turns gradients of nothing but rounding into whole steps


def fails(capsys: pytest.CaptureFixture, action, *arguments) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        action(*arguments)
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def other(tmp_path: Path, part: str) -> Path:
    """A model that differs in one of its parts."""
    pipe, source = tiny_pipeline("sd"), tiny_pipeline("sd", seed=1)
    pipe.register_modules(**{part: getattr(source, part)})
    pipe.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_data_of_another_model_are_refused_before_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slam.module.SLAM.training_step", lambda *_: pytest.fail("trained"))
    for part in ("vae", "text_encoder"):
        found = fails(capsys, distil, other(tmp_path, part), run / "shards", tmp_path / "out")
        assert f"was encoded with another {part}" in found
    larger = tiny_model(tmp_path / "larger", height=32, width=32)
    assert "latents of shape (4, 8, 8)" in fails(capsys, distil, larger, run / "shards", tmp_path / "out")


def test_damage_is_refused_before_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slam.module.SLAM.training_step", lambda *_: pytest.fail("trained"))
    shards = Path(shutil.copytree(run / "shards", tmp_path / "shards"))
    with open(shards / "pairs-0.tar", "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert "pairs-0.tar is corrupt" in fails(capsys, distil, run / "model", shards, tmp_path / "out")
    (shards / "unconditional.safetensors").unlink()
    assert "empty prompt, is missing" in fails(capsys, distil, run / "model", shards, tmp_path / "out")
    write_image_text(tmp_path / "images" / "a.tar", {"0": {"png": b"no picture", "txt": b"a cat"}})
    found = fails(capsys, encode, run / "model", tmp_path / "images", tmp_path / "new")
    assert "1 of 1 samples were left out, more than max_skipped 0.01 allows" in found


def test_training_goes_on_without_a_corrupt_shard_when_asked_to(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shards = Path(shutil.copytree(run / "shards", tmp_path / "shards"))
    (shards / "pairs-1.tar").unlink()
    distil(run / "model", shards, tmp_path / "out", "--data.skip_corrupt=true", "--trainer.max_steps=1")
    assert "left out: shard" in capsys.readouterr().err
    assert load_solver(tmp_path / "out" / "slam-1.json").info["fitted_on"]["data"].startswith("4 pictures")
