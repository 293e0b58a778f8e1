"""`trainer.test` measures what a method has found: in memory, from a checkpoint, or the artifacts it wrote."""

import warnings
from pathlib import Path

import lightning
import pytest

from evaluation.evaluate import evaluate_table
from solvers import identify, save_solver
from solvers.named import named_solver
from tests.olss.toy import Toy
from training.testing import Evaluation, TableModule


class Tables(lightning.LightningDataModule):
    """What is tested are tables alone."""

    def test_dataloader(self):
        return self.trainer.lightning_module.tables_to_test()


class Method(TableModule):
    def __init__(self, folder, tables, evaluation, seeds=()):
        super().__init__()
        self.denoiser, self.folder, self.tables, self.evaluation, self.seeds = Toy(), folder, tables, evaluation, seeds

    def current_tables(self):
        return {f"ddim-{nfe}": named_solver(f"ddim:{nfe}", self.denoiser.schedule) for nfe in self.tables}

    def artifact_paths(self):
        return {"ddim-3": Path(self.folder) / "ddim-3.json"}

    def used_seeds(self):
        return self.seeds


def run(module):
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(**options, enable_model_summary=False, enable_checkpointing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer.test(module, datamodule=Tables(), verbose=False)[0]


SMALL = Evaluation(num_images=6, batch_size=4, metrics=["rmse"], reference="ddim:20")


def test_figures_are_those_of_evaluate_table(tmp_path):
    found = run(Method(tmp_path, [3, 5], SMALL))
    toy = Toy()
    for nfe in (3, 5):
        table, reference = (named_solver(f"ddim:{n}", toy.schedule) for n in (nfe, 20))
        expected = evaluate_table(toy, table, reference, num_images=6)
        assert found[f"test/ddim-{nfe}/rmse"] == pytest.approx(expected["rmse"], rel=1e-6)
        assert found[f"test/ddim-{nfe}/nfe"] == nfe
    assert found["test/ddim-5/rmse"] < found["test/ddim-3/rmse"]


def test_artifacts_are_tested_where_nothing_is_in_memory(tmp_path):
    toy = Toy()
    table = named_solver("ddim:3", toy.schedule)
    save_solver(table, tmp_path / "ddim-3.json", identify(toy), method="test")
    assert run(Method(tmp_path, [], SMALL)) == pytest.approx(run(Method(tmp_path, [3], SMALL)))


def test_nothing_to_test(tmp_path):
    with pytest.raises(ValueError, match="there is no table to test: give --ckpt_path, or fit first"):
        run(Method(tmp_path, [], SMALL))


def test_seeds_of_the_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seeds"):
        run(Method(tmp_path, [3], SMALL, seeds=[[2, 9]]))


@pytest.mark.parametrize("source", ["fitted_on", "validation"])
def test_seeds_that_the_artifact_states_are_refused(tmp_path, source):
    toy = Toy()
    save_solver(
        named_solver("ddim:3", toy.schedule),
        tmp_path / "ddim-3.json",
        identify(toy),
        method="test",
        **{source: {"seeds": [[5, 9]]}},
    )
    with pytest.raises(ValueError, match="seeds 5 to 8, which overlap"):
        run(Method(tmp_path, [], SMALL))


def teacher():
    network = Toy()
    network.scale.data.fill_(0.5)
    return network


class Student(Method):
    @property
    def reference_denoiser(self):
        return teacher()


def test_a_student_is_measured_against_its_teacher(tmp_path):
    found = run(Student(tmp_path, [3], SMALL))
    toy = Toy()
    table, reference = (named_solver(f"ddim:{n}", toy.schedule) for n in (3, 20))
    expected = evaluate_table(toy, table, reference, num_images=6, reference_denoiser=teacher())
    assert found["test/ddim-3/rmse"] == pytest.approx(expected["rmse"], rel=1e-6)


def test_options():
    with pytest.raises(ValueError, match="num_images 0 and batch_size 64 must be at least 1"):
        Evaluation(num_images=0)
