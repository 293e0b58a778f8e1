"""Paths: the paper's search against a direct one, and what every path must keep to."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from denoisers import Counted, Evaluations
from olss.fit import solve
from olss.path import (
    check_path,
    distinct,
    greedy_path,
    log_snr_path,
    output_columns,
    state_column,
    uniform_path,
)
from olss.plan import CallPlan, combined, moves, starting_plans
from olss.run import end_errors, fit_on_teacher, fit_run, teacher_columns
from olss.search import PlanSearch
from olss.store import OutputStore
from solvers import NoiseSchedule
from tests.olss.toy import Toy, teacher, trajectories
from training.method import Run
from training.signals import Interrupted

pytestmark = pytest.mark.filterwarnings("ignore:row .* condition number")

STEPS = 20
DATA = trajectories(STEPS)
COLUMNS = teacher_columns(teacher(STEPS), [DATA])
FACTOR = COLUMNS.factors[0]


def step_errors(path):
    """Error of each step of a path: current state and outputs so far."""
    for index, end in enumerate([*path[1:], STEPS]):
        table = teacher(STEPS)
        outputs = [column for point in path[: index + 1] for column in output_columns(point, table)]
        basis = [state_column(path[index], table), *outputs]
        yield float(solve(FACTOR, basis, [state_column(end, table)]).error)


def direct_greedy(nfe):
    """The paper's search written down plainly: least squares on the stacked trajectories for every candidate."""

    def error(path, end):
        columns = [DATA.states[:, path[-1]], *(DATA.outputs[:, i] for i in path)]
        matrix, wanted = torch.stack([c.reshape(-1) for c in columns], 1), DATA.states[:, end].reshape(-1, 1)
        found = torch.linalg.lstsq(matrix, wanted, driver="gelsd", rcond=1e-14).solution
        return float((matrix @ found - wanted).pow(2).mean().sqrt())

    def walk(bound):
        path = [0]
        while len(path) <= nfe:
            low, high = path[-1] + 1, STEPS
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if error(path, middle) <= bound else (low, middle - 1)
            if low == STEPS:
                return path
            path.append(low)
        return None

    low, high, best = math.log(1e-12), math.log(10), None
    for _ in range(30):
        middle = (low + high) / 2
        found = walk(math.exp(middle))
        low, high, best = (middle, high, best) if found is None else (low, middle, found)
    return best


@pytest.mark.parametrize("nfe", [2, 4, 6])
def test_greedy_equals_the_direct_search(nfe):
    direct, path = direct_greedy(nfe), greedy_path(FACTOR, teacher(STEPS), nfe)
    assert set(direct) <= set(path)
    assert len(path) == nfe
    if len(direct) == nfe:
        assert path == direct


@pytest.mark.parametrize("nfe", [1, 2, 5, 13, 19, 20])
def test_greedy_places_every_point(nfe):
    path = check_path(greedy_path(FACTOR, teacher(STEPS), nfe), STEPS)
    assert len(path) == nfe


def test_greedy_lowers_the_largest_step_error():
    for nfe in (4, 6, 8):
        greedy, uniform = (
            max(step_errors(path)) for path in (greedy_path(FACTOR, teacher(STEPS), nfe), uniform_path(STEPS, nfe))
        )
        assert greedy <= uniform * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.data(), st.floats(0.3, 3))
def test_every_path_is_one(num_steps, data, power):
    nfe = data.draw(st.integers(1, num_steps))
    bent = distinct([num_steps * (i / nfe) ** power for i in range(nfe)], num_steps)
    for path in (uniform_path(num_steps, nfe), bent):
        assert len(check_path(path, num_steps)) == nfe


def test_uniform_rounds_i_m_over_n():
    assert uniform_path(100, 8) == [0, 12, 25, 38, 50, 62, 75, 88]
    assert distinct([0, 0.2, 0.3, 9.9], 10) == [0, 1, 2, 9]
    assert distinct([0, 9, 9, 9], 10) == [0, 7, 8, 9]


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.flow()])
def test_log_snr_steps_are_even(schedule):
    table = teacher(100, schedule)
    path = check_path(log_snr_path(table, 4), 100)
    steps = (table.alpha / table.sigma).log()[[*path[1:], 99]].diff()
    assert float(steps.max() / steps.min()) < 1.2
    assert max(b - a for a, b in pairwise(path)) > 2 * (100 - path[-1])


