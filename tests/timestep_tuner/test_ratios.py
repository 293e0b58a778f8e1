"""The parametrisation: bit-exact at ratio 1, clamped in value but not in gradient."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NoiseSchedule, named_solver
from timestep_tuner.ratios import Ratios

SCHEDULE, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow()
TABLES = {
    "ddim:5": SCHEDULE,
    "ddpm:4": SCHEDULE,
    "dpmpp:6": SCHEDULE,
    "unipc:7": SCHEDULE,
    "ddim@leading:5": SCHEDULE,
    "euler:5": FLOW,
    "heun:5": FLOW,
}


def ratios(name: str = "ddim:4", **options) -> Ratios:
    schedule = TABLES.get(name, SCHEDULE)
    return Ratios(named_solver(name, schedule), (schedule.t_min, schedule.t_max), **options)


@pytest.mark.parametrize("free_last", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_ratio_one_is_the_base_table_bit_for_bit(name, free_last):
    tuned = ratios(name, free_last=free_last)
    ones = tuned.initial()
    assert len(ones) == tuned.base.nfe - (not free_last)
    assert torch.equal(tuned.table(ones).timesteps, tuned.base.timesteps)
    assert torch.equal(tuned.project(ones), ones)


@pytest.mark.parametrize("name", TABLES)
def test_only_timesteps_change(name):
    tuned = ratios(name)
    table = tuned.table(torch.full((tuned.size,), 0.9, dtype=torch.float64))
    for field in fields(table):
        old, new = getattr(tuned.base, field.name), getattr(table, field.name)
        same = torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
        assert same == (field.name != "timesteps"), field.name
    assert torch.equal(table.timesteps[:-1], 0.9 * tuned.base.timesteps[:-1])
    assert table.timesteps[-1] == tuned.base.timesteps[-1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 5), min_size=4, max_size=4))
def test_any_ratio_stays_in_the_trained_range(values):
    tuned = ratios(free_last=True)
    ratio = torch.tensor(values, dtype=torch.float64)
    told = tuned.timesteps(ratio)
    assert torch.equal(told, (ratio * tuned.base.timesteps).clamp(0, 999))
    torch.testing.assert_close(tuned.timesteps(tuned.project(ratio)), told)
    inside = tuned.project(ratio)
    torch.testing.assert_close(inside * tuned.base.timesteps, told, atol=1e-9, rtol=1e-12)


def test_a_ratio_at_its_bound_keeps_its_gradient():
    tuned = ratios()
    ratio = torch.tensor([1.5, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    tuned.timesteps(ratio).sum().backward()
    assert torch.equal(ratio.grad, tuned.base.timesteps[:3])


def test_a_timestep_of_zero_stays():
    base = named_solver("ddim:5", SCHEDULE)
    base = replace(base, timesteps=torch.cat([base.timesteps[:-1], torch.zeros(1, dtype=torch.float64)]))
    tuned = Ratios(base, (0.0, 999.0), free_last=True)
    ratio = torch.full((5,), 7.0, dtype=torch.float64)
    assert tuned.timesteps(ratio)[-1] == 0
    assert tuned.project(ratio)[-1] == 7


def test_refusals():
    with pytest.raises(ValueError, match=r"timesteps \[999.* trained on \[0.0, 500.0\]: start from"):
        Ratios(named_solver("ddim:4", SCHEDULE), (0.0, 500.0))
    with pytest.raises(ValueError, match="the tuner cannot run this solver, which has network calls of its own"):
        Ratios(named_solver("ddim:4", SCHEDULE).guided(2.0), (0.0, 999.0))
    with pytest.raises(ValueError, match="set free_last"):
        ratios("ddim:1")
