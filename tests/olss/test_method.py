"""OLSS under Lightning: the same table as the plain functions give, on one or two processes, interrupted or not."""

import warnings

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data.teacher_data import TeacherData
from data.trajectories import TrajectoryCache, generate_trajectories
from evaluation.evaluate import evaluate_table
from olss.method import OLSS
from olss.student import fit_on_student, fit_on_teacher, teacher_factor
from solvers import NoiseSchedule, SolverError, load_solver, sample
from tests.olss.toy import SEEDS, Toy, teacher
from training.method import Run
from training.solver_training import SolverTraining
from training.testing import Evaluation


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    generate_trajectories(Toy(), teacher(), SEEDS, folder, shard_size=5, dtype=torch.float64, progress=False)
    return str(folder)


def trainer(folder, devices=1):
    options = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": "auto" if devices == 1 else "ddp_fork",
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
        "callbacks": [ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)],
    }
    return lightning.Trainer(**options)


def make(folder, denoiser=None, evaluation=None, **options):
    method = OLSS(**({"nfe": [3, 5]} | options))
    return SolverTraining(denoiser or Toy(), method, str(folder), evaluation=evaluation or Evaluation())


def fit(folder, cache, devices=1, ckpt_path=None, max_epochs=-1, batch_size=4, **options):
    module = make(folder, **options)
    run = trainer(folder, devices)
    run.fit_loop.max_epochs = max_epochs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, datamodule=TeacherData(cache, batch_size=batch_size, holdout=4), ckpt_path=ckpt_path)
    return module


def tables(folder):
    return {nfe: load_solver(folder / f"olss-{nfe}.json", denoiser=Toy()) for nfe in (3, 5)}


def close(first, second, tolerance):
    """Equal coefficients; here they reach 1e4, because the first state and the first output are nearly the same."""
    assert torch.equal(first.timesteps, second.timesteps)
    for name in ("state_coef", "output_coef"):
        one, other = getattr(first, name), getattr(second, name)
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())


def equal(first, second, tolerance):
    assert first.keys() == second.keys()
    for nfe in first:
        close(first[nfe], second[nfe], tolerance)


@pytest.mark.parametrize("path", ["uniform", "log_snr", "greedy", "search"])
def test_equals_the_plain_fit(tmp_path, cache, path):
    fit(tmp_path, cache, path=path, search_trajectories=8)
    fitted = TrajectoryCache(cache).load(20)
    for nfe, table in tables(tmp_path).items():
        indices = table.info["config"]["indices"]
        plain = fit_on_student(Toy(), teacher(), [fitted], indices).table(teacher())
        close(table, plain, 1e-7)  # log_snr: coefficients of 2e6, condition number 1e8
        assert torch.equal(table.alpha, teacher().alpha[[*indices, 20]])
        assert len(indices) == nfe


