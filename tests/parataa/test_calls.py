"""Tables with several calls a row, or none, and with operator weights: parallel = serial."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parataa import ParallelSettings, parallel_sample
from parataa.equations import Equations
from solvers import Bands, Call, NoiseSchedule, SolverTable, sample, sample_trace, start_noise
from solvers.named import named_solver
from tests.parataa.problems import SHAPE, euler_table, mixing_denoiser, relative

VP = NoiseSchedule.linear(beta_end=0.01)
SEEDS = [3, 1, 4]
CONDITION = torch.tensor([5.0, -8.0, 2.0], dtype=torch.float64)
BANDS = [Bands((), 2), Bands((0.4,), 2), Bands((0.2, 0.4), 2)]


def guidable(schedule=VP):
    denoiser = mixing_denoiser(schedule)
    denoiser.null_condition = torch.zeros_like
    return denoiser


def operators(table: SolverTable, space: Bands, strength: float = 0.05) -> SolverTable:
    """The table with weights that differ by band and mix channels wherever it has one."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name in ("state_coef", "output_coef", "noise_coef"):
        numbers = getattr(table, name)
        change = torch.randn(*numbers.shape, *space.ops, generator=generator, dtype=torch.float64)
        found[name] = space.embed(numbers) + strength * numbers[..., None, None, None] * change
    return replace(table, space=space, state_support=None, output_support=None, **found)


def without_calls(table: SolverTable, dropped: set[Call]) -> SolverTable:
    """The table without some calls; what their outputs weighed goes to the nearest earlier call, or is lost."""
    kept = [k for k, call in enumerate(table.calls) if call not in dropped]
    coef = table.output_coef.clone()
    for k, call in enumerate(table.calls):
        before = [j for j in kept if j < k and table.calls[j].branch == call.branch]
        if call in dropped and before:
            coef[:, before[-1]] += coef[:, k]
    calls = tuple(table.calls[k] for k in kept)
    return replace(table, calls=calls, output_coef=coef[:, kept], output_support=None)


def differences(table: SolverTable, dtype=torch.float64, tolerance=1e-12, **options):
    """(relative difference to the sequential result, stats)."""
    noise = start_noise(SEEDS, SHAPE, dtype)
    arguments = guidable(), table, noise, CONDITION.to(dtype)
    images, stats = parallel_sample(*arguments, seeds=SEEDS, tolerance=tolerance, **options)
    return relative(images, sample(*arguments, seeds=SEEDS)), stats


@pytest.mark.parametrize("name", ["dpmpp3m", "sa", "unipc"])
@pytest.mark.parametrize("options", [{}, {"order": 3, "window": 5}, {"memory": 1, "data_std": None}])
def test_guided_tables_equal_the_sequential_sampler(name, options):
    whole, part = (named_solver(f"{name}:9", VP).guided(1.7, rows) for rows in (None, [0, 1, 6]))
    for table, dtype, tolerance, bound in ((whole, torch.float32, 1e-7, 1e-5), (part, torch.float64, 1e-12, 1e-10)):
        error, stats = differences(table, dtype, tolerance, **options)
        assert stats.converged
        assert stats.rounds <= 9
        assert error < bound


def test_a_row_without_calls_waits_for_nothing():
    table = without_calls(named_solver("dpmpp:9", VP), {Call(0), Call(4)})
    for window in (1, 4, 9):
        error, stats = differences(table, window=window)
        assert stats.converged
        assert error < 1e-10


def test_window_one_makes_the_calls_of_the_sequential_sampler():
    table = named_solver("dpmpp:7", VP).guided(2.0, [1, 2, 5])
    error, stats = differences(table, tolerance=1e-3, window=1)
    assert error < 1e-14
    assert stats.rounds == 7
    assert stats.evaluations == table.nfe * len(SEEDS) == 10 * len(SEEDS)


@pytest.mark.parametrize("space", BANDS, ids=["channels", "two bands", "three bands"])
@pytest.mark.parametrize("name", ["dpmpp3m", "sa"])
def test_operator_tables_equal_the_sequential_sampler(name, space):
    table = operators(named_solver(f"{name}:6", VP).guided(1.4, [0, 3]), space)
    for options in ({}, {"order": 2, "window": 3}, {"memory": 1, "data_std": None}):
        error, stats = differences(table, **options)
        assert stats.converged
        assert stats.rounds <= 6
        assert error < 1e-10
    error, _ = differences(table, torch.float32, 1e-7)
    assert error < 1e-5


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 5),
    order=st.integers(1, 5),
    window=st.integers(1, 5),
    guided=st.sets(st.integers(0, 4)),
    space=st.sampled_from([None, *BANDS]),
    name=st.sampled_from(["ddim", "dpmpp3m", "unipc"]),
)
def test_any_calls_and_weights_converge_within_n_rounds(rows, order, window, guided, space, name):
    table = named_solver(f"{name}:{rows}", VP).guided(1.5, [row for row in guided if row < rows])
    table = table if space is None else operators(table, space)
    error, stats = differences(table, order=min(order, rows), window=min(window, rows))
    assert stats.converged
    assert stats.rounds <= rows
    assert error < 1e-10


