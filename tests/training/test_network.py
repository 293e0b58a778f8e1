"""What the trainings of networks share: groups of options, and what happens once per step of the optimiser."""

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from base.module import BaseModel
from data.images import ImageData
from denoisers.dit import DiT
from slam.module import SLAM
from solvers.schedule import NoiseSchedule
from train import main
from training.network import AdamW

CONFIGS = {
    "base": ({"learning_rate": 0.002, "warmup_steps": 50, "decay_fraction": 0.5}, {"betas": [0.9, 0.95]}),
    "slam": ({"learning_rate": 0.0005, "warmup_steps": 50}, {"decay_fraction": 0.0, "betas": [0.9, 0.999]}),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_config_that_names_some_of_a_group_leaves_the_others(method, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", f"configs/{method}/digits.yaml", "--print_config"])
    given, left = CONFIGS[method]
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert found == {**given, **left, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate 0\.0 must be positive"),
        ({"warmup_steps": -1}, r"warmup_steps -1 and weight_decay 0\.0 at least 0"),
        ({"decay_fraction": 1.1}, r"decay_fraction 1\.1 must lie in \[0, 1\]"),
        ({"betas": (0.9, 1.0)}, r"betas \(0\.9, 1\.0\) must lie in \[0, 1\)"),
    ],
)
def test_impossible_rates_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**{"learning_rate": 1.0} | options)


def test_random_numbers_depend_on_the_parts_the_seed_and_the_process(monkeypatch):
    def drawn(*parts, seed=0):
        return float(torch.rand((), generator=module(seed=seed).generator(*parts)))

    first = drawn("train", 1, 2)
    assert first == drawn("train", 1, 2)
    assert len({first, drawn("train", 2, 1), drawn("val", 1, 2), drawn("train", 1, 2, seed=1)}) == 4
    monkeypatch.setattr(BaseModel, "global_rank", 1)
    assert drawn("train", 1, 2) != first


def module(kind=BaseModel, **options):
    torch.manual_seed(0)
    sizes = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    return kind(DiT(NoiseSchedule.linear(), **sizes), **options)


@pytest.mark.parametrize("kind", [BaseModel, SLAM])
def test_samples_and_what_follows_a_step_come_once_per_step(tmp_path, monkeypatch, kind):
    steps, pictures = [], []
    monkeypatch.setattr(kind, "after_step", lambda self, step: steps.append(step))
    monkeypatch.setattr(kind, "show", lambda self, step: pictures.append(step))
    monkeypatch.setattr(kind, "logger", type("Logger", (), {"log_image": None}))
    options = {"limit_val_batches": 0, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options |= {"enable_checkpointing": False, "default_root_dir": tmp_path}

    def fit(last, **more):
        run = Trainer(accelerator="cpu", max_steps=last, max_epochs=-1, accumulate_grad_batches=2, **options)
        run.fit(module(kind, sample_every=2), ImageData("digits", batch_size=100), **more)
        return run

    path = tmp_path / "two.ckpt"
    fit(2).save_checkpoint(path)
    fit(4, ckpt_path=path, weights_only=True)
    assert steps == [1, 2, 3, 4]
    assert pictures == [2, 4]