def test_an_artifact_fits_a_denoiser_that_thresholds(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(Toy, "thresholding", {"ratio": 0.9, "range": (-1, 1)}, raising=False)
    fit(tmp_path, cache, path="uniform")
    assert tables(tmp_path)[3].info["thresholding"] == {"ratio": 0.9, "range": [-1, 1]}
    monkeypatch.setattr(Toy, "thresholding", None)
    with pytest.raises(SolverError, match=r"made for thresholding .*0\.9.*, found None"):
        tables(tmp_path)


def test_teacher_basis(tmp_path, cache):
    fit(tmp_path, cache, basis="teacher", path="uniform")
    factor = teacher_factor([TrajectoryCache(cache).load(20)], 20)
    plain = fit_on_teacher(factor, [0, 4, 8, 12, 16], 20).table(teacher())
    close(tables(tmp_path)[5], plain, 1e-9)


@pytest.mark.parametrize("options", [{"path": "uniform"}, {"path": "search", "search_trajectories": 8}])
def test_two_processes_find_the_same_table(tmp_path, cache, options):
    """20 fitted trajectories in 8 batches, then in 1 batch, of which one process gets none."""
    fit(tmp_path / "one", cache, **options)
    for name, batch_size in (("two", 4), ("short", 100)):
        fit(tmp_path / name, cache, devices=2, batch_size=batch_size, **options)
        equal(tables(tmp_path / "one"), tables(tmp_path / name), 1e-8)
        first, second = (tables(tmp_path / which)[5].info["validation"]["rmse"] for which in ("one", name))
        assert abs(first - second) < 1e-10


def test_test_measures_the_students(tmp_path, cache):
    options = Evaluation(num_images=8, metrics=["rmse"], reference="ddim:20")
    module = fit(tmp_path, cache, nfe=[3, 5], evaluation=options)
    found = trainer(tmp_path).test(module, datamodule=TeacherData(cache, holdout=4), verbose=False)[0]
    for nfe in (3, 5):
        same = evaluate_table(Toy(), tables(tmp_path)[nfe], teacher(), num_images=8)
        assert found[f"test/olss-{nfe}/rmse"] == pytest.approx(same["rmse"], rel=1e-4)
    fresh = make(tmp_path, evaluation=options)
    again = trainer(tmp_path).test(fresh, datamodule=TeacherData(cache, holdout=4), verbose=False)[0]
    assert again == pytest.approx(found, rel=1e-6)


def test_resumes_to_the_same_table(tmp_path, cache):
    fit(tmp_path / "whole", cache)
    stopped = fit(tmp_path / "parts", cache, max_epochs=3)
    assert not (tmp_path / "parts" / "olss-3.json").exists()
    assert [len(fit.coefs) for fit in stopped.fitting.fits.values()] == [2, 2]
    checkpoint = tmp_path / "parts" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    assert list(state["state_dict"]) == ["anchor"]
    fit(tmp_path / "parts", cache, ckpt_path=checkpoint)
    equal(tables(tmp_path / "whole"), tables(tmp_path / "parts"), 0)
    assert not (tmp_path / "parts" / "student-outputs").exists()
    fit(tmp_path / "parts", cache, ckpt_path=tmp_path / "parts" / "last.ckpt")
    equal(tables(tmp_path / "whole"), tables(tmp_path / "parts"), 0)


def test_each_row_costs_one_evaluation(tmp_path, cache):
    """N-1 evaluations per fitted trajectory, N per held-out one."""
    calls = []
    module = make(tmp_path, path="uniform")
    module.denoiser.register_forward_hook(lambda network, inputs, output: calls.append(len(inputs[0])))
    trainer(tmp_path).fit(module, datamodule=TeacherData(cache, batch_size=4, holdout=4))
    assert sum(calls) == 20 * (2 + 4) + 4 * (3 + 5)
    for nfe, table in tables(tmp_path).items():
        assert table.info["fitted_on"]["evaluations"]["calls"] == 20 * (nfe - 1) + 4 * nfe


def test_the_artifact_says_how_it_came_about(tmp_path, cache):
    fit(tmp_path, cache, path="uniform")
    table = tables(tmp_path)[5]
    assert table.info["fitted_on"]["seeds"] == [[SEEDS[0], SEEDS[20]]]
    assert table.info["validation"]["seeds"] == [[SEEDS[20], SEEDS[-1] + 1]]
    held_out = TrajectoryCache(cache).load().choose(range(20, 24))
    image = sample(Toy(), table, held_out.states[:, 0], held_out.condition)
    rmse = float((image - held_out.states[:, -1]).pow(2).mean().sqrt())
    assert abs(table.info["validation"]["rmse"] - rmse) < 1e-12
    assert len(table.info["validation"]["row_errors"]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "both"}, "unknown basis 'both'"),
        ({"path": "straight"}, "unknown path 'straight'"),
        ({"path": [0, 5], "nfe": 3}, "a path of 2 indices is for nfe 2, asked for is 3"),
        ({"path": "search", "basis": "teacher"}, "use basis student"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"nfe": 21}, "cannot follow a teacher of 20"),
        ({"path": [1, 5, 9], "nfe": 3}, "must start at 0"),
    ],
)
def test_refusals(tmp_path, cache, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, cache, **options)


def test_refuses_other_trajectories(tmp_path, cache):
    with pytest.raises(ValueError, match="24 samples: 0 to learn from and 24 to hold out do not fit"):
        trainer(tmp_path).fit(make(tmp_path), datamodule=TeacherData(cache, holdout=24))
    other = Toy()
    other.schedule = NoiseSchedule.scaled_linear()
    with pytest.raises(ValueError, match="schedule"):
        trainer(tmp_path).fit(make(tmp_path, other), datamodule=TeacherData(cache, holdout=4))


def test_resumes_in_the_middle_of_an_epoch(tmp_path, cache):
    """Without a trainer: the factors of the epoch are part of the state."""

    def begin(folder):
        run = Run(Toy(), TeacherData(cache, batch_size=4, holdout=4).open(Toy(), OLSS.wanted))
        run.folder = tmp_path / folder
        return OLSS([3], path="uniform").begin(run)

    whole, first, second = (begin(name) for name in ("whole", "parts", "parts"))
    for _ in range(3):
        batches = list(whole.run.data.train_dataloader())
        for batch in batches:
            whole.step(batch)
        whole.end_epoch()
    for batch in batches[:2]:
        first.step(batch)
    second.load(first.state())
    for batch in batches[2:]:
        second.step(batch)
    second.end_epoch()
    assert torch.equal(second.fits[3].coefs[0], whole.fits[3].coefs[0])
    assert second.spent[3].forward == 0
    assert whole.done
