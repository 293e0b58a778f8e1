"""`train.py` and signals: a fit leaves a checkpoint that goes on as if nothing had been, prediction its shards."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from base.module import BaseModel
from data.teacher import TeacherTrajectories
from data.trajectories import TrajectoryCache
from data.trajectory_writer import TrajectoryWriter
from denoisers.dit import DiT
from olss.store import Scores
from solver_search.objective import Objective
from solvers import load_solver
from solvers.files import claimed
from tests.training.test_cli import fit
from train import main
from training import safe_points
from training.signals import stop


def interrupted(arguments: list[str], capsys, code: int = 143) -> str:
    """The line that `train.py` ends with after a signal."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("stopped", "error"))]
    assert len(lines) == 1
    return lines[0]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "out" / "model.safetensors")


def signalled(monkeypatch, owner: type, name: str, call: int, signum: int = signal.SIGTERM) -> list[int]:
    """Raise a signal in a call of a method; returns the list of calls, which grows."""
    method, calls = getattr(owner, name), []

    def replaced(self, *args, **kwargs):
        calls.append(len(calls))
        if len(calls) == call:
            signal.raise_signal(signum)
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


def test_a_signal_while_a_fit_validates_loses_no_step(tmp_path, monkeypatch, capsys):
    """The checkpoint that it leaves goes on as if nothing had been."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    options = {"max_steps": 5, "val_check_interval": 3, "limit_val_batches": 3, "num_sanity_val_steps": 0}
    steps = [f"--trainer.{name}={value}" for name, value in options.items()]
    steps += ["--trainer.callbacks.every_n_train_steps", "100"]
    main(fit(whole, *steps))
    monkeypatch.setattr(safe_points, "GRACE", 1e9)
    with monkeypatch.context() as patch:
        calls = signalled(patch, BaseModel, "validation_step", 2)
        line = interrupted(fit(broken, *steps), capsys)
    path = broken / "last.ckpt"
    assert (len(calls), line) == (2, f"stopped by SIGTERM: go on with --ckpt_path {path}")
    assert torch.load(path, weights_only=True)["global_step"] == 3
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


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    main(fit(folder))
    return folder / "out"


def refused(arguments: list[str], capsys) -> str:
    """The line that `train.py` ends with after an error."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_outputs_that_are_no_numbers_are_not_stored(tmp_path, digits, monkeypatch, capsys):
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda *args, **kwargs: forward(*args, **kwargs) / 0)
    line = refused(predict(tmp_path, digits), capsys)
    assert line.startswith("error: 2 of 2 samples hold NaN or infinity, the first has seed ")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more(tmp_path, digits, monkeypatch, capsys, number):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("1.tar"):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = refused(predict(tmp_path, digits), capsys)
    assert line == f"error: {tmp_path / 'shard-00001.tar'}: {os.strerror(number)}"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    main(predict(tmp_path, digits))
    assert TrajectoryCache(tmp_path).load().states.isfinite().all()


def test_two_predictions_into_one_folder(tmp_path, digits, capsys):
    with claimed(tmp_path):
        assert f"another process writes to {tmp_path}" in refused(predict(tmp_path, digits), capsys)
    main(predict(tmp_path, digits))


@pytest.mark.parametrize("name", ["", "out"])
def test_two_fits_into_one_folder(tmp_path, capsys, name):
    with claimed(tmp_path / name):
        assert f"another process writes to {tmp_path / name}:" in refused(fit(tmp_path), capsys)
    assert not (tmp_path / "out").exists()


def test_missing_shards_of_another_process_are_an_error(tmp_path, digits, monkeypatch, capsys):
    monkeypatch.setattr(TrajectoryWriter, "prepare", lambda self, *_: [0])  # another process was to make the others
    assert "error: 2 of 3 shards are missing in" in refused(predict(tmp_path, digits), capsys)


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


def olss(folder: Path, denoiser: Path, cache: Path) -> list[str]:
    options = {"denoiser": denoiser, "output": folder, "method.init_args.calls": 3}
    return [
        "fit",
        "--config=configs/olss/digits.yaml",
        *(f"--model.init_args.{name}={value}" for name, value in options.items()),
        f"--data.init_args.trajectories={cache}",
        "--data.init_args.holdout=3",
        f"--trainer.callbacks.dirpath={folder}",
        "--trainer.enable_progress_bar=false",
    ]


@pytest.mark.parametrize("grace", [0.0, 1e9])
def test_a_plan_search_goes_on_from_the_plans_it_has_tried(tmp_path, digits, monkeypatch, capsys, grace):
    main([*predict(tmp_path / "cache", digits), "--model.init_args.teacher=ddim:8"])
    arguments = [olss(tmp_path / name, digits, tmp_path / "cache") for name in ("whole", "broken")]
    with monkeypatch.context() as patch:
        tried = signalled(patch, Scores, "save", 0)
        main(arguments[0])
    monkeypatch.setattr(safe_points, "GRACE", grace)
    with monkeypatch.context() as patch:
        signalled(patch, Scores, "save", 5, signal.SIGUSR1 if grace else signal.SIGTERM)
        line = interrupted(arguments[1], capsys, 138 if grace else 143)
    done = 5 if grace else 4
    assert line.endswith(f": {done} plans of calls that were tried stay; run the same command again to go on")
    with monkeypatch.context() as patch:
        rest = signalled(patch, Scores, "save", 0)
        main(arguments[1])
    assert len(rest) == len(tried) - done
    whole, broken = (load_solver(tmp_path / name / "olss-3.json") for name in ("whole", "broken"))
    assert torch.equal(whole.output_coef, broken.output_coef)
    assert torch.equal(whole.state_coef, broken.state_coef)
    assert whole.info["validation"] == broken.info["validation"]
    assert [path.name for path in (tmp_path / "broken").iterdir() if "outputs" in path.name] == []
