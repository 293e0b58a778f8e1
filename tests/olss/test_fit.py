"""The streaming factor against one-shot least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olss.fit import Factor, solve, warn_if_ill_conditioned
from olss.path import output_columns, state_column
from olss.run import teacher_columns
from tests.olss.toy import teacher, trajectories

STEPS = 20
DATA = trajectories(STEPS)
TEACHER = teacher(STEPS)
COLUMNS = [DATA.states[:, 0], *DATA.outputs.unbind(1), *DATA.states[:, 1:].unbind(1)]
MATRIX = torch.stack([column.reshape(-1) for column in COLUMNS], 1)


def teacher_factor(batches):
    return teacher_columns(TEACHER, batches).factors[0]


def output_column(index):
    return output_columns(index, TEACHER)[0]


def one_shot(basis, target):
    found = torch.linalg.lstsq(MATRIX[:, basis], MATRIX[:, [target]], driver="gelsd", rcond=1e-14)
    return found.solution, (MATRIX[:, basis] @ found.solution - MATRIX[:, [target]]).pow(2).mean().sqrt()


def split(sizes):
    """Batches whose sizes are those asked for, as far as there are samples."""
    start, parts = 0, []
    for size in [*sizes, len(DATA)]:
        parts.append(DATA[start : start + size])
        start += size
    return [part for part in parts if len(part)]


def assert_same(factor, basis, target):
    solution, (coef, error) = solve(factor, basis, [target]), one_shot(basis, target)
    rounding = torch.finfo(torch.float64).eps * float(coef.abs().sum())  # what one bit of the columns changes
    allowed = 1e-10 * float(MATRIX[:, target].pow(2).mean().sqrt()) + rounding
    assert abs(float(solution.error) - float(error)) <= allowed
    if solution.condition < 1e6:
        assert float((solution.coef - coef).abs().max()) <= 1e-8 * max(1, float(coef.abs().max()))
    return solution.condition


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=8), st.data())
def test_any_batch_split_equals_one_shot(sizes, data):
    factor = teacher_factor(split(sizes))
    outputs = data.draw(st.sets(st.integers(0, STEPS - 1), min_size=1, max_size=6))
    target = data.draw(st.integers(1, STEPS))
    assert_same(factor, [0, *map(output_column, sorted(outputs))], state_column(target, TEACHER))


def test_the_cases_include_well_conditioned_ones():
    factor = teacher_factor([DATA])
    conditions = [assert_same(factor, [0, output_column(i)], state_column(STEPS, TEACHER)) for i in range(8, STEPS)]
    assert sum(condition < 1e6 for condition in conditions) >= 8


@pytest.mark.parametrize("cut", [0, 1, 11])
def test_merging_two_processes_equals_one(cut):
    parts = [teacher_factor([DATA[:cut]] if cut else []), teacher_factor([DATA[cut:]])]
    merged = Factor.empty(2 * STEPS + 1)
    merged.merge(torch.stack([part.r for part in parts]), sum(part.num_rows for part in parts))
    whole = teacher_factor([DATA])
    assert merged.num_rows == whole.num_rows == len(MATRIX)
    torch.testing.assert_close(merged.r.T @ merged.r, MATRIX.T @ MATRIX, rtol=1e-12, atol=1e-9)
    assert_same(merged, [0, output_column(9), output_column(17)], state_column(STEPS, TEACHER))


def test_the_factor_does_not_grow():
    factor = Factor.empty(3)
    for _ in range(5):
        factor.add([torch.rand(40, 7) for _ in range(3)])
    assert factor.r.shape == (3, 3)
    assert factor.num_rows == 5 * 280


def test_blocks_longer_than_a_chunk():
    columns = [torch.randn(40_000, dtype=torch.float64) for _ in range(3)]
    factor = Factor.empty(3)
    factor.add(columns)
    matrix = torch.stack(columns, 1)
    torch.testing.assert_close(factor.r.T @ factor.r, matrix.T @ matrix)
    assert bool((factor.r.diagonal() > 0).all())


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, STEPS - 1), min_size=1, max_size=6), st.integers(0, STEPS - 1), st.integers(1, STEPS))
def test_a_further_column_never_raises_the_error(outputs, extra, target):
    factor = teacher_factor([DATA])
    basis = [0, *map(output_column, sorted(outputs))]
    larger = basis if extra in outputs else [*basis, output_column(extra)]
    few, many = (solve(factor, columns, [state_column(target, TEACHER)]).error for columns in (basis, larger))
    assert float(many) <= float(few) + 1e-10


def test_many_targets_at_once():
    factor = teacher_factor([DATA])
    basis, targets = [0, 5, 9], [25, 30, 40]
    together = solve(factor, basis, targets)
    for index, target in enumerate(targets):
        alone = solve(factor, basis, [target])
        torch.testing.assert_close(together.coef[:, index], alone.coef[:, 0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.error[index], alone.error[0])


def test_ridge_solves_the_penalised_problem():
    factor, ridge, basis, target = teacher_factor([DATA]), 1e-3, [0, 8, 15], state_column(STEPS, TEACHER)
    part = MATRIX[:, basis]
    gram = part.T @ part / len(part) + ridge * torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(gram, part.T @ MATRIX[:, target] / len(part))
    solution = solve(factor, basis, [target], ridge)
    torch.testing.assert_close(solution.coef[:, 0], expected, rtol=1e-8, atol=1e-10)
    error = (part @ expected - MATRIX[:, target]).pow(2).mean().sqrt()
    torch.testing.assert_close(solution.error[0], error)
    assert solution.condition < solve(factor, basis, [target]).condition


def test_equal_columns_share_the_weight():
    """Rank-deficient: the solution of least norm, an infinite or huge condition number, and a warning."""
    column, factor = torch.randn(50, dtype=torch.float64), Factor.empty(3)
    factor.add([column, column, 3 * column])
    solution = solve(factor, [0, 1], [2])
    torch.testing.assert_close(solution.coef[:, 0], torch.tensor([1.5, 1.5], dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"row 4: the condition number .* use more trajectories"):
        warn_if_ill_conditioned(solution.condition, 4)
