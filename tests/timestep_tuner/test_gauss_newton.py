"""The step of Gauss-Newton from sums over samples."""

import pytest
import torch

from timestep_tuner.gauss_newton import LIMIT, MEMORY, Slopes, towards


def slopes(gradient, curvature) -> Slopes:
    values = [torch.tensor([value], dtype=torch.float64) for value in (1.1, 1.0, gradient, curvature)]
    return Slopes(*values)


def test_the_first_step_goes_to_the_minimum_of_its_batch():
    aim, past = towards(slopes(gradient=0.6, curvature=12.0), 4.0, torch.zeros(1, 2, dtype=torch.float64))
    assert aim.item() == pytest.approx(1.1 - 0.6 / 12)
    assert past.tolist() == [[12.0, 4.0]]


def test_curvature_is_remembered_and_the_gradient_is_not():
    past = torch.tensor([[80.0, 4.0]], dtype=torch.float64)
    aim, new = towards(slopes(gradient=0.6, curvature=12.0), 4.0, past)
    curvature = (MEMORY * 80 + 12) / (MEMORY * 4 + 4)
    assert aim.item() == pytest.approx(1.1 - 0.6 / 4 / curvature)
    assert new.tolist() == [[MEMORY * 80 + 12, MEMORY * 4 + 4]]


def test_steps_are_limited_and_flat_rows_stay():
    none = torch.zeros(1, 2, dtype=torch.float64)
    assert towards(slopes(gradient=-50.0, curvature=1.0), 4.0, none)[0].item() == pytest.approx(1.1 + LIMIT)
    assert towards(slopes(gradient=0.0, curvature=0.0), 4.0, none)[0].item() == 1.1
