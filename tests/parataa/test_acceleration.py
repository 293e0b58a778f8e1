import torch

from parataa.acceleration import triangular_anderson

ROWS, MEMORY, ELEMENTS, LAMBDA = 5, 2, 7, 1e-2


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def regularized(gram):
    return gram + LAMBDA * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_triangular_anderson_is_its_formula_row_by_row():
    residual, moved, changes = draws(ROWS, ELEMENTS), draws(MEMORY, ROWS, ELEMENTS), draws(MEMORY, ROWS, ELEMENTS + 1)
    changes = changes[..., 1:]
    found = triangular_anderson(residual, moved, changes, LAMBDA)
    for row in range(ROWS):
        seen = changes[:, : row + 1].flatten(1)
        weights = torch.linalg.solve(regularized(seen @ seen.T), seen @ residual[: row + 1].flatten())
        expected = -(weights @ (moved + changes)[:, row])
        assert torch.allclose(found[row], expected, rtol=0, atol=1e-12)


def test_triangular_anderson_never_looks_at_later_rows():
    residual, moved, changes = draws(ROWS, ELEMENTS), draws(MEMORY, ROWS, ELEMENTS), draws(MEMORY, ROWS, ELEMENTS + 2)
    changes = changes[..., 2:].clone()
    whole = triangular_anderson(residual, moved, changes, LAMBDA)
    residual[3:], changes[:, 3:] = 9.0, -4.0
    assert torch.allclose(triangular_anderson(residual, moved, changes, LAMBDA)[:3], whole[:3], rtol=0, atol=1e-13)


def test_triangular_anderson_solves_a_linear_problem_of_few_dimensions():
    """x <- A x + b on one row with as many differences as elements: one accelerated step is exact."""
    matrix, offset = 0.5 * draws(2, 2), draws(2)
    solution = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - matrix, offset)
    points = [draws(2, 1)[:, 0], draws(2, 3)[:, 0], draws(2, 4)[:, 0]]
    residuals = [matrix @ x + offset - x for x in points]
    moved = torch.stack([points[0] - points[1], points[1] - points[2]])[:, None]
    changes = torch.stack([residuals[0] - residuals[1], residuals[1] - residuals[2]])[:, None]
    step = triangular_anderson(residuals[0][None], moved, changes, 1e-14)[0]
    assert torch.allclose(points[0] + residuals[0] + step, solution, rtol=0, atol=1e-9)


def test_rows_without_any_change_take_the_plain_step():
    residual, nothing = draws(ROWS, ELEMENTS), torch.zeros(MEMORY, ROWS, ELEMENTS, dtype=torch.float64)
    assert not triangular_anderson(residual, nothing, nothing, LAMBDA).any()
