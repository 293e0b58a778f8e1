"""What a run of SLAM leaves behind: students, their tables, the noise each step keeps, and what they measure."""

import json
from itertools import product

import pytest
import torch

import sample as command
from denoisers import load_denoiser
from denoisers.dit import DiT
from denoisers.generate import generate
from slam.choice import FIRST_SEED
from slam.export import Exports
from slam.tables import student_table
from solvers import load_solver, named_solver, student_path
from tests.slam.tiny import SCHEDULES, differs, digits, make, network, trainer


def test_exports_are_kept_where_asked_for(tmp_path):
    module = make(output=str(tmp_path), every=1, keep=True, steps=(1,))
    trainer(max_steps=3).fit(module, digits())
    folders = [tmp_path / "step-000001", tmp_path / "step-000002", tmp_path]
    tables = [load_solver(folder / "slam-1.json") for folder in folders]
    assert [table.info["fitted_on"]["iterations"] for table in tables] == [1, 2, 3]
    first, second, last = (load_denoiser(student_path(table).parent) for table in tables)
    assert differs(first, second)
    assert differs(second, last)


def test_each_step_keeps_the_share_nearest_to_the_data(tmp_path, monkeypatch):
    """Of images that would be nearest with 1, .7 and 0 at the three steps; one evaluation has nothing to keep."""
    shares, measured = (0.0, 0.7, 1.0), []

    def evaluate(student, table, **options):
        assert options["seed"] == FIRST_SEED
        assert student is module.result
        found = next(
            each
            for each in product(shares, repeat=3)
            if torch.equal(student_table(SCHEDULES["flow"], 4, 10, each).noise_coef, table.noise_coef)
        )
        measured.append(found)
        return {"fd": sum(abs(share - best) for share, best in zip(found, (1.0, 0.7, 0.0)))}

    monkeypatch.setattr("slam.choice.evaluate_table", evaluate)
    monkeypatch.setattr("slam.module.shipped_measure", lambda *_: None)
    module = make("flow", output=str(tmp_path), steps=(1, 4), kept_noise=shares, choice_images=16)
    trainer(max_steps=2).fit(module, digits())
    assert len(measured) == len(set(measured)) == 9
    one, four = (load_solver(tmp_path / f"slam-{count}.json") for count in (1, 4))
    assert torch.equal(four.noise_coef, student_table(SCHEDULES["flow"], 4, 10, (1.0, 0.7, 0.0)).noise_coef)
    assert (one.info["config"]["kept_noise"], four.info["config"]["kept_noise"]) == ([], [1.0, 0.7, 0.0])
    assert four.info["fitted_on"]["seeds"][-1] == [FIRST_SEED, FIRST_SEED + 16]


def test_shares_are_measured_in_features_of_the_model(tmp_path):
    module = make("flow", output=str(tmp_path), steps=(2,), kept_noise=(0.0, 0.5))
    with pytest.raises(ValueError, match="fd was asked for"):
        trainer(max_steps=2).fit(module, digits())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"kept_noise": (0.5, 1.2)}, "shares in"), ({"kept_noise": ()}, "one or"), ({"choice_images": 1}, "at least 2")],
)
def test_refuses_other_shares(options, said):
    with pytest.raises(ValueError, match=said):
        Exports(**options)


@pytest.mark.parametrize("schedule", ["epsilon", "flow"])
def test_exported_students_are_sampled_from_one_path(tmp_path, schedule):
    module = make(schedule, output=str(tmp_path / "out"), every=2, steps=(4, 1))
    trainer(max_steps=3).fit(module, digits())
    path = tmp_path / "out/slam-4.json"
    assert sorted(found.name for found in (tmp_path / "out").glob("*.json")) == ["slam-1.json", "slam-4.json"]
    table = load_solver(path)
    student = load_denoiser(student_path(table).parent)
    table = load_solver(path, student)
    assert torch.equal(table.output_coef, student_table(SCHEDULES[schedule], 4, 10).output_coef)
    fitted, config = table.info["fitted_on"], table.info["config"]
    assert {"method": "slam", "guidance_scale": 1.5, "iterations": 3, "images": 600, "data": "digits"}.items() <= (
        fitted.items()
    )
    assert table.info["guidance_scale"] == 1.0
    assert fitted["seconds"] > 0
    assert (config["huber_c"], config["target_decay"]) == (0.001, 0.95)
    assert json.loads((tmp_path / "out/student/config.json").read_text())["network"]["gamma"] is True
    command.main(["generate", "--solver", str(path), "--num_samples", "3", "--output", str(tmp_path / "images")])
    expected = generate(student, table, range(3))
    import numpy as np

    found = torch.from_numpy(np.load(tmp_path / "images/samples.npz")["samples"])
    torch.testing.assert_close(found, expected)


def test_an_artifact_fits_a_student_that_thresholds(tmp_path, monkeypatch):
    monkeypatch.setattr(DiT, "thresholding", {"ratio": 0.9}, raising=False)
    trainer(max_steps=1).fit(make(output=str(tmp_path), steps=[1]), digits())
    student = load_denoiser(tmp_path / "student")
    assert load_solver(tmp_path / "slam-1.json", student).info["thresholding"] == {"ratio": 0.9}


def test_an_artifact_refuses_another_student(tmp_path):
    for name, depth in (("one", 2), ("two", 1)):
        module = make(teacher=network(depth=depth), output=str(tmp_path / name), steps=(1,))
        trainer(max_steps=1).fit(module, digits())
    with pytest.raises(ValueError, match="made for weights"):
        load_solver(tmp_path / "one/slam-1.json", load_denoiser(tmp_path / "two/student"))
    weights = tmp_path / "one/student/model.safetensors"
    weights.write_bytes((tmp_path / "two/student/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="has SHA-256"):
        load_solver(tmp_path / "one/slam-1.json")


def test_test_measures_the_tables_against_the_teacher(tmp_path):
    from training.testing import Evaluation

    evaluation = Evaluation(num_images=4, metrics=["rmse"])
    module = make("flow", output=str(tmp_path), steps=(1, 2), evaluation=evaluation)
    trainer(max_steps=2).fit(module, digits())
    (found,) = trainer().test(module, digits(), verbose=False)
    assert {"test/slam-1/rmse", "test/slam-2/rmse", "test/slam-2/nfe"} <= set(found)
    teacher = generate(module.teacher, module_reference(module), range(4))
    student = generate(module.target, module.tables[1], range(4))
    expected = float((student - teacher).square().mean().sqrt())
    assert found["test/slam-1/rmse"] == pytest.approx(expected, rel=1e-4)
    (again,) = trainer().test(
        make("flow", output=str(tmp_path), steps=(1, 2), evaluation=evaluation), digits(), verbose=False
    )
    assert again["test/slam-1/rmse"] == pytest.approx(expected, rel=0.05)  # bf16 weights


def module_reference(module):
    return named_solver("euler:10", module.schedule)
