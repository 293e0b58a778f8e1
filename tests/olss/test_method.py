"""OLSS under Lightning: the same table as the plain functions give, on one or two processes, interrupted or not."""

import warnings

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data.teacher_data import TeacherData
from data.trajectories import TrajectoryCache, generate_trajectories
from denoisers import split_guidance, with_guidance
from evaluation.evaluate import evaluate_table
from olss.method import OLSS
from olss.plan import CallPlan
from olss.run import fit_on_teacher, fit_run, teacher_columns
from solvers import Bands, NoiseSchedule, Plain, SolverError, load_solver, named_solver, sample, start_noise
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


def make(folder, denoiser=None, evaluation=None, guidance_scale=1.0, **options):
    method = OLSS(**({"calls": [3, 5]} | options))
    return SolverTraining(denoiser or Toy(), method, str(folder), guidance_scale, evaluation=evaluation or Evaluation())


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
    fit(tmp_path, cache, path=path, search_trajectories=20)
    fitted = TrajectoryCache(cache).load(20)
    for nfe, table in tables(tmp_path).items():
        indices = table.info["config"]["indices"]
        plain = fit_run(Toy(), teacher(), [fitted], CallPlan(tuple(indices))).fit.table(teacher())
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
    columns = teacher_columns(teacher(), [TrajectoryCache(cache).load(20)])
    plain = fit_on_teacher(columns, teacher(), CallPlan((0, 4, 8, 12, 16))).table(teacher())
    close(tables(tmp_path)[5], plain, 1e-8)


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
    module = fit(tmp_path, cache, evaluation=options)
    found = trainer(tmp_path).test(module, datamodule=TeacherData(cache, holdout=4), verbose=False)[0]
    for nfe in (3, 5):
        same = evaluate_table(Toy(), tables(tmp_path)[nfe], teacher(), num_images=8)
        assert found[f"test/olss-{nfe}/rmse"] == pytest.approx(same["rmse"], rel=1e-4)
    fresh = make(tmp_path, evaluation=options)
    again = trainer(tmp_path).test(fresh, datamodule=TeacherData(cache, holdout=4), verbose=False)[0]
    assert again == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize(("options", "epochs"), [({}, 3), ({"path": "search", "search_trajectories": 8}, 2)])
def test_resumes_to_the_same_table(tmp_path, cache, options, epochs):
    fit(tmp_path / "whole", cache, **options)
    stopped = fit(tmp_path / "parts", cache, max_epochs=epochs, **options)
    assert not (tmp_path / "parts" / "olss-3.json").exists()
    assert [len(fit.weights) for fit in stopped.fitting.fits.values()] == [2, 2]
    checkpoint = tmp_path / "parts" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    assert list(state["state_dict"]) == ["anchor"]
    fit(tmp_path / "parts", cache, ckpt_path=checkpoint, **options)
    equal(tables(tmp_path / "whole"), tables(tmp_path / "parts"), 0)
    assert not (tmp_path / "parts" / "solver-outputs").exists()
    fit(tmp_path / "parts", cache, ckpt_path=tmp_path / "parts" / "last.ckpt", **options)
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


class Guided(Toy):
    """Toy with a null class."""

    def null_condition(self, condition):
        return torch.full_like(condition, 3)


@pytest.fixture(scope="module")
def split_cache(tmp_path_factory):
    """Trajectories at guidance 2 with the outputs of both branches."""
    folder, denoiser = tmp_path_factory.mktemp("split"), with_guidance(Guided(), 2.0)
    table = split_guidance(teacher(), denoiser)
    generate_trajectories(denoiser, table, SEEDS, folder, shard_size=5, dtype=torch.float64, progress=False)
    return str(folder)


def test_guided_solvers_leave_calls_out(tmp_path, split_cache):
    options = {"calls": [4, 5], "path": "search", "search_trajectories": 8}
    fit(tmp_path, split_cache, denoiser=Guided(), guidance_scale=2.0, **options)
    for calls in (4, 5):
        table = load_solver(tmp_path / f"olss-{calls}.json", denoiser=with_guidance(Guided(), 2.0))
        assert table.nfe == calls < 2 * table.num_rows
        assert table.info["guidance_scale"] == 2.0
        assert table.info["config"]["unconditional"]
        noise, labels = start_noise(range(16), (1, 4, 4), torch.float64), torch.arange(16) % 3
        wanted = sample(with_guidance(Guided(), 2.0), teacher(), noise, labels)
        baseline = sample(with_guidance(Guided(), 2.0), named_solver("ddim:2", Toy().schedule), noise, labels)
        found = sample(Guided(), table, noise, labels)
        assert float((found - wanted).square().mean()) < 0.25 * float((baseline - wanted).square().mean())
    load_solver(tmp_path / "olss-4.json", denoiser=Guided())  # guidance is in the table: the bare network fits
    with pytest.raises(SolverError, match=r"made for guidance scale 2\.0, found 3\.0"):
        load_solver(tmp_path / "olss-4.json", denoiser=with_guidance(Guided(), 3.0))


