"""Fits along a path: exact recovery, the student's own outputs, and what the errors say."""

import pytest
import torch

from olss.path import uniform_path
from olss.student import (
    Fit,
    Run,
    _shared,
    check_teacher,
    end_error,
    fit_on_student,
    fit_on_teacher,
    run_student,
    teacher_factor,
)
from solvers import NoiseSchedule, sample
from solvers.named import named_solver
from tests.olss.toy import SEEDS, Toy, teacher, trajectories

pytestmark = pytest.mark.filterwarnings("ignore:row .* condition number")
FLOW = NoiseSchedule.flow()


def rmse(denoiser, table, data):
    with torch.no_grad():
        image = sample(denoiser, table, data.states[:, 0], data.condition)
    return float((image - data.states[:, -1]).pow(2).mean().sqrt())


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.scaled_linear(), FLOW])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_recovers_the_teacher(steps, schedule):
    """All the teacher's steps: the teacher's canonical table, from either basis."""
    data, table = trajectories(steps, schedule=schedule), teacher(steps, schedule)
    factor = teacher_factor([data], steps)
    fits = fit_on_teacher(factor, range(steps), steps), fit_on_student(Toy(schedule), table, [data], range(steps))
    for fit in fits:
        assert max(fit.conditions) < 1e8
        found, expected = fit.table(table).canonical(), table.canonical()
        torch.testing.assert_close(found.start, expected.start, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.output, expected.output, rtol=1e-6, atol=1e-6)
        assert rmse(Toy(schedule), fit.table(table), data) < 1e-6


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), FLOW])
def test_row_errors_are_those_of_the_sampler(schedule):
    """The last row's error is the RMSE of the student's images to the teacher's on the fitted trajectories."""
    data, table = trajectories(schedule=schedule), teacher(schedule=schedule)
    fit = fit_on_student(Toy(schedule), table, [data[:10], data[10:]], uniform_path(20, 5))
    assert rmse(Toy(schedule), fit.table(table), data) == pytest.approx(fit.errors[-1], rel=1e-6)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), FLOW])
@pytest.mark.parametrize("nfe", [4, 6])
def test_beats_the_teacher_basis_and_the_baseline_on_other_seeds(nfe, schedule):
    data, unseen = trajectories(schedule=schedule), trajectories(seeds=range(64), schedule=schedule)
    table, path = teacher(schedule=schedule), uniform_path(20, nfe)
    on_policy = fit_on_student(Toy(schedule), table, [data], path).table(table)
    off_policy = fit_on_teacher(teacher_factor([data], 20), path, 20).table(table)
    baseline = named_solver(f"{'euler' if schedule is FLOW else 'ddim'}:{nfe}", schedule)
    errors = [rmse(Toy(schedule), solver, unseen) for solver in (on_policy, off_policy, baseline)]
    assert errors[0] < min(errors[1:])


def test_ill_conditioned_fits_say_so_and_ridge_helps():
    """One trajectory of 16 elements, 12 rows."""
    data, table = trajectories(seeds=SEEDS[:1]), teacher()
    with pytest.warns(UserWarning, match="condition number"):
        fit_on_student(Toy(), table, [data], uniform_path(20, 18))
    ridged = fit_on_student(Toy(), table, [data], uniform_path(20, 18), ridge=1e-6)
    assert max(ridged.conditions) < 1e5
    assert max(float(coef.abs().max()) for coef in ridged.coefs) < 100


def test_batches_do_not_matter():
    data, table, path = trajectories(), teacher(), uniform_path(20, 4)
    whole = fit_on_student(Toy(), table, [data], path)
    parts = fit_on_student(Toy(), table, [data[:5], data[5:6], data[6:]], path)
    for one, other in zip(whole.coefs, parts.coefs):
        assert float((one - other).abs().max()) < 1e-9 * float(one.abs().max())


def test_an_earlier_run_saves_evaluations_and_changes_nothing():
    data, table, calls = trajectories(), teacher(), []

    def counted(x, timestep, condition):
        calls.append(len(x))
        return Toy()(x, timestep, condition)

    old = run_student(counted, table, [data[:16]], [0, 5, 10, 15], watched=[data[16:]])
    assert sum(calls) == 3 * 24
    for path, evaluations in (([0, 5, 10, 15], 0), ([0, 5, 10, 16], 1), ([0, 5, 9, 15], 2), ([0, 4, 10, 15], 3)):
        calls.clear()
        new = run_student(counted, table, [data[:16]], path, watched=[data[16:]], known=old)
        fresh = run_student(Toy(), table, [data[:16]], path, watched=[data[16:]])
        assert sum(calls) == evaluations * 24
        assert all(torch.equal(a, b) for a, b in zip(new.fit.coefs, fresh.fit.coefs))
        assert end_error(data[16:], new.fit, new.outputs[1]) == end_error(data[16:], fresh.fit, fresh.outputs[1])
    assert len(old.fit.coefs) == 4


def test_shared_rows_of_paths_of_other_length():
    coefs = [torch.zeros(i + 2) for i in range(3)]
    old = Run(Fit([0, 4, 8], coefs, [0.0] * 3, [1.0] * 3), [[torch.zeros(1)] * 3])
    longer, shorter = _shared(old, [0, 4, 8, 12], 1), _shared(old, [0, 4], 1)
    assert (len(longer.fit.coefs), len(longer.outputs[0])) == (2, 3)
    assert (len(shorter.fit.coefs), len(shorter.outputs[0])) == (1, 2)


def test_the_table_lies_on_the_teachers_nodes():
    data, table, path = trajectories(), teacher(), [0, 3, 11]
    found = fit_on_student(Toy(), table, [data], path).table(table)
    assert found.timesteps.tolist() == table.timesteps[path].tolist()
    assert found.sigma.tolist() == table.sigma[[*path, 20]].tolist()
    assert bool((found.state_coef[:, 1:] == 0).all())
    assert found.prediction_type == "epsilon"


def test_refuses_a_stochastic_teacher():
    with pytest.raises(ValueError, match="OLSS needs a deterministic one"):
        check_teacher(named_solver("ddpm:5", NoiseSchedule.linear()))
