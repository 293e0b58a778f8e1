"""Killed at any moment, a resumed training ends as an uninterrupted one, also where its outputs are gone."""

import json
import shutil

import lightning
import pytest
import torch
from lightning.pytorch import Callback

from base.classifier import ClassifierModule
from base.module import BaseModel
from data.images import ImageData
from data.teacher_data import TeacherData
from data.trajectories import generate_trajectories
from denoisers.dit import DiT
from evaluation.classifier import Classifier
from olss.method import OLSS
from slam.export import Exports
from slam.module import SLAM
from slam.objective import Objective
from solver_search.descent import Descent
from solver_search.method import SolverSearch
from solvers import NoiseSchedule, load_solver, named_solver
from tests.slam.tiny import network
from tests.solver_search.toys import TwoPoints
from timestep_tuner.method import Descent as TunerDescent
from timestep_tuner.method import TimestepTuner
from training.ema import EMA
from training.network import AdamW
from training.solver_training import SolverTraining

SCHEDULE = NoiseSchedule.linear()
FIRST = 2**31
SEARCH = SolverSearch([2, 3], descent=Descent("adam", learning_rate=0.3, steps=3))
METHODS = {
    "search": SEARCH,
    "lm": SolverSearch([2, 3], descent=Descent(steps=2, tolerance=0.0)),
    "olss": OLSS([2, 3], path="uniform"),
    "greedy": OLSS([2, 3], path="greedy"),
    "tuner": TimestepTuner(["ddim:3", "ddim:4"], descent=TunerDescent(steps=3)),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder, seeds = tmp_path_factory.mktemp("cache"), range(FIRST, FIRST + 16)
    table = named_solver("ddim:12", SCHEDULE)
    generate_trajectories(TwoPoints(SCHEDULE), table, seeds, folder, shard_size=8, dtype=torch.float64, progress=False)
    return str(folder)


class Keep(Callback):
    """A checkpoint after every step and after every epoch."""

    def __init__(self, folder):
        self.folder, self.paths = folder, []

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer)

    def save(self, trainer):
        self.paths.append(self.folder / f"{len(self.paths):03d}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


def fit(module, data, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": False} | options,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def training(name, output):
    return SolverTraining(TwoPoints(SCHEDULE), METHODS[name], str(output))


def artifacts(folder):
    tables = {path.name: load_solver(path) for path in folder.glob("*.json")}
    return {
        name: (
            *(getattr(one, block).tolist() for block in ("timesteps", "state_coef", "output_coef")),
            one.info["validation"],
        )
        for name, one in tables.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_any_checkpoint_leads_to_the_same_artifacts(cache, tmp_path, name):
    keep = Keep(tmp_path)
    fit(training(name, tmp_path / "whole"), TeacherData(cache, holdout=4, batch_size=5), callbacks=[keep])
    expected = artifacts(tmp_path / "whole")
    assert len(expected) == 2
    for path in keep.paths:
        fit(training(name, tmp_path / path.stem), TeacherData(cache, holdout=4, batch_size=5), path)
        assert artifacts(tmp_path / path.stem) == expected, path.stem


def test_a_search_of_fresh_trajectories_goes_on_with_seeds_it_has_not_seen(tmp_path):
    """Also from the end of an epoch, where Lightning leaves the loader at its start."""

    def data():
        return TeacherData(teacher="ddim:6", limit=6, batch_size=3, holdout=2, first_seed=FIRST)

    keep = Keep(tmp_path)
    fit(training("search", tmp_path / "whole"), data(), callbacks=[keep])
    for path in keep.paths:
        fit(training("search", tmp_path / path.stem), data(), path)
        assert artifacts(tmp_path / path.stem) == artifacts(tmp_path / "whole"), path.stem


def digits(batch_size=200):
    return ImageData("digits", batch_size=batch_size, flip=False)


def base(output):
    torch.manual_seed(0)
    sizes = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    return BaseModel(DiT(SCHEDULE, **sizes), str(output), AdamW(1e-3), sample_every=0)


def slam(output):
    torch.manual_seed(0)
    return SLAM(network(), str(output), objective=Objective(teacher_points=10), sample_every=0)


class Pixels(torch.utils.data.Dataset):
    """Random pictures of three channels."""

    def __getitems__(self, indices):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2000, 3, 16, 16, generator=generator)[: len(indices)], torch.arange(len(indices)) % 3

    def __len__(self):
        return 2000


class PixelData(ImageData):
    """Those as training data."""

    def setup(self, stage):
        self._train = self._val = Pixels()


def classifier(output):
    torch.manual_seed(0)
    return ClassifierModule(Classifier((4, 6, 5), num_classes=3), str(output))


NETWORKS = {"base": (base, digits), "slam": (slam, digits), "classifier": (classifier, lambda: PixelData("digits"))}


def files(folder):
    """Contents, without how long it took."""
    found = {}
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        found[str(path.relative_to(folder))] = path.read_bytes()
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            for part in ("fitted_on", "training"):
                values.get(part, {}).pop("seconds", None)
            for name in ("checksum", "student", "created"):  # what follows from these seconds, and the date
                values.pop(name, None)
            found[str(path.relative_to(folder))] = values
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_killed_before_it_wrote_its_output_writes_it_when_resumed(tmp_path, name):
    make, data = NETWORKS[name]
    keep, output = Keep(tmp_path), tmp_path / "out"
    fit(make(output), data(), limit_train_batches=0)
    assert not output.exists()  # nothing was trained
    options = {"max_steps": 3, "limit_val_batches": 0}
    callbacks = [keep, EMA(0.9, "student" if name == "slam" else "network")]
    fit(make(output), data(), callbacks=callbacks, **options)
    expected = files(output)
    assert expected
    shutil.rmtree(output)
    last = keep.paths[-1]
    fit(make(output), data(), last, callbacks=[EMA(0.9, "student" if name == "slam" else "network")], **options)
    assert files(output) == expected


def test_an_export_that_a_kill_prevented_is_made_up_for(tmp_path):
    """The checkpoint of a step is written before its export."""

    def make(folder):
        return SLAM(network(), str(folder), exports=Exports((1,), every=2, keep=True), sample_every=0)

    keep, options = Keep(tmp_path), {"max_steps": 3, "limit_val_batches": 0}
    fit(make(tmp_path / "whole"), digits(), callbacks=[keep], **options)
    (path,) = [one for one in keep.paths if torch.load(one, weights_only=True)["global_step"] == 2]
    fit(make(tmp_path / "rest"), digits(), path, **options)
    expected = files(tmp_path / "whole")
    assert "step-000002/slam-1.json" in expected
    assert files(tmp_path / "rest").keys() == expected.keys()