def test_all_rows_guided_are_counted_twice(tmp_path, split_cache):
    fit(tmp_path, split_cache, denoiser=Guided(), guidance_scale=2.0, calls=6, path="uniform")
    table = load_solver(tmp_path / "olss-6.json", denoiser=with_guidance(Guided(), 2.0))
    assert (table.nfe, table.num_rows) == (6, 3)
    with pytest.raises(ValueError, match="5 network calls do not fit rows of 2 calls: use a multiple, or path search"):
        fit(tmp_path, split_cache, denoiser=Guided(), guidance_scale=2.0, calls=5, path="uniform")


@pytest.mark.parametrize("weights", ["channels", "bands", "auto"])
def test_kinds_of_weights(tmp_path, cache, weights):
    fit(tmp_path, cache, calls=3, path="uniform", weights=weights, edges=(0.2,))
    table = load_solver(tmp_path / "olss-3.json", denoiser=Toy())
    kept, scores = table.info["config"]["weights"], table.info["validation"]["chosen_from"]
    assert kept == min(scores, key=scores.get)
    assert set(scores) == ({"numbers", "bands"} if weights == "auto" else {weights})  # of one channel
    assert table.space == {"numbers": Plain(), "channels": Bands((), 1), "bands": Bands((0.2,), 1)}[kept]


def test_few_trajectories_keep_numbers_where_operators_are_worse(tmp_path):
    """One trajectory of 16 pixels does not settle 4 bands: whatever is kept is best on those that choose."""
    generate_trajectories(Toy(), teacher(), SEEDS[:9], tmp_path / "few", dtype=torch.float64, progress=False)
    module = make(tmp_path, calls=4, path="uniform", weights="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path).fit(module, datamodule=TeacherData(str(tmp_path / "few"), holdout=8))
    scores = load_solver(tmp_path / "olss-4.json").info["validation"]["chosen_from"]
    assert scores[module.fitting.kept[4]] == min(scores.values())


def test_the_artifact_says_how_it_came_about(tmp_path, cache):
    fit(tmp_path, cache, path="uniform")
    table = tables(tmp_path)[5]
    assert table.info["fitted_on"]["seeds"] == [[SEEDS[0], SEEDS[20]]]
    assert table.info["validation"]["seeds"] == [[SEEDS[22], SEEDS[-1] + 1]]
    assert table.info["validation"]["chosen_on"] == [[SEEDS[20], SEEDS[22]]]
    held_out = TrajectoryCache(cache).load().choose(range(22, 24))
    image = sample(Toy(), table, held_out.states[:, 0], held_out.condition)
    rmse = float((image - held_out.states[:, -1]).pow(2).mean().sqrt())
    assert abs(table.info["validation"]["rmse"] - rmse) < 1e-12
    worst = float((image - held_out.states[:, -1]).flatten(1).square().mean(1).max().sqrt())
    assert abs(table.info["validation"]["worst"] - worst) < 1e-12
    assert len(table.info["validation"]["row_errors"]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "both"}, "unknown basis 'both'"),
        ({"path": "straight"}, "unknown path 'straight'"),
        ({"path": [0, 5], "calls": 3}, "a path of 2 indices is for 2 rows, 3 calls are 3"),
        ({"path": [0, 5], "calls": [2, 3]}, "one path was given for several numbers of calls"),
        ({"path": "search", "basis": "teacher"}, "use basis own"),
        ({"weights": "matrices"}, "unknown weights 'matrices'"),
        ({"edges": (0.3, 0.1)}, "band edges"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"calls": 21}, "21 network calls are 21 rows, more than the teacher's 20"),
        ({"calls": 0}, "0 network calls do not fit"),
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
        fitting = OLSS([3], path="uniform").begin(run)
        fitting.start()
        return fitting

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
    assert torch.equal(second.fits[3, "numbers"].weights[0], whole.fits[3, "numbers"].weights[0])
    assert second.spent[3].forward == 0
    assert whole.done


def test_a_last_row_of_predicted_data_under_lightning(tmp_path, cache):
    """The plain functions' table, and what the artifact says; the paper's basis has no such row."""
    fit(tmp_path, cache, calls=3, path="uniform", last_row="data")
    found = load_solver(tmp_path / "olss-3.json")
    fitted = TrajectoryCache(cache).load()[:-4]
    path = tuple(found.info["config"]["indices"])
    expected = fit_run(Toy(), teacher(), [fitted], CallPlan(path), data_scale=1.0).fit.table(teacher())
    torch.testing.assert_close(found.output_coef, expected.output_coef, rtol=1e-6, atol=1e-9)
    assert found.output_coef[-1, :-1].tolist() == [0, 0]
    assert found.info["config"]["last_row"] == "data"
    with pytest.raises(ValueError, match="no teacher's output: use basis own"):
        OLSS(last_row="data", basis="teacher")
