"""The digits chain with W&B offline: what a person finds of each run, and what they make of it again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from tests.wandb_runs import read_run
from train import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
METHOD = "--model.init_args.method.init_args"
SMALL = {
    "base": ["--trainer.max_steps", "40"],
    "olss": [],
    "solver_search": [f"{METHOD}.nfe", "[3, 4]", f"{METHOD}.descent.steps", "2"],
    "timestep_tuner": [f"{METHOD}.descent.steps", "2"],
    "slam": ["--trainer.max_steps", "20", "--model.init_args.exports.steps", "[1, 4]"],
}
NAMES = {
    "base": "digits-dit base",
    "olss": "digits-dit olss-4 olss-6",
    "solver_search": "digits-dit solver-search-3 solver-search-4",
    "timestep_tuner": "digits-dit tuned-ddim-5 tuned-unipc-5",
    "slam": "digits-dit slam-1 slam-4",
}
CALLS = {"olss": (4, 6), "solver_search": (3, 4), "timestep_tuner": (5,), "slam": (1, 4)}
OUTPUT = {
    "base": "runs/base/digits/digits-dit",
    "olss": "runs/olss/digits",
    "solver_search": "runs/solvers/digits",
    "timestep_tuner": "runs/solvers/digits",
    "slam": "runs/slam/digits/solvers",
}
VARYING = ("created", "checksum", "seconds", "sha256")  # the last of a folder that holds seconds; weights are compared


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder that all five runs are in."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train.py"])
        patch.setenv("WANDB_MODE", "offline")
        for method, small in SMALL.items():
            logger = ["--trainer.logger", "training.wandb.Wandb", "--trainer.logger.save_dir", f"runs/wandb/{method}"]
            quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
            main(["fit", "--config", str(ROOT / f"configs/{method}/digits.yaml"), *small, *logger, *quiet])
            wandb.finish()
            if method == "base":
                main(["predict", "--config", str(ROOT / "configs/trajectories/digits.yaml"), *quiet])
        yield folder


@pytest.fixture(scope="module")
def runs(chain):
    return {method: read_run(chain / "runs" / "wandb" / method) for method in SMALL}


@pytest.mark.parametrize("method", SMALL)
def test_a_run_says_what_it_is(runs, method):
    found = runs[method]
    assert (found.run.display_name, found.run.run_group, found.run.job_type) == (NAMES[method], "digits-dit", method)
    assert set(found.run.tags) >= {"digits-dit", method}
    assert "digits" in found.run.notes
    assert found.config["trainer"]["default_root_dir"]
    assert found.config["model"]["init_args"]["output"] == OUTPUT[method]
    assert found.config["run"]["git_commit"]
    if method != "base":
        about = found.config["run"]
        assert (about["model"], len(about["weight_hash"])) == ("digits-dit", 64)
        assert about["teacher"] == ("ddim:50" if method == "slam" else "ddim:20")
        assert about["guidance_scale"] == (1.5 if method == "slam" else 1.0)


@pytest.mark.parametrize("method", CALLS)
def test_a_run_can_be_ranked(runs, method):
    found = runs[method]
    figures = ("median", "p99", "worst", "rmse")
    for calls in CALLS[method]:
        for name in figures:
            assert found.series(f"held_out/{calls}-calls/{name}")[-1] > 0
            assert found.series(f"best/{calls}-calls/{name}")[-1] == min(
                found.series(f"held_out/{calls}-calls/{name}")[-1:] + found.series(f"best/{calls}-calls/{name}")
            )
    assert found.axes["held_out/*"] == found.axes["validation/*"] == "network_calls"
    assert found.series("network_calls")[-1] > 0
    groups = {key.split("/")[0] for key in found.keys if not key.startswith("_")} - {"epoch", "network_calls"}
    assert groups <= {"train", "validation", "held_out", "best", "pictures", "tables", "trainer"}
    assert "pictures/results/nrows" in found.keys


def test_networks_log_rate_and_gradients(runs):
    for method in ("base", "slam"):
        assert {"train/loss", "train/learning_rate", "train/gradient_norm"} <= runs[method].keys
        assert any(key.startswith("pictures/") for key in runs[method].keys)
    assert "train/tuned-ddim-5/learning_rate" in runs["timestep_tuner"].keys


def test_artifacts_lead_back_to_what_they_came_from(runs):
    (model,) = (one for one in runs["base"].artifacts if one.type == "model")
    assert model.name == "digits-dit"
    weights = json.loads(model.metadata)["digest"]
    named = {}
    for method in CALLS:
        for one in runs[method].artifacts:
            if one.type == "solver":
                named[one.name] = json.loads(one.metadata)
                assert one.description
    assert set(named) == {f"digits-dit-{name}" for method in CALLS for name in NAMES[method].split()[1:]}
    for name, metadata in named.items():
        assert metadata["made_from"]["model:digits-dit"]["digest"] == weights
        assert ("trajectories:trajectories-digits" in metadata["made_from"]) == ("slam" not in name)


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in VARYING}
    return value


def written(folder):
    """What a run has written, artifacts without the time they took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found[path.name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize("method", SMALL)
def test_a_run_is_made_again_from_its_config_alone(chain, runs, method, monkeypatch):
    monkeypatch.chdir(chain)
    monkeypatch.setattr("sys.argv", ["train.py"])
    options = {name: value for name, value in runs[method].config.items() if name != "_wandb"}
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(run=lambda address: SimpleNamespace(config=options)))
    again = chain / "again" / Path(OUTPUT[method]).name / method
    main(
        [
            *("fit", "--config", f"wandb:me/solvers/{method}", "--trainer.logger", "false"),
            *("--model.init_args.output", str(again)),
        ]
    )
    expected, found = written(chain / OUTPUT[method]), written(again)
    assert found
    assert {name: expected[name] for name in found} == found