def test_all_branches_of_a_round_share_its_batches():
    table, inner, seen = named_solver("ddim:5", VP).guided(1.5, [0, 2]), guidable(), []

    def denoiser(x, timestep, condition):
        seen.append((timestep.tolist(), condition.tolist()))
        return inner(x, timestep, condition)

    denoiser.null_condition = inner.null_condition
    noise = start_noise([0, 1], SHAPE, torch.float64)
    whole, _ = parallel_sample(denoiser, table, noise, CONDITION[:2], max_rounds=5)
    told = table.timesteps[[0, 0, 1, 2, 2, 3, 4]].tolist()
    assert seen[0] == (told * 2, [5.0, 0.0, 5.0, 5.0, 0.0, 5.0, 5.0, -8.0, 0.0, -8.0, -8.0, 0.0, -8.0, -8.0])
    seen.clear()
    split, _ = parallel_sample(denoiser, table, noise, CONDITION[:2], max_rounds=5, batch_size=4)
    assert [len(told) for told, _ in seen[:4]] == [4, 4, 4, 2]
    assert torch.allclose(split, whole, rtol=0, atol=1e-13)


def test_a_window_sees_the_calls_of_its_rows_and_what_they_use_of_the_past():
    table = named_solver("dpmpp:6", VP).guided(1.5, [1, 3, 4])  # calls at rows 0, 1, 1, 2, 3, 3, 4, 4, 5
    rows = Equations(table, ParallelSettings(order=6, window=2), torch.zeros(1, *SHAPE)).at(3)
    assert rows.calls == (4, 5, 6, 7)
    assert rows.seen.tolist() == [0, 0, 1, 1]
    assert rows.columns == ((2, 3, 4), (3, 4, 5, 6, 7), ())


def test_a_slope_changes_the_equations_of_split_calls_but_not_their_solution():
    table = operators(named_solver("dpmpp:5", VP).guided(1.5, [0, 3]), BANDS[1])
    trace = sample_trace(guidable(), table, start_noise(SEEDS, SHAPE, torch.float64), CONDITION)
    states, outputs = (torch.stack(values)[:, 0] for values in (trace.states, trace.outputs))
    for data_std in (None, 0.5):
        equations = Equations(table, ParallelSettings(order=5, window=5, data_std=data_std), states)
        rows, space = equations.at(0), equations.space
        shifted = outputs - rows.slope[:, None, None, None] * states[rows.seen]
        parts = space.split(states[:-1, None]), space.split(shifted[:, None])
        found = space.merge(sum(space.mix(coef, part) for coef, part in zip(rows.reaching, parts)))[:, 0]
        assert torch.allclose(found, states[1:], rtol=1e-9, atol=1e-9)


def test_samples_that_the_weights_do_not_act_on():
    table = operators(euler_table(VP, 3), Bands((0.2,), 3))
    with pytest.raises(ValueError, match=r"matrices of 3 channels, the samples have shape \(2, 3, 3\)"):
        parallel_sample(guidable(), table, start_noise([0], SHAPE), CONDITION[:1])


def test_a_branch_that_the_denoiser_does_not_have():
    table, noise = euler_table(VP, 3).guided(1.5), start_noise([0], SHAPE)
    with pytest.raises(ValueError, match="calls the branch 'unconditional'"):
        parallel_sample(mixing_denoiser(VP), table, noise, CONDITION[:1])
    with pytest.raises(ValueError, match="an unconditional call needs a condition"):
        parallel_sample(guidable(), table, noise)


def test_a_call_that_is_made_in_vain():
    table = named_solver("ddim:4", VP).guided(1.0)  # weight 0 on every unconditional output
    table = replace(table, output_support=None)
    with pytest.raises(ValueError, match=r"outputs of calls \[1, 3, 5, 7\] never reach the final state"):
        parallel_sample(guidable(), table, start_noise([0], SHAPE), CONDITION[:1])
