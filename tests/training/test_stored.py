"""Solvers and runs that lie in W&B, by a stand-in for its API."""

import shutil

import pytest
import wandb
import yaml

import sample
from learn.cli import main
from solvers import DenoiserIdentity, NoiseSchedule, save_solver
from solvers.named import named_solver
from training.stored import local, local_configs, local_tree

SCHEDULE = NoiseSchedule.linear()


class Artifact:
    """Of W&B: a folder that can be downloaded."""

    def __init__(self, name, folder):
        self.name, self.folder, self.downloads = name, folder, 0

    def download(self, root):
        self.downloads += 1
        shutil.copytree(self.folder, root, dirs_exist_ok=True)


class Api:
    """Of W&B: artifacts and runs by their addresses."""

    def __init__(self, artifacts=None, runs=None):
        self.artifacts, self.runs = artifacts or {}, runs or {}

    def artifact(self, address):
        if address not in self.artifacts:
            raise wandb.errors.CommError(f"artifact '{address}'\nnot found")
        return self.artifacts[address]

    def run(self, address):
        if address not in self.runs:
            raise ValueError(f"Could not find run {address}")
        return self.runs[address]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """An artifact with a solver of four calls, at the address me/solvers/tiny-olss-4:latest."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stored" / "olss-4.json"
    save_solver(named_solver("ddim:4", SCHEDULE), path, DenoiserIdentity(SCHEDULE), method="olss")
    artifact = Artifact("tiny-olss-4:v3", path.parent)
    api = Api({"me/solvers/tiny-olss-4:latest": artifact})
    monkeypatch.setattr(wandb, "Api", lambda: api)
    return artifact


def test_a_solver_is_downloaded_once_and_has_its_own_name(stored):
    path = local("wandb:me/solvers/tiny-olss-4:latest")
    assert path == "runs/wandb/me-solvers-tiny-olss-4-v3/olss-4.json"
    assert local("wandb:me/solvers/tiny-olss-4:latest+parataa") == f"{path}+parataa"
    assert local("ddim:8") == "ddim:8"
    assert stored.downloads == 1
    assert local_tree({"solvers": ["ddim:5", "wandb:me/solvers/tiny-olss-4:latest"], "steps": 3}) == {
        "solvers": ["ddim:5", path],
        "steps": 3,
    }


def test_the_command_line_takes_it_like_a_path(stored, capsys):
    sample.main(["inspect", "wandb:me/solvers/tiny-olss-4:latest", "--output", "table.png"])
    assert "evaluations (NFE)      4" in capsys.readouterr().out
    sample.main(["export", "wandb:me/solvers/tiny-olss-4:latest", "--to", "numpy", "--output", "solver.py"])
    assert "written: solver.py" in capsys.readouterr().out


def test_learn_takes_it_as_the_teacher(stored, monkeypatch):
    seen = {}
    monkeypatch.setattr("learn.run.learn", lambda model, **options: seen.update(options))
    main(["digits", "--teacher", "wandb:me/solvers/tiny-olss-4:latest"])
    assert seen["teacher"] == "runs/wandb/me-solvers-tiny-olss-4-v3/olss-4.json"


def refusal(capsys, address):
    with pytest.raises(SystemExit) as left:
        sample.main(["inspect", address])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_solver_is_refused_in_one_line(stored, capsys):
    missing = refusal(capsys, "wandb:me/solvers/other:v0")
    assert missing.startswith("error: W&B does not give wandb:me/solvers/other:v0 (artifact 'me/solvers/other:v0' not")
    (stored.folder / "olss-5.json").write_text("{}")
    assert "holds olss-4.json, olss-5.json: give an artifact that" in refusal(
        capsys, "wandb:me/solvers/tiny-olss-4:latest"
    ).replace("olss-5.json, olss-4.json", "olss-4.json, olss-5.json")


def test_the_options_of_a_run_are_a_config(tmp_path, monkeypatch):
    class Run:
        config = {"model": {"class_path": "a.B"}, "trainer": {"max_steps": 3}, "run": {"git_commit": "abc"}}

    class Other:
        config = {"learning_rate": 1}

    monkeypatch.chdir(tmp_path)
    api = Api(runs={"me/solvers/abc": Run(), "me/solvers/other": Other()})
    monkeypatch.setattr(wandb, "Api", lambda: api)
    found = local_configs(["fit", "--config", "wandb:me/solvers/abc", "--config=wandb:me/solvers/abc", "--x", "1"])
    path = "runs/wandb/me-solvers-abc.yaml"
    assert found == ["fit", "--config", path, f"--config={path}", "--x", "1"]
    assert yaml.safe_load((tmp_path / path).read_text()) == {name: Run.config[name] for name in ("model", "trainer")}
    with pytest.raises(ValueError, match=r"has no options of train\.py: give a run that it has logged"):
        local_configs(["wandb:me/solvers/other"])
    with pytest.raises(ValueError, match=r"W&B does not give wandb:me/solvers/none \(Could not find run"):
        local_configs(["wandb:me/solvers/none"])
