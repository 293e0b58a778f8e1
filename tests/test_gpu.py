"""What runs on a GPU, in small: `pytest -m gpu`; `TEST_DEVICE=cpu pytest -m gpu` rehearses it without one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from data.images import ImageData
from data.teacher_data import TeacherData
from data.trajectories import FIRST_SEED, generate_trajectories
from denoisers import load_denoiser, with_guidance
from denoisers.dit import DiT
from olss.method import OLSS
from parataa import parallel_sample
from slam.export import Exports
from slam.module import SLAM
from slam.objective import Objective
from solver_search.descent import Descent as SearchDescent
from solver_search.method import SolverSearch
from solvers import (
    Bands,
    NoiseSchedule,
    SolverTable,
    TableScheduler,
    export_solver,
    load_solver,
    named_solver,
    sample,
    start_noise,
)
from timestep_tuner.method import Descent as TunerDescent
from timestep_tuner.method import TimestepTuner
from training.solver_training import SolverTraining

pytestmark = pytest.mark.gpu
NETWORK = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
VP = NoiseSchedule.linear(beta_end=0.01)
SEEDS = [3, 4, 5]


def dit(**options: Any) -> DiT:
    """A small network whose outputs depend on everything."""
    torch.manual_seed(0)
    network = DiT(VP, **NETWORK | options)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network.eval().requires_grad_(False)


def tables() -> dict[str, SolverTable]:
    """One of each kind that the executor knows."""
    plain, space = named_solver("dpmpp:4", VP), Bands((0.2,), channels=1)
    weights = {name: space.embed(getattr(plain, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    bands = replace(plain, space=space, **weights, state_support=None, output_support=None)
    return {"plain": plain, "stochastic": named_solver("ddpm:4", VP), "calls": plain.guided(2.0), "bands": bands}


def on(device: torch.device, network: torch.nn.Module, seeds: list[int]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The network guided, noises and labels there."""
    labels = torch.arange(len(seeds), device=device)
    return with_guidance(network.to(device), 2.0), start_noise(seeds, (1, 8, 8)).to(device), labels


@contextmanager
def nothing_read_back(device: torch.device) -> Iterator[None]:
    """Synchronising with the GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", tables())
def test_the_sampler(device: torch.device, name: str) -> None:
    """As on the CPU; a row of a deterministic table waits for nothing."""
    table = tables()[name]
    denoiser, noise, labels = on(device, dit(), SEEDS)
    sample(denoiser, table, noise, labels, seeds=SEEDS)
    with nothing_read_back(device) if not table.is_stochastic else nullcontext(), torch.no_grad():
        found = sample(denoiser, table, noise, labels, seeds=SEEDS)
    denoiser, noise, labels = on(torch.device("cpu"), dit(), SEEDS)
    assert found.device.type == device.type
    expected = sample(denoiser, table, noise, labels, seeds=SEEDS)
    assert float((found.cpu() - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize("name", tables())
def test_parataa(device: torch.device, name: str) -> None:
    denoiser, noise, labels = on(device, dit(), SEEDS)
    found, stats = parallel_sample(denoiser, tables()[name], noise, labels, seeds=SEEDS)
    expected = sample(denoiser, tables()[name], noise, labels, seeds=SEEDS)
    assert stats.converged
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-2


def trained(device: torch.device, module: Any, data: Any, **options: Any) -> None:
    trainer = lightning.Trainer(
        **{"max_epochs": -1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data)


METHODS = {
    "olss": lambda: OLSS(calls=[3]),
    "solver_search": lambda: SolverSearch(nfe=3, descent=SearchDescent(steps=2)),
    "timestep_tuner": lambda: TimestepTuner(["ddim:3"], descent=TunerDescent(steps=2)),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_learn(device: torch.device, name: str, tmp_path: Path) -> None:
    """From trajectories of the same device to an artifact that is no worse than the plain solver there."""
    teacher, seeds = named_solver("ddim:12", VP), range(FIRST_SEED, FIRST_SEED + 24)
    generate_trajectories(dit().to(device), teacher, seeds, tmp_path / "cache", shard_size=12, progress=False)
    data = TeacherData(str(tmp_path / "cache"), holdout=8, batch_size=8)
    trained(device, SolverTraining(dit(), METHODS[name](), str(tmp_path)), data)
    denoiser = dit().to(device)
    (path,) = tmp_path.glob("*.json")
    noise, labels = start_noise(range(16), (1, 8, 8)).to(device), torch.arange(16, device=device) % 10
    images = [sample(denoiser, one, noise, labels) for one in (load_solver(path, denoiser), named_solver("ddim:3", VP))]
    wanted = sample(denoiser, teacher, noise, labels)
    errors = [float((image - wanted).square().mean().sqrt()) for image in images]
    assert errors[0] <= errors[1]


def test_slam_trains(device: torch.device, tmp_path: Path) -> None:
    before = dit()
    options = {"guidance_scale": 1.5, "exports": Exports(steps=(2,)), "objective": Objective(teacher_points=10)}
    module = SLAM(dit(), str(tmp_path), sample_every=0, **options)
    data = ImageData("digits", batch_size=50, flip=False)
    trained(device, module, data, max_steps=3, limit_val_batches=0)
    student = load_denoiser(tmp_path / "student").to(device)
    noise, labels = start_noise(SEEDS, (1, 8, 8)).to(device), torch.arange(3, device=device)
    assert sample(student, load_solver(tmp_path / "slam-2.json", student), noise, labels, seeds=SEEDS).isfinite().all()
    moved = [(student.state_dict()[name].cpu() - value).abs().max() for name, value in before.state_dict().items()]
    assert max(moved) > 0


def test_the_diffusers_export(device: torch.device, tmp_path: Path) -> None:
    denoiser, noise, labels = on(device, dit(), SEEDS)
    scheduler = TableScheduler.from_solver(named_solver("dpmpp:4", VP))
    scheduler.set_timesteps(4, device=device)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(denoiser(x, timestep, labels), timestep, x).prev_sample
    assert x.device.type == device.type
    torch.testing.assert_close(x, sample(denoiser, named_solver("dpmpp:4", VP), noise, labels), rtol=1e-4, atol=1e-4)


def test_the_numpy_export(device: torch.device, tmp_path: Path) -> None:
    denoiser, noise, labels = on(device, dit(), SEEDS)
    names: dict[str, Any] = {}
    exec(export_solver(named_solver("dpmpp:4", VP), "numpy", tmp_path).read_text(), names)

    def network(x: np.ndarray, timestep: float) -> np.ndarray:
        return denoiser(torch.from_numpy(x).to(device), torch.tensor(timestep, device=device), labels).cpu().numpy()

    found = names["sample"](network, noise.cpu().numpy())
    expected = sample(denoiser, named_solver("dpmpp:4", VP), noise, labels).cpu()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
