"""The shipped sweeps, as W&B's agent runs them: its own form of arguments, through the shell, into train.py."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import train

ROOT = Path(__file__).parent.parent
SWEEPS = sorted(ROOT.glob("configs/sweeps/*.yaml"))
PYTHON = "#!/bin/sh\nprintf '%s\\0' \"$@\"\n"  # says what it was given


def values(parameters: dict) -> dict:
    """One choice of each parameter, the last of those listed."""
    return {name: one.get("value", (one.get("values") or [one.get("max")])[-1]) for name, one in parameters.items()}


def agent(sweep: dict, chosen: dict) -> list[str]:
    """The command that the agent makes of a sweep and a choice."""
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    words = create_sweep_command(list(sweep["command"]))
    return [part for word in words for part in (macros[word[2:-1]] if word.startswith("${") else [word])]


def started(command: list[str], folder: Path) -> list[str]:
    """Arguments of Python, where a shell runs a command of the agent."""
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}/usr/bin:/bin", "WANDB_RUN_ID": "abc123"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_agent_drives_train(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    sweep = yaml.safe_load(path.read_text())
    chosen = values(sweep["parameters"])
    script, *args = started(agent(sweep, chosen), tmp_path)
    assert script == "train.py"
    with pytest.raises(SystemExit) as left:
        train.main([*args, "--print_config"])
    assert left.value.code in (0, None)
    parsed = yaml.safe_load(capsys.readouterr().out)
    for name, value in chosen.items():
        found = parsed
        for part in name.split("."):
            found = found[part]
        assert json.dumps(found) == json.dumps(value), name
    places = (parsed["trainer"]["logger"]["init_args"]["save_dir"], parsed["model"]["init_args"]["output"])
    assert set(places) == {"runs/sweeps/abc123"}
    assert any(isinstance(value, list) for value in chosen.values())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_ranks_by_what_runs_log(path):
    sweep = yaml.safe_load(path.read_text())
    calls = sweep["metric"]["name"].removeprefix("best/").removesuffix("-calls/median")
    texts = (str(one.get("value", "")) for one in sweep["parameters"].values())
    assert any(text.startswith("[") and calls in text for text in texts)


def test_numbers_below_zero_and_hyphens_are_values(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    args = agent({"command": ["${args}"]}, {"trainer.max_epochs": -1, "model.init_args.output": "runs/a-b"})
    with pytest.raises(SystemExit):
        train.main(["fit", "--config", "configs/solver_search/digits.yaml", *args, "--print_config"])
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert (parsed["trainer"]["max_epochs"], parsed["model"]["init_args"]["output"]) == (-1, "runs/a-b")