def test_path_errors():
    with pytest.raises(ValueError, match="a solver of 21 rows cannot follow a teacher of 20"):
        uniform_path(STEPS, 21)
    for path in ([], [-1, 2], [0, 5, 5], [0, 20]):
        with pytest.raises(ValueError, match="must increase from 0 or later, and stay below the teacher's 20 steps"):
            check_path(path, STEPS)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, STEPS - 1), min_size=1, max_size=5), st.integers(1, STEPS - 1))
def test_a_larger_path_has_no_larger_end_error(points, extra):
    """Teacher basis, no ridge."""
    small, large = ([0, *sorted(chosen)] for chosen in (points, points | {extra}))
    plans = [CallPlan(tuple(path)) for path in (small, large)]
    errors = [fit_on_teacher(COLUMNS, teacher(STEPS), plan).errors[-1] for plan in plans]
    assert errors[1] <= errors[0] + 1e-10


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 29), min_size=2, max_size=8), st.integers(1, 9), st.data())
def test_moves_keep_plans(points, distance, data):
    path = tuple(sorted(points))
    rows = data.draw(st.sets(st.integers(0, len(path) - 1), max_size=len(path) - 1))
    plan = CallPlan(path, tuple(sorted(rows)))
    moved = moves(plan, 30, distance)
    for new in moved:
        check_path(new.path, 30)
        assert len(new.calls) == len(plan.calls)
        changed = [abs(a - b) for a, b in zip(path, new.path) if a != b]
        assert (changed in ([1], [distance])) != (new.unconditional != plan.unconditional)
    check_path(combined(path, [new.path for new in moved], 30), 30)


def test_combined_takes_all_moves_that_fit():
    assert combined([0, 5, 10], [[0, 6, 10], [0, 5, 9]], 20) == (0, 6, 9)
    assert combined([0, 5, 6], [[0, 6, 7], [0, 5, 7]], 20) == (0, 6, 7)


