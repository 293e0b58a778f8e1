"""SolverTable: validation, both views, liveness and diagnostics."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from solvers import NoiseSchedule, SolverTable, named_solver, propagate, sample
from tests.analytic import two_point_denoiser


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flow_table(**changes) -> SolverTable:
    """Two Euler steps of a flow: 1 -> 1/2 -> 0."""
    fields = {
        "timesteps": tensor([1000.0, 500.0]),
        "alpha": tensor([0.0, 0.5, 1.0]),
        "sigma": tensor([1.0, 0.5, 0.0]),
        "state_coef": tensor([[1.0, 0.0], [0.0, 1.0]]),
        "output_coef": tensor([[-0.5, 0.0], [0.0, -0.5]]),
        "noise_coef": torch.zeros(2, 2, dtype=torch.float64),
        "start_scale": 1.0,
        "prediction_type": "flow_prediction",
    }
    return SolverTable(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"timesteps": tensor([])}, r"a table needs \(N,\) with N >= 1"),
        ({"timesteps": tensor([[1.0, 2.0]])}, r"timesteps have shape \(1, 2\)"),
        ({"alpha": tensor([0.0, 1.0])}, r"alpha has shape \(2,\): a table of 2 rows needs \(3,\)"),
        ({"sigma": torch.zeros(3)}, "sigma is torch.float32 on cpu: tables are float64 on the CPU"),
        ({"state_coef": torch.eye(3).double()}, r"state_coef has shape \(3, 3\)"),
        ({"output_coef": tensor([[1.0, 0.1], [0.0, 1.0]])}, "output_coef has entries above the diagonal"),
        ({"noise_coef": tensor([[math.nan, 0.0], [0.0, 0.0]])}, "noise_coef has entries that are not finite"),
        ({"timesteps": tensor([math.inf, 0.0])}, "timesteps has entries that are not finite"),
        ({"start_scale": 0.0}, "start_scale is 0.0: it must be finite and positive"),
        ({"start_scale": math.nan}, "start_scale is nan"),
        ({"prediction_type": "score"}, "unknown prediction type 'score': use one of epsilon"),
        ({"state_support": torch.ones(2, 2, dtype=torch.bool)}, "state_support must be a lower-triangular bool"),
        ({"output_support": torch.eye(2)}, "output_support must be a lower-triangular bool"),
        ({"output_support": torch.zeros(2, 2, dtype=torch.bool)}, "output_coef has entries outside output_support"),
    ],
)
def test_wrong_tables_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        flow_table(**changes)


def test_canonical_by_hand():
    """state 2 = x - o0/2 - o1/2; with a start scale and a noise as well."""
    table = flow_table(
        state_coef=tensor([[3.0, 0.0], [0.5, 2.0]]), noise_coef=tensor([[0.1, 0.0], [0.0, 0.2]]), start_scale=4.0
    )
    canonical = table.canonical()
    assert canonical.start.tolist() == [12.0, 2.0 + 24.0]
    assert canonical.output.tolist() == [[-0.5, 0.0], [-1.0, -0.5]]
    assert torch.allclose(canonical.noise, tensor([[0.1, 0.0], [0.2, 0.2]]))


@pytest.mark.parametrize("name", ["dpmpp:6", "unipc:6", "ddim:6", "ipndm:6", "sa:6"])
@pytest.mark.parametrize(("order", "start"), [(1, 0), (2, 0), (3, 2), (6, 0), (6, 3)])
def test_local_views_are_the_same_solver(name, order, start):
    schedule = NoiseSchedule.linear()
    table = named_solver(name, schedule)
    one, two = table.canonical(), table.local(order, start).canonical()
    for block in ("start", "output", "noise"):
        assert torch.allclose(getattr(one, block), getattr(two, block), rtol=1e-9, atol=1e-9)
    noise = torch.randn(2, 3, dtype=torch.float64)
    fresh = torch.randn(6, 2, 3, dtype=torch.float64)
    denoiser = two_point_denoiser(schedule)
    images = [sample(denoiser, solver, noise, step_noise=fresh) for solver in (table, table.local(order, start))]
    assert torch.allclose(*images, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("order", "start", "states"),
    [(1, 0, [0, 1, 2, 3, 4]), (3, 0, [0, 0, 0, 1, 2]), (5, 0, [0, 0, 0, 0, 0]), (3, 2, [0, 1, 2, 2, 2])],
)
def test_local_order_reaches_back_that_far(order, start, states):
    support = named_solver("ddim:5", NoiseSchedule.linear()).local(order, start).state_support
    assert [row.nonzero().flatten().tolist() for row in support] == [[state] for state in states]


def test_local_refuses_orders_and_starts_outside_the_table():
    with pytest.raises(ValueError, match="order is 3: a table of 2 rows has orders 1 to 2"):
        flow_table().local(3)
    with pytest.raises(ValueError, match="order is 0"):
        flow_table().local(0)
    with pytest.raises(ValueError, match="start is 2: the frozen states of a table of 2 rows are 0 to 1"):
        flow_table().local(1, start=2)


def test_consistency_of_a_table_and_of_a_broken_one():
    assert flow_table().consistency().worst < 1e-15
    broken = flow_table(output_coef=tensor([[-0.5, 0.0], [0.0, -0.4]]))
    consistency = broken.consistency()
    assert consistency.alpha_error.tolist() == pytest.approx([0.0, -0.1])
    assert consistency.sigma_error.tolist() == pytest.approx([0.0, 0.1])


def test_fresh_noise_adds_in_quadrature():
    table = flow_table(noise_coef=tensor([[0.0, 0.0], [0.0, 0.3]]))
    assert table.consistency().sigma_error.tolist() == pytest.approx([0.0, 0.3])
    twice = flow_table(noise_coef=tensor([[0.3, 0.0], [0.0, 0.4]]), output_coef=torch.zeros(2, 2).double())
    assert propagate(twice)[1].tolist() == pytest.approx([1.0, math.hypot(1, 0.3), math.hypot(1, 0.3, 0.4)])


def test_propagate_finds_the_nodes_from_the_first():
    table = named_solver("unipc:7", NoiseSchedule.linear())
    blank = replace(table, alpha=table.alpha[:1].repeat(8), sigma=table.sigma[:1].repeat(8))
    alpha, sigma = propagate(blank)
    assert torch.allclose(alpha, table.alpha, atol=1e-12)
    assert torch.allclose(sigma, table.sigma, atol=1e-12)


def test_amplification_and_rises():
    assert flow_table().noise_amplification() == pytest.approx(math.sqrt(0.5))
    assert flow_table().noise_level_rises() == []
    assert flow_table(alpha=tensor([0.0, 0.5, 0.4]), sigma=tensor([1.0, 0.5, 0.6])).noise_level_rises() == [1]


def test_rounding_is_no_rise():
    """Heun's corrector rows stay at their node."""
    assert named_solver("heun:15", NoiseSchedule.linear(prediction_type="sample")).noise_level_rises() == []


def test_liveness_is_the_support_not_the_value():
    support = torch.ones(2, 2, dtype=torch.bool).tril()
    table = flow_table(output_support=support)
    assert flow_table().last_use() == ([0, 1], [0, 1], [-1, -1])
    assert table.last_use() == ([0, 1], [1, 1], [-1, -1])
    zero = flow_table(output_coef=tensor([[0.0, 0.0], [0.0, -0.5]]))
    assert zero.last_use()[1] == [-1, 1]
    assert zero.unused_evaluations() == [0]
    assert replace(zero, output_support=support).unused_evaluations() == []


def test_detach_keeps_numbers_and_drops_gradients():
    coef = tensor([[-0.5, 0.0], [0.0, -0.5]]).requires_grad_()
    table = flow_table(output_coef=coef)
    assert table.output_coef.requires_grad
    assert not table.detach().output_coef.requires_grad
    assert torch.equal(table.detach().output_coef, coef)
