"""What solvers are ranked by: the same images for all of them, and the best classical solver beside."""

import lightning
import pytest
import torch

from data.teacher_data import TeacherData
from denoisers.generate import generate
from evaluation.distances import error_figures
from solver_search.descent import Descent
from solver_search.method import SolverSearch
from solvers import NoiseSchedule, named_solver
from tests.solver_search.toys import TwoPoints
from tests.training.test_resume import SCHEDULE, cache, fit
from training.exam import COLUMNS, Exam
from training.run_card import SPENT
from training.solver_training import SolverTraining

__all__ = ["cache"]  # a fixture
FIGURES = ("rmse", "median", "p99", "worst")


class Board(lightning.pytorch.loggers.CSVLogger):
    """Shows pictures and asks for an exam."""

    num_images = 5

    def __init__(self, folder):
        super().__init__(folder)
        self.rows, self.results = [], None

    def log_image(self, key, images):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_table(self, key, columns, data):
        self.results = key, columns, data


def errors(denoiser, solver, teacher="ddim:12"):
    ends = [generate(denoiser, named_solver(name, SCHEDULE), range(5)) for name in (solver, teacher)]
    return (ends[0] - ends[1]).double().flatten(1).square().mean(1).sqrt()


def test_errors_are_those_to_the_teachers_images():
    denoiser = TwoPoints(SCHEDULE)
    exam = Exam(denoiser, named_solver("ddim:12", SCHEDULE), 5)
    taken = exam.take("ours", named_solver("unipc:3", SCHEDULE))
    expected = errors(denoiser, "unipc:3")
    torch.testing.assert_close(taken.errors, expected, rtol=0, atol=0)
    assert taken.figures == error_figures(expected.square())
    assert taken.figures["worst"] == float(expected.max())
    assert taken.figures["rmse"] == pytest.approx(float(expected.square().mean() ** 0.5))
    rival = exam.classical(3)
    others = [f"{name}@{at}:3" for name in ("ddim", "dpmpp", "unipc") for at in ("linspace", "trailing")]
    assert rival.figures["median"] <= min(float(errors(denoiser, name).median()) for name in others)
    assert rival.figures["median"] == float(errors(denoiser, rival.name).median())
    row, pictures = exam.row(taken, 3)
    assert dict(zip(COLUMNS, row))["classical"] == rival.name
    assert len({picture.shape for picture in pictures}) == 1


def test_where_no_classical_solver_has_as_many_calls_there_is_none():
    denoiser = TwoPoints(SCHEDULE)
    denoiser.calls_per_evaluation = 2
    exam = Exam(denoiser, named_solver("ddim:12", SCHEDULE), 2)
    assert exam.classical(3) is None
    assert exam.classical(4).name.endswith(":2")
    row, pictures = exam.row(exam.take("ours", named_solver("ddim:3", SCHEDULE)), 3)
    assert row[-2:] == [None, None]
    assert [picture is None for picture in pictures] == [False, True, False]


def test_a_search_is_ranked_for_every_number_of_calls(cache, tmp_path):
    """And ends with the same tables as one that nobody watches."""
    search = SolverSearch([2, 3], descent=Descent("adam", learning_rate=0.3, steps=3))
    board, data = Board(tmp_path), {"holdout": 4, "batch_size": 5}
    watched, alone = (SolverTraining(TwoPoints(SCHEDULE), search, str(tmp_path / name)) for name in ("a", "b"))
    fit(watched, TeacherData(cache, **data), logger=board, log_every_n_steps=1)
    fit(alone, TeacherData(cache, **data))
    for name, table in alone.current_tables().items():
        assert torch.equal(watched.current_tables()[name].output_coef, table.output_coef)
    held_out = {key for row in board.rows for key in row if key.startswith("held_out/")}
    assert held_out == {f"held_out/{calls}-calls/{name}" for calls in (2, 3) for name in FIGURES}
    for calls in (2, 3):
        spent = [row[SPENT] for row in board.rows if f"held_out/{calls}-calls/median" in row]
        assert spent == sorted(spent)
        assert spent[-1] > spent[0]
        train = [row for row in board.rows if f"train/solver-search-{calls}/loss" in row]
        assert len(train) == 3
        assert all(row[f"train/solver-search-{calls}/learning_rate"] == pytest.approx(0.3) for row in train)
        assert all(row[f"train/solver-search-{calls}/gradient_norm"] > 0 for row in train)
    key, columns, data = board.results
    found = [dict(zip(columns, row)) for row in data]
    assert (key, [row["solver"] for row in found]) == ("pictures/results", ["solver-search-2", "solver-search-3"])
    assert all(row[name] is not None for row in found for name in ("teacher", "classical picture", "solver picture"))
    (best,) = (row for row in board.rows if "best/2-calls/median" in row)
    assert [best[f"best/{row['calls']}-calls/median"] for row in found] == [row["median"] for row in found]


def test_a_range_of_guidance_scales_has_no_exam(cache, tmp_path):
    module = SolverTraining(TwoPoints(NoiseSchedule.linear()), SolverSearch([2], descent=Descent(steps=1)))
    module.denoiser.guidance_scale = (1.0, 3.0)
    module._trainer = lightning.Trainer(logger=Board(tmp_path), enable_checkpointing=False, accelerator="cpu")
    assert module.exam is None
