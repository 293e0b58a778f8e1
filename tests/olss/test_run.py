"""Fits along a plan: exact recovery, the solver's own outputs, and what the errors say."""

import pytest
import torch

from data.trajectories import run_teacher
from olss.path import uniform_path
from olss.plan import CallPlan
from olss.run import check_teacher, end_errors, fit_on_teacher, fit_run, teacher_columns
from solvers import Bands, NoiseSchedule, Plain, sample, sample_trace
from solvers.named import named_solver
from tests.olss.toy import SEEDS, Toy, teacher, trajectories

pytestmark = pytest.mark.filterwarnings("ignore:row .* condition number")
FLOW = NoiseSchedule.flow()


def plan_of(path) -> CallPlan:
    return CallPlan(tuple(path))


def own(denoiser, table, batches, path, **options):
    """A fit on the solver's own outputs."""
    return fit_run(denoiser, table, batches, plan_of(path), **options).fit


def rmse(denoiser, table, data):
    with torch.no_grad():
        image = sample(denoiser, table, data.states[:, 0], data.condition)
    return float((image - data.states[:, -1]).pow(2).mean().sqrt())


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.scaled_linear(), FLOW])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_recovers_the_teacher(steps, schedule):
    """All the teacher's steps: the teacher's canonical table, from either basis."""
    data, table = trajectories(steps, schedule=schedule), teacher(steps, schedule)
    columns = teacher_columns(table, [data])
    fits = fit_on_teacher(columns, table, plan_of(range(steps))), own(Toy(schedule), table, [data], range(steps))
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
    fit = own(Toy(schedule), table, [data[:10], data[10:]], uniform_path(20, 5))
    assert rmse(Toy(schedule), fit.table(table), data) == pytest.approx(fit.errors[-1], rel=1e-6)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), FLOW])
@pytest.mark.parametrize("nfe", [4, 6])
def test_beats_the_teacher_basis_and_the_baseline_on_other_seeds(nfe, schedule):
    data, unseen = trajectories(schedule=schedule), trajectories(seeds=range(64), schedule=schedule)
    table, path = teacher(schedule=schedule), uniform_path(20, nfe)
    on_policy = own(Toy(schedule), table, [data], path).table(table)
    off_policy = fit_on_teacher(teacher_columns(table, [data]), table, plan_of(path)).table(table)
    baseline = named_solver(f"{'euler' if schedule is FLOW else 'ddim'}:{nfe}", schedule)
    errors = [rmse(Toy(schedule), solver, unseen) for solver in (on_policy, off_policy, baseline)]
    assert errors[0] < min(errors[1:])


def test_ill_conditioned_fits_say_so_and_ridge_helps():
    """One trajectory of 16 elements, 12 rows."""
    data, table = trajectories(seeds=SEEDS[:1]), teacher()
    with pytest.warns(UserWarning, match="condition number"):
        own(Toy(), table, [data], uniform_path(20, 18))
    ridged = own(Toy(), table, [data], uniform_path(20, 18), ridge=1e-6)
    assert max(ridged.conditions) < 1e5
    assert max(float(weights.abs().max()) for weights in ridged.weights) < 100


def test_batches_do_not_matter():
    data, table, path = trajectories(), teacher(), uniform_path(20, 4)
    whole = own(Toy(), table, [data], path)
    parts = own(Toy(), table, [data[:5], data[5:6], data[6:]], path)
    for one, other in zip(whole.weights, parts.weights):
        assert float((one - other).abs().max()) < 1e-9 * float(one.abs().max())


def test_an_earlier_run_saves_evaluations_and_changes_nothing():
    data, table, calls = trajectories(), teacher(), []

    def counted(x, timestep, condition):
        calls.append(len(x))
        return Toy()(x, timestep, condition)

    old = fit_run(counted, table, [data[:16]], plan_of([0, 5, 10, 15]), watched=[data[16:]])
    assert sum(calls) == 3 * 24
    others = ([0, 5, 10, 15], 0), ([0, 5, 10, 16], 1), ([0, 5, 9, 15], 2), ([0, 4, 10, 15], 3)
    more = ([1, 5, 10, 15], 4), ([0, 5, 10], 0), ([0, 5, 10, 15, 18], 1)
    for path, evaluations in (*others, *more):
        calls.clear()
        new = fit_run(counted, table, [data[:16]], plan_of(path), watched=[data[16:]], known=old)
        fresh = fit_run(Toy(), table, [data[:16]], plan_of(path), watched=[data[16:]])
        assert sum(calls) == evaluations * 24
        assert all(torch.equal(a, b) for a, b in zip(new.fit.weights, fresh.fit.weights))
        errors = [end_errors(data[16:], run.fit, run.parts[1]) for run in (new, fresh)]
        assert torch.equal(*errors)
    assert len(old.fit.weights) == 4


