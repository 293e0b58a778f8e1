"""What a training may do to files that are there, and that what is lost leaves none."""

import math

import lightning
import pytest
import torch
from lightning.pytorch import Callback

from data.teacher_data import TeacherData
from solver_search.descent import Descent
from solver_search.method import SolverSearch
from solvers import load_solver
from solvers.files import claimed
from tests.solver_search.toys import TwoPoints
from tests.training.test_cli import fit as arguments
from tests.training.test_resume import METHODS, NETWORKS, SCHEDULE, base, cache, digits, files, fit, training
from train import main
from training.ema import EMA
from training.run_id import run_id
from training.safe_points import SafePoints
from training.solver_training import SolverTraining

__all__ = ["cache"]  # a fixture


@pytest.mark.parametrize("name", NETWORKS)
def test_a_smoke_test_of_a_network_writes_nothing(tmp_path, name):
    make, data = NETWORKS[name]
    fit(make(tmp_path / "out"), data(), fast_dev_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_a_smoke_test_of_a_method_writes_nothing(cache, tmp_path, name):
    fit(training(name, tmp_path / "out"), TeacherData(cache, holdout=4, batch_size=5), fast_dev_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_not_replaced_by_one_of_fewer_steps(tmp_path, name):
    make, data = NETWORKS[name]
    options = {"limit_val_batches": 0, "default_root_dir": tmp_path}
    fit(make(tmp_path / "out"), data(), max_steps=2, **options)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is the result of 2 steps, this training has 1: .* --overwrite"):
        fit(make(tmp_path / "out"), data(), max_steps=1, **options)
    assert files(tmp_path / "out") == before
    module = make(tmp_path / "out")
    module.overwrite = True
    fit(module, data(), max_steps=1, **options)
    assert files(tmp_path / "out") != before
    fit(make(tmp_path / "out"), data(), max_steps=2, **options)
    assert files(tmp_path / "out") == before


def search(steps, output):
    descent = Descent("adam", learning_rate=0.1, steps=steps)
    return SolverTraining(TwoPoints(SCHEDULE), SolverSearch([2], descent=descent), str(output))


def test_a_solver_is_not_replaced_by_one_of_less_work(cache, tmp_path):
    """Also not in between: a longer search replaces it when it is longer."""

    def steps():
        return load_solver(tmp_path / "solver-search-2.json").info["config"]["steps"]

    class Watch(Callback):
        seen = ()

        def on_train_batch_end(self, *_):
            self.seen = (*self.seen, steps())

    fit(search(4, tmp_path), TeacherData(cache, holdout=4))
    with pytest.raises(ValueError, match=r"solver-search-2\.json is the result of [\d,]+ network calls, this training"):
        fit(search(3, tmp_path), TeacherData(cache, holdout=4))
    assert steps() == 4
    watch = Watch()
    fit(search(6, tmp_path), TeacherData(cache, holdout=4), callbacks=[watch])
    assert (watch.seen[:3], steps()) == ((4, 4, 4), 6)
    shorter = search(3, tmp_path)
    shorter.overwrite = True
    fit(shorter, TeacherData(cache, holdout=4))
    assert steps() == 3


def test_the_command_line_keeps_results_and_their_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    wandb = tmp_path / "logger.yaml"
    wandb.write_text(
        f"trainer: {{logger: {{class_path: training.wandb.Wandb, init_args: {{save_dir: {tmp_path}}}}}}}\n"
    )

    def run(*options):
        main(arguments(tmp_path, "--config", str(wandb), "--trainer.limit_val_batches", "0", *options))
        return run_id(tmp_path), files(tmp_path / "out")

    first, written = run()
    assert run("--trainer.fast_dev_run", "true") == (first, written)
    with pytest.raises(SystemExit) as left:
        run("--trainer.max_steps", "1")
    assert left.value.code == 2
    assert "is the result of 2 steps, this training has 1" in capsys.readouterr().err
    assert (run_id(tmp_path), files(tmp_path / "out")) == (first, written)
    assert run("--ckpt_path", str(tmp_path / "last.ckpt")) == (first, written)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run()[0] == first
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    again, shorter = run("--trainer.max_steps", "1", "--overwrite")
    assert again != first
    assert shorter["config.json"]["training"]["steps"] == 1
    assert "overwrite: false" in (tmp_path / "config.yaml").read_text()


class Seen(Callback):
    """Labels of the batches, one list for each epoch."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_epoch_start(self, *_):
        self.trained.append([])

    def on_validation_epoch_start(self, *_):
        self.validated.append(0)

    def on_train_batch_start(self, trainer, module, batch, *_):
        self.trained[-1] += batch[1].tolist()

    def on_validation_batch_start(self, trainer, module, batch, *_):
        self.validated[-1] += len(batch[1])


def test_overfitting_sees_the_same_batches_in_every_epoch(tmp_path):
    seen = Seen()
    fit(base(tmp_path / "out"), digits(), max_steps=6, overfit_batches=2, limit_val_batches=0, callbacks=[seen])
    assert len(seen.trained) == 3
    assert seen.trained[0] == seen.trained[1] == seen.trained[2]
    others = Seen()
    fit(base(tmp_path / "out"), digits(), max_steps=6, limit_train_batches=2, limit_val_batches=0, callbacks=[others])
    assert others.trained[0] == seen.trained[0] != others.trained[1]


def test_the_first_validation_after_the_sanity_check_sees_everything(tmp_path):
    seen = Seen()
    data = digits(batch_size=64)
    options = {"max_steps": 2, "num_sanity_val_steps": 2, "val_check_interval": 1, "default_root_dir": tmp_path}
    fit(base(tmp_path / "out"), data, check_val_every_n_epoch=None, callbacks=[seen], **options)
    assert seen.validated == [128, 179, 179]


def test_validate_measures_what_fit_measured(tmp_path):
    options = {"max_steps": 3, "val_check_interval": 3, "check_val_every_n_epoch": None, "default_root_dir": tmp_path}
    trainer = fit(base(tmp_path / "out"), digits(), callbacks=[EMA(0.5)], num_sanity_val_steps=0, **options)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = {}
    for name, callbacks in {"average": [EMA(0.5)], "raw": []}.items():
        again = lightning.Trainer(
            accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False, enable_checkpointing=False
        )
        path = tmp_path / "last.ckpt"
        (found[name],) = again.validate(base(None), digits(), path, verbose=False, weights_only=True)
    assert found["average"]["val/loss"] == float(trainer.callback_metrics["val/loss"])
    assert found["raw"]["val/loss"] != found["average"]["val/loss"]


class Breaks(TwoPoints):
    """Turns to NaN after some network calls."""

    left = 10**9

    def forward(self, x, timestep, condition=None):
        self.left -= 1
        return super().forward(x, timestep) * (1.0 if self.left > 0 else math.nan)


def refusal(module, data) -> str | None:
    """What a fit says where it ends early."""
    try:
        fit(module, data)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_breaks_ends_a_method_in_one_line(cache, tmp_path, name):
    """Wherever it does; artifacts are those of before, and finite."""
    whole, finished = Breaks(SCHEDULE), 0
    fit(SolverTraining(whole, METHODS[name], str(tmp_path / "whole")), TeacherData(cache, holdout=4, batch_size=5))
    total = 10**9 - whole.left
    for left in sorted({1, 2, 3, 4, 6, 9, total // 3, total // 2, total - 4, total - 1}):
        denoiser, output = Breaks(SCHEDULE), tmp_path / str(left)
        denoiser.left = left
        module = SolverTraining(denoiser, METHODS[name], str(output))
        said = refusal(module, TeacherData(cache, holdout=4, batch_size=5))
        assert said is None or said.isprintable()
        finished += said is None  # it broke after the last step that moved anything
        for path in output.glob("*.json"):
            assert bool(torch.isfinite(load_solver(path).output_coef).all())
            assert "NaN" not in path.read_text()
        assert not list(output.glob(".*"))
    assert finished <= 4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loss_that_is_not_finite_ends_a_training_in_one_line(tmp_path, name, monkeypatch):
    make, data = NETWORKS[name]
    kind = type(make(None))
    step = kind.training_step
    monkeypatch.setattr(
        kind, "training_step", lambda self, *a: step(self, *a) * (math.nan if self.global_step == 2 else 1)
    )

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    options = {"max_steps": 5, "limit_val_batches": 0, "default_root_dir": tmp_path}
    for callbacks in ([Save()], []):
        with pytest.raises(
            ValueError, match=r"weights are not finite after [35] steps: lower the learning rate"
        ) as left:
            fit(make(tmp_path / "out"), data(), callbacks=callbacks, **options)
        assert str(left.value).isprintable()
    assert not (tmp_path / "out").exists()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", ["olss-2.json", "solver-outputs"])
def test_two_runs_do_not_write_the_same(cache, tmp_path, name):
    """Also where their checkpoints are in different folders."""
    with claimed(tmp_path / name), pytest.raises(ValueError, match=rf"another process writes to .*/{name}: wait"):
        fit(training("olss", tmp_path), TeacherData(cache, holdout=4, batch_size=5), callbacks=[SafePoints()])
    assert not list(tmp_path.iterdir())


def test_outputs_of_another_precision_are_not_taken_up(cache, tmp_path):
    """A run in bf16 that is stopped early, then another one in the same folder."""
    data = {"holdout": 4, "batch_size": 5}
    fit(training("olss", tmp_path / "whole"), TeacherData(cache, **data))
    output = tmp_path / "two"
    fit(training("olss", output), TeacherData(cache, **data), max_epochs=2, precision="bf16-mixed")
    assert list((output / "solver-outputs").iterdir())
    fit(training("olss", output), TeacherData(cache, **data))
    for name in ("olss-2.json", "olss-3.json"):
        one, other = (load_solver(folder / name) for folder in (tmp_path / "whole", output))
        assert torch.equal(one.output_coef, other.output_coef)
        assert one.info["fitted_on"]["evaluations"] == other.info["fitted_on"]["evaluations"]
