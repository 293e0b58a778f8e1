"""Commands beside train.py and sample.py: a mistake of the caller ends in one line and exit code 2."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = {
    "evaluation/statistics.py": ["missing", "--source", "cifar10"],
    "benchmarks/compare.py": ["--denoiser", "missing"],
    "benchmarks/encoding.py": ["--model", "missing"],
    "benchmarks/parataa.py": ["--denoiser", "missing"],
    "benchmarks/peers.py": ["--denoiser", "missing", "--output", "out"],
    "benchmarks/slam.py": ["--teacher", "missing"],
    "benchmarks/slam_oracle.py": ["--model", "missing"],
    "benchmarks/solver_search.py": ["--denoiser", "missing"],
    "benchmarks/timestep_tuner.py": ["--denoiser", "missing", "--solvers", "euler:2"],
    "benchmarks/operators.py": ["--denoiser", "missing"],
}


@pytest.mark.parametrize("script", MISTAKES)
def test_a_mistake_is_one_line(script, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *MISTAKES[script]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.iterdir())