@pytest.mark.parametrize("calls", range(1, 12))
def test_starting_plans_cost_what_was_asked_for(calls):
    plain, guided = teacher(STEPS), teacher(STEPS).guided(2.0)
    assert all(len(plan.calls) == calls and not plan.unconditional for plan in starting_plans(plain, calls))
    if calls > 1:
        plans = starting_plans(guided, calls)
        assert all(len(plan.calls) == calls and plan.unconditional for plan in plans)
        assert {len(plan.path) for plan in plans} == set(range(calls - calls // 2, calls))
    for plan in starting_plans(plain, calls):
        check_path(plan.path, STEPS)


def test_budgets_outside_the_teacher():
    with pytest.raises(ValueError, match="a solver of 21 network calls cannot follow a teacher of 20 rows"):
        starting_plans(teacher(STEPS), 21)
    with pytest.raises(ValueError, match="a solver of 0 network calls"):
        starting_plans(teacher(STEPS), 0)


def test_search_is_never_worse_than_its_starts():
    denoiser, table = Toy(), teacher(STEPS)
    search = PlanSearch(denoiser, table, DATA[:16], DATA[16:])
    starts = [*starting_plans(table, 4), CallPlan(tuple(greedy_path(FACTOR, table, 4)))]
    best = min(search.scores(starts))
    previous = best
    for rounds in (0, 1, 3):
        plan, score = search.best(4, [starts[-1]], rounds)
        assert len(check_path(plan.path, STEPS)) == 4
        assert score <= previous
        previous = score
        fit = fit_run(denoiser, table, [DATA[:16]], plan).fit
        run = fit_run(denoiser, table, [DATA[:16]], plan, watched=[DATA[16:]])
        assert score == pytest.approx(float(end_errors(DATA[16:], run.fit, run.parts[1]).sqrt().mean()), rel=1e-9)
        assert float((fit.weights[-1] - run.fit.weights[-1]).abs().max()) == 0
    assert previous < best


def test_only_plans_that_are_good_on_few_trajectories_are_judged_on_all():
    search = PlanSearch(Toy(), teacher(STEPS), DATA[:12], DATA[12:])
    plans = starting_plans(teacher(STEPS), 2)
    best, score = search.best(2, rounds=0)
    few, everything = ([plan for plan, size in search.scored if size == count] for count in (8, 12))
    assert set(few) == set(plans)
    assert len(everything) == max(len(plans) // 4, 4) < len(plans)
    assert set(everything) == set(sorted(plans, key=lambda plan: search.scored[plan, 8])[: len(everything)])
    assert score == search.scored[best, 12] == min(search.scored[plan, 12] for plan in everything)


def test_a_plan_is_scored_once():
    calls = []

    def counted(x, timestep, condition):
        calls.append(len(x))
        return Toy()(x, timestep, condition)

    search = PlanSearch(counted, teacher(STEPS), DATA[:4], DATA[4:8])
    plans = [CallPlan((0, 5)), CallPlan((0, 6)), CallPlan((0, 5))]
    scores = search.scores(plans)
    assert scores[0] == scores[2]
    spent = len(calls)
    assert search.scores(plans) == scores
    assert len(calls) == spent == 4  # one call on each of two batches for two plans


def test_a_search_that_is_broken_off_goes_on_from_what_it_has_tried(tmp_path):
    """To the same plan, all calls counted; scores of other trajectories or another ridge are not taken for its own."""

    def search(folder, fitted=DATA[:10], ridge=0.0, pause=lambda: None):
        run, spent = Run(Toy(), None), Evaluations()
        scores = OutputStore(folder, run, teacher(STEPS)).scores(fitted, DATA[12:], ridge, spent)
        counted = Counted(Toy(), spent)
        found = PlanSearch(counted, teacher(STEPS), fitted, DATA[12:], ridge, kept=scores, pause=pause)
        return found, spent

    def stop_after(count):
        calls = iter(range(count))

        def pause():
            if next(calls, None) is None:
                raise Interrupted

        return pause

    whole, all_spent = search(tmp_path / "whole")
    expected = whole.best(4)
    assert all_spent.forward > 0
    for count in (1, 8, 8):  # each goes further than the one before
        broken, _ = search(tmp_path / "broken", pause=stop_after(count + len(list(tmp_path.glob("broken/*")))))
        with pytest.raises(Interrupted):
            broken.best(4)
    rest, spent = search(tmp_path / "broken")
    assert rest.best(4) == expected
    assert all_spent.forward <= spent.forward < 1.3 * all_spent.forward  # the first rows were computed again
    for number, path in enumerate(sorted(tmp_path.glob("broken/*.score"))[:3]):
        text = path.read_text()
        path.write_text(("", text[:10], text.replace(text[0], "7", 1))[number])
    damaged, more = search(tmp_path / "broken")
    assert damaged.best(4) == expected
    assert more.forward > all_spent.forward  # those three again
    again, _ = search(tmp_path / "broken")
    again.denoiser = None  # nothing is left to compute
    assert again.best(4) == expected
    for other in (search(tmp_path / "broken", DATA[1:11]), search(tmp_path / "broken", ridge=1e-3)):
        assert all(other[0].kept.load(plan, size) is None for plan, size in whole.scored)


def test_processes_share_the_scores():
    search = PlanSearch(Toy(), teacher(STEPS), DATA[:16], DATA[16:])
    plans = starting_plans(teacher(STEPS), 3)
    parts = []
    for rank in range(2):
        alone = PlanSearch(Toy(), teacher(STEPS), DATA[:16], DATA[16:], rank=rank, world_size=2)
        parts.append(alone.scores(plans))
    assert [sum(pair) for pair in zip(*parts)] == search.scores(plans)
    assert all(0 in pair for pair in zip(*parts))
