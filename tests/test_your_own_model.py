"""docs/your_own_model.md, run block by block on tiny models of the same names."""

import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoisers import with_guidance
from denoisers.dit import DiT
from solvers import NoiseSchedule, named_solver, sample, start_noise
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


class EDMNetwork(torch.nn.Module):
    """What a pickle of EDM holds: a network in its preconditioning (arXiv 2206.00364, table 1), by its names."""

    sigma_data, img_channels, img_resolution, label_dim = 0.5, 3, 8, 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = EDMInner()

    def forward(self, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        power = level**2 + self.sigma_data**2
        inner = self.model(x * power.rsqrt(), level.log().div(4).expand(len(x)), labels)
        return self.sigma_data**2 / power * x + level * self.sigma_data * power.rsqrt() * inner


class EDMInner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.told = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Linear(5, 3)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor) -> Tensor:
        told = self.told(torch.cat([noise_labels[:, None], class_labels], 1))
        return torch.tanh(self.layer(x) + told[:, :, None, None])


def test_your_own_network(workplace: Path) -> None:
    (workplace / "my_edm_network.py").write_text(
        "from tests.test_your_own_model import EDMNetwork\nnet = EDMNetwork()\n"
    )
    for language, text in blocks("3."):
        run_block(language, text)
    assert (workplace / "runs/edm/learned/solver-8.json").is_file()
    assert_edm_is_sampled_as_the_paper_does(importlib.import_module("my_edm").EDMDenoiser())
    assert (workplace / "runs/own/learned/report.html").is_file()
    assert (workplace / "runs/own/olss-8.json").is_file()
    assert (workplace / "runs/own/compare/report.json").is_file()
    for name in ("my_model", "my_edm", "my_edm_network"):
        sys.modules.pop(name, None)


def assert_edm_is_sampled_as_the_paper_does(denoiser: torch.nn.Module) -> None:
    """Euler steps of dx / ds = (x - D(x, s)) / s, guided and not."""
    network, noise = EDMNetwork(), start_noise([1, 2], denoiser.sample_shape, torch.float64)
    network.double()
    labels, denoiser.network = torch.tensor([0, 3]), network.model
    table = named_solver("euler:6", denoiser.schedule)
    levels = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 6, dtype=torch.float64) ** 7
    for scale in (1.0, 2.5):
        x = 80 * noise
        for level, lower in zip(levels, [*levels[1:], torch.zeros(())]):
            known, unknown = (
                network(x, level, one) for one in (torch.eye(4).double()[labels], torch.zeros(2, 4).double())
            )
            x = x + (lower - level) * (x - unknown - scale * (known - unknown)) / level
        found = sample(with_guidance(denoiser, scale), table, noise, labels)
        torch.testing.assert_close(found, x, rtol=0, atol=3e-4)  # diffusers has noise levels in float32
