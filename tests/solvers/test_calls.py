"""Network calls of a table: guidance as weights, calls left out, branches, errors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from solvers import Call, NoiseSchedule, SolverTable, named_solver, sample, sample_trace, start_noise
from solvers.table_json import table_from_dict, table_to_dict

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 4, 4)


class Network:
    """Depends on the state, the timestep and the condition; counts its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        return torch.tanh(1.3 * x + torch.sin(timestep / 100) + condition.reshape(-1, 1, 1, 1))

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)


def guided_network(scale: float):
    def network(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        inner = Network()
        with_condition, without = inner(x, timestep, condition), inner(x, timestep, torch.zeros_like(condition))
        return without + scale * (with_condition - without)

    return network


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return start_noise([1, 2, 3], SHAPE, dtype), torch.tensor([0.2, -0.5, 1.0], dtype=dtype)


@pytest.mark.parametrize("name", ["ddim:5", "dpmpp:6", "unipc:5", "heun:5"])
@pytest.mark.parametrize("scale", [0.0, 1.5, 7.5])
def test_guided_weights_equal_a_guided_network(name, scale):
    table, (noise, condition) = named_solver(name, SCHEDULE), inputs()
    split = table.guided(scale)
    assert split.nfe == 2 * table.num_rows
    assert split.num_rows == table.num_rows
    wanted = sample(guided_network(scale), table, noise, condition)
    assert torch.allclose(sample(Network(), split, noise, condition), wanted, atol=1e-10)


def test_calls_of_a_row_are_one_batch_and_rows_left_out_make_one_call():
    table, (noise, condition), network = named_solver("ddim:4", SCHEDULE), inputs(), Network()
    split = table.guided(2.0, rows=[0, 2])
    assert split.calls == (
        Call(0), Call(0, "unconditional"), Call(1), Call(2), Call(2, "unconditional"), Call(3),
    )  # fmt: skip
    trace = sample_trace(network, split, noise, condition)
    assert network.batches == [6, 3, 6, 3]
    assert len(trace.outputs) == split.nfe == 6
    by_hand = table.start_scale * noise
    for row in range(4):
        scale = 2.0 if row in (0, 2) else 1.0
        output = guided_network(scale)(by_hand, table.timesteps[row], condition)
        by_hand = table.state_coef[row, row] * by_hand + table.output_coef[row, row] * output
    assert torch.allclose(trace.states[-1], by_hand, atol=1e-12)


def test_a_row_may_make_no_call():
    """The first call left out: state 1 is start noise times a weight."""
    table, (noise, condition) = named_solver("ddim:3", SCHEDULE), inputs()
    keep = [1, 2]
    coef = table.output_coef[:, keep].clone()
    without = replace(table, calls=(Call(1), Call(2)), output_coef=coef, output_support=None)
    network = Network()
    trace = sample_trace(network, without, noise, condition)
    assert network.batches == [3, 3]
    assert torch.allclose(trace.states[1], table.state_coef[0, 0] * table.start_scale * noise)


@pytest.mark.parametrize("name", ["unipc:5", "dpmpp:5"])
@pytest.mark.parametrize(("order", "start"), [(1, 0), (3, 1), (5, 0)])
def test_views_hold_with_calls(name, order, start):
    table, (noise, condition) = named_solver(name, SCHEDULE).guided(2.5, rows=[0, 1, 3]), inputs()
    view = table.local(order, start)
    assert torch.allclose(table.canonical().output, view.canonical().output, rtol=1e-9, atol=1e-9)
    one, two = (sample(Network(), solver, noise, condition) for solver in (table, view))
    assert torch.allclose(one, two, rtol=1e-9, atol=1e-9)


def test_guidance_does_not_move_the_nodes():
    table = named_solver("dpmpp:6", SCHEDULE)
    assert table.guided(4.0).consistency().worst == pytest.approx(table.consistency().worst, abs=1e-12)


def test_unused_calls_are_named_by_column():
    table = named_solver("ddim:3", SCHEDULE).guided(2.0)
    coef = table.output_coef.clone()
    coef[1, 3] = 0
    assert replace(table, output_coef=coef, output_support=None).unused_evaluations() == [3]


def test_calls_round_trip_and_plain_tables_do_not_mention_them():
    plain = named_solver("unipc:4", SCHEDULE)
    assert "calls" not in table_to_dict(plain)
    assert plain.is_plain
    table = plain.guided(2.0, rows=[0, 2])
    again = table_from_dict(table_to_dict(table))
    assert again.calls == table.calls
    assert torch.equal(again.output_coef, table.output_coef)
    assert not again.is_plain


def test_any_branch_that_the_denoiser_names():
    class Weak(Network):
        branches = {"weak": lambda condition: condition / 2}

    table, (noise, condition) = named_solver("ddim:2", SCHEDULE), inputs()
    calls = (Call(0), Call(1), Call(1, "weak"))
    coef = torch.cat([table.output_coef, 0.1 * table.output_coef[:, 1:]], 1)
    weak = replace(table, calls=calls, output_coef=coef, output_support=None)
    image = sample(Weak(), weak, noise, condition)
    first = table.state_coef[0, 0] * table.start_scale * noise
    first = first + table.output_coef[0, 0] * Network()(table.start_scale * noise, table.timesteps[0], condition)
    outputs = [Network()(first, table.timesteps[1], c) for c in (condition, condition / 2)]
    wanted = table.state_coef[1, 1] * first + table.output_coef[1, 1] * (outputs[0] + 0.1 * outputs[1])
    assert torch.allclose(image, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("calls", "match"),
    [
        ((Call(0), Call(5)), "a call is made at row 5: this table has rows 0 to 1"),
        ((Call(1), Call(0)), "calls must come in the order of their rows"),
        ((Call(0), Call(0)), "each branch once a row"),
        ((Call(0), Call(1, "")), "a call has branch ''"),
    ],
)
def test_wrong_calls_are_refused(calls, match):
    table = named_solver("ddim:2", SCHEDULE)
    with pytest.raises(ValueError, match=match):
        replace(table, calls=calls)


def test_a_weight_on_a_later_call_is_refused():
    table = named_solver("ddim:2", SCHEDULE)
    with pytest.raises(ValueError, match="output_coef has entries above the diagonal"):
        replace(table, calls=(Call(1), Call(1, "unconditional")), output_support=None)


def test_branches_the_denoiser_does_not_have():
    table, (noise, condition) = named_solver("ddim:2", SCHEDULE).guided(2.0), inputs()
    with pytest.raises(ValueError, match="the solver calls the branch 'unconditional', function has conditional"):
        sample(guided_network(1.0), table, noise, condition)
    with pytest.raises(ValueError, match="an unconditional call needs a condition beside it"):
        sample(Network(), table, noise)
    with pytest.raises(ValueError, match="this solver is guided already"):
        table.guided(2.0)


def test_a_thresholding_denoiser_is_refused():
    network, (noise, condition) = Network(), inputs()
    network.needs_node = True
    with pytest.raises(ValueError, match="the denoiser thresholds its outputs"):
        sample(network, named_solver("ddim:2", SCHEDULE).guided(2.0), noise, condition)


def test_gradients_flow_to_the_weights_of_calls():
    table, (noise, condition) = named_solver("ddim:2", SCHEDULE).guided(2.0, rows=[0]), inputs()
    coef = table.output_coef.clone().requires_grad_()
    trained = SolverTable(**{**vars_of(table), "output_coef": coef})
    sample(Network(), trained, noise, condition).sum().backward()
    assert bool((coef.grad[table.output_support] != 0).all())


def vars_of(table: SolverTable) -> dict:
    names = ("timesteps", "alpha", "sigma", "state_coef", "output_coef", "noise_coef", "start_scale")
    return {name: getattr(table, name) for name in (*names, "prediction_type", "calls", "space")}


def test_fresh_noises_are_one_a_row_whatever_the_calls():
    table, (noise, condition) = named_solver("ddpm:3", SCHEDULE).guided(2.0), inputs()
    fresh = torch.randn(3, *noise.shape, dtype=torch.float64)
    wanted = sample(guided_network(2.0), named_solver("ddpm:3", SCHEDULE), noise, condition, step_noise=fresh)
    assert torch.allclose(sample(Network(), table, noise, condition, step_noise=fresh), wanted, atol=1e-9)
    with pytest.raises(ValueError, match=r"needed is \(3, 3, 3, 4, 4\)"):
        sample(Network(), table, noise, condition, step_noise=torch.zeros(6, *noise.shape))
