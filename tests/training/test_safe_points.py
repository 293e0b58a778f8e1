"""`train.py` and signals: a fit leaves a checkpoint that goes on as if nothing had been, prediction its shards."""

import signal
from pathlib import Path

import pytest
import torch
import yaml

from base.module import BaseModel
from data.teacher import TeacherTrajectories
from solver_search.objective import Objective
from tests.training.test_cli import fit
from train import main
from training import safe_points
from training.signals import stop


def interrupted(arguments: list[str], capsys) -> str:
    """The line that `train.py` ends with after SIGTERM."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 143
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("stopped", "error"))]
    assert len(lines) == 1
    return lines[0]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "out" / "model.safetensors")


def signalled(monkeypatch, owner: type, name: str, call: int) -> list[int]:
    """Raise SIGTERM in a call of a method; returns the list of calls, which grows."""
    method, calls = getattr(owner, name), []

    def replaced(self, *args, **kwargs):
        calls.append(len(calls))
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)
    return calls


def test_a_fit_stops_after_the_step_and_goes_on(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    steps = ["--trainer.max_steps", "4", "--trainer.callbacks.every_n_train_steps", "100"]
    main(fit(whole, *steps))
    monkeypatch.setattr(safe_points, "GRACE", 1e9)
    with monkeypatch.context() as patch:
        calls = signalled(patch, BaseModel, "training_step", 2)
        line = interrupted(fit(broken, *steps), capsys)
    assert len(calls) == 2
    path = broken / "last.ckpt"
    assert line == f"stopped by SIGTERM: go on with --ckpt_path {path}"
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert not (broken / "out").exists()
    main(fit(broken, *steps, "--ckpt_path", str(path)))
    expected, found = weights(whole), weights(broken)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(safe_points, "GRACE", 0.0)
    signalled(monkeypatch, BaseModel, "training_step", 1)
    assert "there is no checkpoint yet" in interrupted(fit(tmp_path), capsys)
    assert not list(tmp_path.glob("*.ckpt"))


def test_gradients_that_are_accumulated_are_not_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(safe_points, "GRACE", 1e9)
    calls = signalled(monkeypatch, BaseModel, "training_step", 1)
    interrupted(fit(tmp_path, "--trainer.accumulate_grad_batches", "3"), capsys)
    assert len(calls) == 3


def predict(folder: Path, denoiser: Path) -> list[str]:
    options = {"denoiser": str(denoiser), "folder": str(folder), "num_trajectories": 6, "shard_size": 2}
    return [
        "predict",
        "--config=configs/trajectories/digits.yaml",
        "--trainer.enable_progress_bar=false",
        "--model.init_args.teacher=ddim:3",
        *(f"--model.init_args.{name}={value}" for name, value in options.items()),
    ]


@pytest.fixture
def digits(tmp_path) -> Path:
    main(fit(tmp_path))
    return tmp_path / "out"


def test_prediction_keeps_its_shards_and_goes_on(tmp_path, digits, monkeypatch, capsys):
    monkeypatch.setattr(safe_points, "GRACE", 1e9)
    with monkeypatch.context() as patch:
        signalled(patch, TeacherTrajectories, "predict_step", 2)
        line = interrupted(predict(tmp_path / "broken", digits), capsys)
    assert line == "stopped by SIGTERM: shards that are written stay; run the same command again to go on"
    assert [path.name for path in sorted((tmp_path / "broken").glob("*"))] == [
        "manifest.json",
        "shard-00000.json",
        "shard-00000.tar",
        "shard-00001.json",
        "shard-00001.tar",
    ]
    for name in ("broken", "whole"):
        main(predict(tmp_path / name, digits))
    assert (tmp_path / "broken/manifest.json").read_text() == (tmp_path / "whole/manifest.json").read_text()


def test_a_step_without_an_end_is_broken_off(tmp_path, digits, monkeypatch, capsys):
    main(predict(tmp_path / "cache", digits))
    monkeypatch.setattr(safe_points, "GRACE", 0.2)
    values, value = [], Objective.value

    def endless(self, *args):
        values.append(value(self, *args))
        if len(values) == 1:
            signal.raise_signal(signal.SIGTERM)
        return values[-1] + 1e9  # never good enough

    monkeypatch.setattr(Objective, "value", endless)
    monkeypatch.setattr("solver_search.lm.lm_step.__defaults__", (10**9,))
    output, config = tmp_path / "search", "configs/solver_search/digits.yaml"
    callbacks = yaml.safe_load(Path(config).read_text())["trainer"]["callbacks"]
    callbacks[0]["init_args"]["dirpath"] = str(output)
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    arguments = ["fit", f"--config={config}", f"--config={tmp_path / 'callbacks.yaml'}"]
    arguments += [f"--model.init_args.{name}={path}" for name, path in (("denoiser", digits), ("output", output))]
    arguments += ["--model.init_args.method.init_args.nfe=2", "--trainer.enable_progress_bar=false"]
    arguments += [f"--data.init_args.trajectories={tmp_path / 'cache'}", "--data.init_args.holdout=0"]
    assert "there is no checkpoint yet" in interrupted(arguments, capsys)
    assert stop.asked == signal.SIGTERM
    assert not list(output.glob("*.json"))
