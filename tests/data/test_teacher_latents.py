"""Latents that a model with prompts makes itself: stored with their embeddings, gone on with, and trained on."""

from pathlib import Path

import pytest
import torch

from data.latent_shards import LatentShards
from denoisers import class_labels, load_denoiser
from solvers import load_solver, named_solver, sample, start_noise
from tests.slam.test_pipelines import GUIDANCE, tiny_model
from train import main

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
ALONE = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]


def predict(model: Path, folder: Path, *options: str) -> None:
    where = [f"--model.denoiser={model}", f"--model.folder={folder}", f"--model.guidance_scale={GUIDANCE}"]
    made = ["--model.teacher=euler:2", "--model.num_samples=5", "--model.shard_size=3", "--model.batch_size=2"]
    kind = ["--model=data.teacher_latents.TeacherLatents", "--data=data.teacher.TrajectoryShards"]
    main(["predict", "--return_predictions=false", *QUIET, *ALONE, *kind, *where, *made, *options])


def test_a_student_of_videos_learns_from_its_teacher_s_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("wan", tmp_path / "model")
    predict(model, tmp_path / "latents", "--model.dtype=float32", "--model.first_seed=7")
    shards, teacher = LatentShards(tmp_path / "latents"), load_denoiser(model, GUIDANCE)
    latents, condition = shards.read(range(5))
    seeds = range(7, 12)
    wanted = class_labels(teacher, seeds)
    assert torch.equal(condition["encoder_hidden_states"], wanted["encoder_hidden_states"])
    assert torch.equal(condition["null"]["encoder_hidden_states"], wanted["null"]["encoder_hidden_states"])
    table, noise = named_solver("euler:2", teacher.schedule), start_noise(seeds, teacher.sample_shape)
    assert torch.allclose(latents, sample(teacher, table, noise, wanted), atol=1e-5)
    (tmp_path / "latents" / "samples-00001.tar").unlink()
    kept = (tmp_path / "latents" / "samples-00000.tar").stat().st_mtime_ns
    predict(model, tmp_path / "latents", "--model.dtype=float32", "--model.first_seed=7")
    assert (tmp_path / "latents" / "samples-00000.tar").stat().st_mtime_ns == kept
    assert len(LatentShards(tmp_path / "latents")) == 5
    text = (model / "denoiser.yaml").read_text()
    (model / "denoiser.yaml").write_text(text.replace("prompts: ['", "prompts: ['not "))
    with pytest.raises(SystemExit):
        predict(model, tmp_path / "latents", "--model.dtype=float32", "--model.first_seed=7")
    assert "holds shards with another prompts" in capsys.readouterr().err
    (model / "denoiser.yaml").write_text(text)

    where = [f"--model.teacher={model}", f"--model.output={tmp_path / 'out'}", f"--data.folder={tmp_path / 'latents'}"]
    small = ["--data.batch_size=2", "--trainer.max_steps=1", "--model.sample_every=0", "--model.exports.steps=[1]"]
    kind = ["--model=slam.module.SLAM", "--data=data.latents.LatentData", f"--model.guidance_scale={GUIDANCE}"]
    main(["fit", *QUIET, *ALONE, *kind, *where, *small])
    fitted_on = load_solver(tmp_path / "out" / "slam-1.json").info["fitted_on"]
    assert fitted_on["data"] == "5 samples of model by euler:2, latents"
    assert fitted_on["seeds"] == [[7, 12]]


def test_a_model_without_a_negative_prompt_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("flux", tmp_path / "model")
    text = (model / "denoiser.yaml").read_text()
    (model / "denoiser.yaml").write_text(text.replace("negative_prompt: ''\n", ""))
    with pytest.raises(SystemExit):
        predict(model, tmp_path / "latents")
    assert "error: model has no prompts with a negative one: write" in capsys.readouterr().err
    assert not (tmp_path / "latents").exists()