def test_the_table_lies_on_the_teachers_nodes():
    data, table, path = trajectories(), teacher(), [0, 3, 11]
    found = own(Toy(), table, [data], path).table(table)
    assert found.timesteps.tolist() == table.timesteps[path].tolist()
    assert found.sigma.tolist() == table.sigma[[*path, 20]].tolist()
    assert bool((found.state_coef[:, 1:] == 0).all())
    assert found.prediction_type == "epsilon"


@pytest.mark.parametrize("space", [Plain(), Bands((0.2,), 1)], ids=["numbers", "bands"])
@pytest.mark.parametrize("path", [[0, 5, 10, 15], [2, 8, 14], [0]])
@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), FLOW])
def test_a_last_row_of_predicted_data(schedule, path, space):
    """The image is the data predicted at the last state; the rows before are those of the fit without it."""
    data, table, toy = trajectories(schedule=schedule), teacher(schedule=schedule), Toy(schedule)
    fit, plain = (own(toy, table, [data], path, space=space, data_scale=scale) for scale in (1.0, None))
    assert all(torch.equal(a, b) for a, b in zip(fit.weights[:-1], plain.weights[:-1]))
    assert rmse(toy, fit.table(table), data) == pytest.approx(fit.errors[-1], rel=1e-6)
    assert fit.errors[-1] > plain.errors[-1]
    with torch.no_grad():
        trace = sample_trace(toy, fit.table(table), data.states[:, 0], data.condition)
        alpha, sigma, state = table.alpha[path[-1]], table.sigma[path[-1]], trace.states[-2]
        output = toy(state, table.timesteps[path[-1]], data.condition)
    expected = state - sigma * output if schedule is FLOW else (state - sigma * output) / alpha
    torch.testing.assert_close(trace.states[-1], expected, rtol=1e-4, atol=1e-4)  # the teacher ends at sigma 4e-6


def test_all_the_teachers_steps_end_as_the_teacher_does():
    data, table = trajectories(5), teacher(5)
    fit = own(Toy(), table, [data], range(5), data_scale=1.0)
    torch.testing.assert_close(fit.table(table).output_coef[-1], table.output_coef[-1], rtol=1e-4, atol=1e-6)
    assert fit.errors[-1] < 1e-4


@pytest.mark.parametrize("unconditional", [(0, 1, 2), (0,)])
def test_predicted_data_of_a_guided_teacher(unconditional):
    """Guided where the last row makes both calls, else the conditional prediction."""
    data, table = guided_trajectories(), teacher().guided(2.0)
    plan = CallPlan((0, 8, 15), unconditional)
    found = fit_run(Guided(), table, [data], plan, data_scale=2.0).fit.table(table)
    alpha, sigma = table.alpha[15], table.sigma[15]
    shares = [2.0, -1.0] if 2 in unconditional else [1.0]
    wanted = [0.0] * (found.nfe - len(shares)) + [float(-sigma / alpha) * share for share in shares]
    assert found.output_coef[-1].tolist() == pytest.approx(wanted, rel=1e-4)
    assert found.state_coef[-1].tolist() == pytest.approx([0, 0, float(1 / alpha)], rel=1e-4)


def test_refuses_a_stochastic_teacher():
    with pytest.raises(ValueError, match="OLSS needs a deterministic one"):
        check_teacher(named_solver("ddpm:5", NoiseSchedule.linear()))


def test_the_first_call_left_out_is_start_noise_times_a_weight():
    data, table = trajectories(), teacher()
    found = own(Toy(), table, [data], [2, 8, 14]).table(table)
    start, state = data.states[:, 0], data.states[:, 2]
    assert found.start_scale == pytest.approx(float((start * state).sum() / start.square().sum()))
    assert found.nfe == 3
    assert found.sigma.tolist() == table.sigma[[2, 8, 14, 20]].tolist()


