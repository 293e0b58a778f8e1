"""Shards sampled from the teacher: what the sampler gives, rounded to 8 bits, with labels; resumable, and refused."""

import json

import lightning
import pytest
import torch

from data.image_shards import describe_samples, read_shards
from data.teacher import TrajectoryShards
from data.teacher_samples import TeacherSamples
from data.trajectories import FIRST_SEED
from solvers import NoiseSchedule, named_solver, sample, start_noise
from tests.analytic import two_point_denoiser

SCHEDULE = NoiseSchedule.linear()


class Toy(torch.nn.Module):
    """Two-point data at +-0.4, shifted by the class; counts its calls."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.schedule, self.sample_shape, self.num_classes = SCHEDULE, (channels, 4, 4), 3
        self.calls = 0

    def forward(self, x, timestep, condition=None):
        self.calls += 1
        exact = two_point_denoiser(SCHEDULE, 0.4)(x.double() + 0.1 * condition.to(x).reshape(-1, 1, 1, 1), timestep)
        return (self.scale * exact).to(x.dtype)


def predict(module, **options) -> None:
    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "devices": 1} | options,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.predict(module, TrajectoryShards(), return_predictions=False)


def make(folder, denoiser=None, **options) -> TeacherSamples:
    settings = {"teacher": "ddim:4", "num_samples": 10, "shard_size": 4} | options
    return TeacherSamples(denoiser or Toy(), str(folder), **settings)


def expected(denoiser) -> torch.Tensor:
    seeds = range(FIRST_SEED, FIRST_SEED + 10)
    noise = start_noise(seeds, denoiser.sample_shape)
    with torch.no_grad():
        return sample(denoiser, named_solver("ddim:4", SCHEDULE), noise, torch.tensor(seeds) % 3)


@pytest.mark.parametrize(("channels", "tolerance"), [(3, 1 / 255), (1, 1 / 255), (4, 0)])
def test_shards_hold_the_teachers_samples(tmp_path, channels, tolerance):
    denoiser = Toy(channels)
    predict(make(tmp_path, denoiser))
    assert len(list(tmp_path.glob("*.tar"))) == 3
    values, labels = read_shards(tmp_path, "*.tar", arrays=True)
    assert labels.tolist() == [seed % 3 for seed in range(FIRST_SEED, FIRST_SEED + 10)]
    found = torch.from_numpy(values)
    if channels < 4:
        found = found.float() * (2 / 255) - 1
    wanted = expected(denoiser).clamp(*((-1, 1) if channels < 4 else (-99, 99)))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance + 1e-6
    assert wanted.std() > 0.2
    assert describe_samples(tmp_path)["seeds"] == [[FIRST_SEED, FIRST_SEED + 10]]
    assert "sampled from the model with ddim:4" in describe_samples(tmp_path)["data"]


def test_only_missing_shards_are_made(tmp_path):
    predict(make(tmp_path))
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    (tmp_path / "samples-00001.tar").unlink()
    denoiser = Toy()
    predict(make(tmp_path, denoiser))
    assert denoiser.calls == 4
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == first


def test_two_processes_share_the_shards(tmp_path):
    predict(make(tmp_path / "one"))
    predict(make(tmp_path / "two"), devices=2, strategy="ddp_fork")
    for path in (tmp_path / "one").glob("*.tar"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_refusals(tmp_path):
    predict(make(tmp_path))
    with pytest.raises(ValueError, match="holds other samples"):
        predict(make(tmp_path, num_samples=12))
    with pytest.raises(ValueError, match="must be at least 1"):
        predict(make(tmp_path / "none", num_samples=0))
    assert json.loads((tmp_path / "samples.json").read_text())["seeds"] == [[FIRST_SEED, FIRST_SEED + 10]]
    assert describe_samples(tmp_path / "none") == {"data": "shards none"}
