"""Every shipped config parses, and says in its first lines what it is for, what to expect and what it costs."""

from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
PREDICTED = {"trajectories", "images", "encode"}
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.yaml"))
FOR_TRAIN = [path for path in CONFIGS if path.parent.name != "sweeps"]  # those are in tests/test_sweeps.py


@pytest.mark.parametrize("path", FOR_TRAIN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_parses(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = "predict" if path.parent.name in PREDICTED else "fit"
    with pytest.raises(SystemExit) as stop:
        train.main([command, "--config", str(path), "--print_config"])
    assert stop.value.code in (0, None)
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_has_a_header(path):
    header = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert len(header) >= 2
    assert any(word in " ".join(header) for word in ("Cost", "cost", "minute", "hour", "second"))
