"""docs/your_own_model.md, run block by block on tiny models of the same names."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from denoisers.dit import DiT
from solvers import NoiseSchedule
from tests.tiny_pipelines import tiny_pipeline

PAGE = Path("docs/your_own_model.md").read_text()
SHORTER = {  # what a page for real models asks for, cut down to seconds
    ("train", "predict"): ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
    ("train", "fit"): [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--data.holdout=2",
        "--model.method.calls=[8]",
        "--model.method.path=uniform",
    ],
    ("learn",): ["--device=cpu", "--trajectories=2", "--method=olss"],
    ("sample", "compare"): ["--bootstrap=0", "--num_samples=4"],
}


def blocks(section: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks of one section, in order."""
    text = PAGE.split(f"\n## {section}")[1].split("\n## ")[0]
    yield from re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def run_block(language: str, text: str) -> None:
    """Write a file that names itself in its first line; run commands in this process, Python as a program."""
    named = re.match(r"# (\S+\.\w+)\n", text)
    if named:
        file = Path(named[1])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text[named.end() :] if language == "text" else text)
    elif language == "bash":
        for line in text.splitlines():
            run_command(shlex.split(line))
    else:
        Path("block.py").write_text(text)
        runpy.run_path("block.py")


def run_command(words: list[str]) -> None:
    import sample
    import train
    from learn.cli import main as learn

    name, recorded = words[1].removesuffix(".py"), "configs/trajectories/pipeline.yaml" in words
    if name == "learn":
        learn([*words[2:], *SHORTER[("learn",)]])
        return
    extra = SHORTER.get((name, words[2]), [])
    if words[2] == "predict":
        teacher = ["--model.num_trajectories=4", "--model.teacher=ddim:20"]
        extra = [*extra, *(["--model.num_inference_steps=20"] if recorded else teacher)]
    {"train": train, "sample": sample}[name].main([*words[2:], *extra])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the configs and checkpoints, as the current one."""
    for name in ("configs", "checkpoints"):
        (tmp_path / name).symlink_to(Path(name).absolute())
    monkeypatch.setattr("learn.fits.ROUNDS", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def tiny_dit(schedule: NoiseSchedule, path: Path) -> None:
    model = DiT(schedule, 8, 2, 4, hidden_size=64, depth=1, num_heads=1, num_classes=1000, learn_sigma=True)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)


def test_a_diffusers_model(workplace: Path) -> None:
    tiny_pipeline("sd").save_pretrained("models/mine")
    for language, text in blocks("1."):
        run_block(language, text)
    assert {file.name for file in (workplace / "runs/mine").glob("*.json")} >= {"olss-8.json", "recorded-8.json"}
    assert (workplace / "runs/mine/compare/report.json").is_file()
    assert (workplace / "runs/mine/scheduler/scheduler_config.json").is_file()
    assert (workplace / "runs/mine/recorded/olss-8.json").is_file()
    assert (workplace / "runs/mine/learned/scheduler/scheduler_config.json").is_file()


def test_an_official_checkpoint(workplace: Path) -> None:
    tiny_dit(NoiseSchedule.linear(), workplace / "models/DiT-XL-2-256x256.pt")
    tiny_dit(NoiseSchedule.flow(), workplace / "models/SiT-XL-2-256.pt")
    for language, text in blocks("2."):
        run_block(language, text)
    assert (workplace / "runs/dit/olss-8.json").is_file()
    assert (workplace / "runs/sit/samples/samples.npz").is_file()
    assert (workplace / "runs/sit/learned/solver-8.json").is_file()


def test_your_own_network(workplace: Path) -> None:
    for language, text in blocks("3."):
        run_block(language, text)
    assert (workplace / "runs/own/learned/report.html").is_file()
    assert (workplace / "runs/own/olss-8.json").is_file()
    assert (workplace / "runs/own/compare/report.json").is_file()
    sys.modules.pop("my_model", None)