class Guided(Toy):
    """Toy with a null class."""

    def null_condition(self, condition):
        return torch.full_like(condition, 3)


def guided_trajectories(steps=20, seeds=SEEDS, scale=2.0):
    return run_teacher(Guided(), teacher(steps).guided(scale), seeds, torch.float64)


@pytest.mark.parametrize("basis", ["own", "teacher"])
def test_recovers_a_guided_teacher(basis):
    """All rows and both branches: the guided teacher's canonical table."""
    data, table = guided_trajectories(4), teacher(4).guided(2.0)
    plan = CallPlan.of(range(4), table)
    assert plan.calls == table.calls
    fit = (
        fit_run(Guided(), table, [data], plan).fit
        if basis == "own"
        else fit_on_teacher(teacher_columns(table, [data]), table, plan)
    )
    found, expected = fit.table(table), table
    noise = data.states[:, 0] / table.start_scale
    images = [sample(Guided(), solver, noise, data.condition) for solver in (found, expected)]
    assert torch.allclose(*images, atol=1e-6)


def test_calls_left_out_cost_less_and_say_where_they_are():
    data, table = guided_trajectories(), teacher().guided(2.0)
    plan = CallPlan((0, 6, 12), (0,))
    found = fit_run(Guided(), table, [data], plan).fit.table(table)
    assert [(call.row, call.branch) for call in found.calls] == [
        (0, "conditional"), (0, "unconditional"), (1, "conditional"), (2, "conditional"),
    ]  # fmt: skip
    counted = []

    class Counting(Guided):
        def forward(self, x, timestep, condition=None):
            counted.append(len(x))
            return super().forward(x, timestep, condition)

    sample(Counting(), found, data.states[:, 0], data.condition)
    assert counted == [48, 24, 24]


def test_bands_are_never_worse_on_what_they_are_fitted_to():
    data, table = trajectories(), teacher()
    errors = [
        fit_run(Toy(), table, [data], plan_of([0, 7, 13]), space).fit.errors[0]
        for space in (Plain(), Bands((), 1), Bands((0.2,), 1), Bands((0.2, 0.4), 1))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)
    assert errors[3] <= errors[2] * (1 + 1e-9) <= errors[1] * (1 + 1e-8)


def test_operator_fits_are_what_the_sampler_runs():
    data, table = trajectories(), teacher()
    run = fit_run(Toy(), table, [data[:16]], plan_of([1, 7, 13]), Bands((0.2,), 1), watched=[data[16:]])
    image = sample(Toy(), run.fit.table(table), data[16:].states[:, 0] / table.start_scale, data[16:].condition)
    errors = (image - data[16:].states[:, -1]).square().flatten(1).mean(1)
    assert torch.allclose(end_errors(data[16:], run.fit, run.parts[1]), errors.detach(), rtol=1e-6)


def test_a_large_ridge_leaves_the_best_numbers():
    """Of operators the penalty draws to numbers, not to zero."""
    data, table = trajectories(), teacher()
    plain = own(Toy(), table, [data], [0, 10])
    drawn = fit_run(Toy(), table, [data], plan_of([0, 10]), Bands((0.2,), 1), ridge=1e9).fit
    assert torch.allclose(drawn.weights[0].flatten(1), plain.weights[0][:, None].expand(-1, 2), rtol=1e-4)


@pytest.mark.parametrize(
    ("unconditional", "match"), [((0, 0), "must be distinct"), ((3,), "among the 2 rows"), ((1, 0), "in order")]
)
def test_wrong_plans_are_refused(unconditional, match):
    with pytest.raises(ValueError, match=match):
        CallPlan((0, 5), unconditional)


def test_the_teacher_basis_starts_at_the_noise():
    columns = teacher_columns(teacher(), [trajectories()])
    with pytest.raises(ValueError, match=r"path \[1, 5\] must start at 0 with the basis teacher"):
        fit_on_teacher(columns, teacher(), plan_of([1, 5]))


def test_a_denoiser_that_asks_is_told_its_node():
    data, table, told = trajectories(), teacher(), []

    class Asking(Toy):
        needs_node = True

        def forward(self, x, timestep, condition=None, node=None):
            told.append(float(node[1]))
            return super().forward(x, timestep, condition)

    fit_run(Asking(), table, [data], plan_of([0, 5, 9]))
    assert told == [float(table.sigma[5]), float(table.sigma[9])]
