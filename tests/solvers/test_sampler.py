"""The sampling loop: against its formula, batches, liveness, gradients, precision, noise, traces, errors."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from solvers import NoiseSchedule, SolverTable, ipndm, row_noise, sample, sample_trace, start_noise

SHAPE = (2, 3)


def network(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    shift = 0.0 if condition is None else condition.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(1.3 * x + torch.sin(timestep / 100) + shift)


def random_table(nfe: int, seed: int, density: float = 0.6, noisy: bool = True) -> SolverTable:
    """A table with entries and gaps at random places."""
    generator = torch.Generator().manual_seed(seed)

    def block(scale: float) -> Tensor:
        values = torch.randn(nfe, nfe, generator=generator, dtype=torch.float64).tril()
        return scale * values * (torch.rand(nfe, nfe, generator=generator) < density)

    return SolverTable(
        timesteps=torch.linspace(900, 0, nfe, dtype=torch.float64),
        alpha=torch.ones(nfe + 1, dtype=torch.float64),
        sigma=torch.ones(nfe + 1, dtype=torch.float64),
        state_coef=block(0.6),
        output_coef=block(0.8),
        noise_coef=block(0.3 if noisy else 0.0),
        start_scale=1.7,
        prediction_type="epsilon",
    )


def plain(table: SolverTable, noise: Tensor, condition: Tensor | None, fresh: Tensor) -> tuple[list, list]:
    """The formula, with every state, output and noise kept and every coefficient used."""
    states, outputs = [table.start_scale * noise], []
    for i in range(table.nfe):
        outputs.append(network(states[i], table.timesteps[i], condition))
        blocks = zip((table.state_coef[i], table.output_coef[i], table.noise_coef[i]), (states, outputs, fresh))
        states.append(sum(coef[j] * values[j] for coef, values in blocks for j in range(i + 1)))
    return states, outputs


tables = st.builds(random_table, st.integers(1, 6), st.integers(0, 1000), st.sampled_from([0.2, 0.6, 1.0]))


@settings(deadline=None, max_examples=30)
@given(table=tables)
def test_any_table_is_run_as_its_formula_says(table):
    noise = start_noise([1, 2, 3], SHAPE, torch.float64)
    fresh = torch.randn(table.nfe, 3, *SHAPE, dtype=torch.float64)
    condition = torch.tensor([0.1, -0.4, 2.0], dtype=torch.float64)
    states, outputs = plain(table, noise, condition, fresh)
    trace = sample_trace(network, table, noise, condition, step_noise=fresh)
    assert len(trace.states) == table.nfe + 1
    assert len(trace.outputs) == table.nfe
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(trace.states, states))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(trace.outputs, outputs))
    assert torch.allclose(sample(network, table, noise, condition, step_noise=fresh), states[-1], atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(table=tables)
def test_liveness_never_changes_a_result(table):
    """Forgetting what no row uses, remembering everything and declaring everything used agree bit for bit."""
    noise = start_noise([5, 6], SHAPE, torch.float64)
    everything = torch.ones(table.nfe, table.nfe, dtype=torch.bool).tril()
    dense = replace(table, state_support=everything, output_support=everything)
    kept = sample(network, table, noise, seeds=[5, 6])
    assert torch.equal(kept, sample_trace(network, table, noise, seeds=[5, 6]).states[-1])
    assert torch.allclose(kept, sample(network, dense, noise, seeds=[5, 6]), atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(table=tables, split=st.integers(1, 4))
def test_splitting_a_batch_changes_nothing(table, split):
    seeds = [3, 1, 4, 15, 9]
    condition = torch.linspace(-1, 1, 5)
    whole = sample(network, table, start_noise(seeds, SHAPE), condition, seeds=seeds)
    parts = [
        sample(network, table, start_noise(seeds[part], SHAPE), condition[part], seeds=seeds[part])
        for part in (slice(0, split), slice(split, 5))
    ]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), row=st.integers(0, 50))
def test_noise_belongs_to_its_seed_exactly(seeds, row):
    start, fresh = start_noise(seeds, SHAPE), row_noise(seeds, row, SHAPE)
    for k, seed in enumerate(seeds):
        assert torch.equal(start[k : k + 1], start_noise([seed], SHAPE))
        assert torch.equal(fresh[k : k + 1], row_noise([seed], row, SHAPE))
    assert torch.equal(start.double(), start_noise(seeds, SHAPE, torch.float64))


def test_noises_of_seeds_rows_and_starts_differ_and_are_gaussian():
    draws = torch.stack(
        [start_noise([0], (4096,))[0], start_noise([1], (4096,))[0]]
        + [row_noise([seed], row, (4096,))[0] for seed in (0, 1) for row in (0, 1)]
    ).double()
    assert float((torch.corrcoef(draws) - torch.eye(6)).abs().max()) < 0.06
    assert torch.allclose(draws.std(dim=1), torch.ones(6).double(), atol=0.05)


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    row_noise([1], 2, SHAPE)
    sample(network, random_table(3, 0), start_noise([1], SHAPE), seeds=[1])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_seeds_have_a_range(bad):
    with pytest.raises(ValueError, match=f"seed {bad} is outside 0 to 2\\^32 - 1"):
        start_noise([bad], SHAPE)


def test_the_three_ways_to_give_fresh_noise_agree():
    table, noise = random_table(4, 3), start_noise([7, 8], SHAPE, torch.float64)
    given = torch.stack([row_noise([7, 8], row, SHAPE, torch.float64) for row in range(4)])
    images = [
        sample(network, table, noise, seeds=[7, 8]),
        sample(network, table, noise, step_noise=given),
        sample(network, table, noise, step_noise=lambda row: given[row]),
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_missing_or_wrong_noise():
    table, noise = random_table(3, 1), start_noise([1, 2], SHAPE)
    with pytest.raises(ValueError, match="this table has noise columns: pass seeds"):
        sample(network, table, noise)
    with pytest.raises(ValueError, match="3 seeds for a batch of 2: needed is one per sample"):
        sample(network, table, noise, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match=r"step_noise has shape \(2, 2, 2, 3\): needed is \(3, 2, 2, 3\)"):
        sample(network, table, noise, step_noise=torch.zeros(2, 2, *SHAPE))


def test_a_table_without_noise_needs_no_seeds():
    table = random_table(4, 2, noisy=False)
    assert sample(network, table, start_noise([1], SHAPE)).shape == (1, *SHAPE)


def test_gradients_of_coefficients_timesteps_and_noise():
    table = random_table(3, 5, density=1.0)
    noise = start_noise([1, 2], SHAPE, torch.float64)
    fresh = torch.randn(3, 2, *SHAPE, dtype=torch.float64)

    def image(timesteps: Tensor, state: Tensor, output: Tensor, extra: Tensor, start: Tensor) -> Tensor:
        trained = replace(
            table,
            timesteps=timesteps,
            state_coef=state.tril(),
            output_coef=output.tril(),
            noise_coef=extra.tril(),
        )
        return sample(network, trained, start, step_noise=fresh)

    inputs = (table.timesteps, table.state_coef, table.output_coef, table.noise_coef, noise)
    assert torch.autograd.gradcheck(image, tuple(value.clone().requires_grad_() for value in inputs))


def test_a_supported_zero_gets_its_gradient_and_an_unsupported_one_none():
    table = random_table(3, 6, density=1.0, noisy=False)
    output = table.output_coef.clone()
    output[2, 0] = 0
    noise = start_noise([1], SHAPE, torch.float64)

    def slope(support: Tensor | None) -> float:
        leaf = output.clone().requires_grad_()
        sample(network, replace(table, output_coef=leaf, output_support=support), noise).sum().backward()
        return float(leaf.grad[2, 0])

    trace = sample_trace(network, replace(table, output_coef=output, output_support=None), noise)
    assert slope(torch.ones(3, 3, dtype=torch.bool).tril()) == pytest.approx(float(trace.outputs[0].sum()))
    assert slope(None) == 0


def test_forward_derivatives_agree_with_backward_ones():
    table, noise = random_table(3, 7, density=1.0, noisy=False), start_noise([1], SHAPE, torch.float64)

    def image(output_coef: Tensor) -> Tensor:
        return sample(network, replace(table, output_coef=output_coef), noise)

    forward = torch.func.jacfwd(image)(table.output_coef)
    backward = torch.autograd.functional.jacobian(image, table.output_coef)
    lower = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.allclose(forward[..., lower], backward[..., lower])
    with torch.no_grad():
        assert torch.allclose(torch.func.jvp(image, (table.output_coef,), (lower.double(),))[1], forward.sum((-2, -1)))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_conditions_can_be_mapped_over(grad):
    table, noise = random_table(4, 8, noisy=False), start_noise([1, 2], SHAPE, torch.float64)
    conditions = torch.randn(3, 2, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        mapped = torch.func.vmap(lambda condition: sample(network, table, noise, condition))(conditions)
    single = torch.stack([sample(network, table, noise, condition) for condition in conditions])
    assert torch.allclose(mapped, single, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_noise_accumulates_in_float32(dtype):
    table = random_table(5, 9, noisy=False)
    noise = start_noise([1, 2], (64,)).to(dtype)
    seen = []

    def watched(x: Tensor, timestep: Tensor, condition: None) -> Tensor:
        seen.append((x.dtype, timestep.dtype))
        return network(x, timestep, condition).to(dtype)

    image = sample(watched, table, noise)
    assert image.dtype == dtype
    assert set(seen) == {(torch.float32, torch.float32)}
    exact = sample(lambda x, t, c: network(x, t, c).to(dtype).to(x.dtype), table, noise.double())
    rounded_once = torch.finfo(dtype).eps * exact.abs().max()
    assert float((image.double() - exact).abs().max()) < 2 * float(rounded_once)


def test_autocast_runs_the_network_low_and_the_states_high():
    torch.manual_seed(1)
    layer = torch.nn.Linear(16, 16)
    schedule = NoiseSchedule.linear()
    table = ipndm(schedule, torch.linspace(999, 100, 10).round())

    def denoiser(x: Tensor, timestep: Tensor, condition: None) -> Tensor:
        return torch.tanh(layer(x))

    noise = start_noise([1, 2], (16,))
    with torch.no_grad():
        full = sample(denoiser, table, noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = sample_trace(denoiser, table, noise)
    assert all(state.dtype == torch.float32 for state in low.states)
    difference = float((low.states[-1] - full).norm() / full.norm())
    assert 1e-6 < difference < 0.03


def test_float64_noise_is_sampled_in_float64():
    dtypes = set()

    def watched(x: Tensor, timestep: Tensor, condition: None) -> Tensor:
        dtypes.update((x.dtype, timestep.dtype))
        return network(x, timestep, condition)

    image = sample(watched, random_table(3, 1), start_noise([1], SHAPE, torch.float64), seeds=[1])
    assert dtypes == {torch.float64}
    assert image.dtype == torch.float64


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5)])
def test_any_sample_shape(shape):
    table, fresh = random_table(3, 4), torch.zeros(3, 2, *shape, dtype=torch.float64)
    noise = start_noise([1, 2], shape, torch.float64)
    image = sample(network, table, noise, step_noise=fresh)
    flat = sample(network, table, noise.reshape(2, -1), step_noise=fresh.reshape(3, 2, -1))
    assert torch.allclose(image.reshape(2, -1), flat)


def test_callback_sees_every_new_state_in_order():
    table, noise = random_table(4, 2), start_noise([1], SHAPE)
    seen = []
    sample(network, table, noise, seeds=[1], callback=lambda row, state: seen.append((row, state)))
    trace = sample_trace(network, table, noise, seeds=[1])
    assert [row for row, _ in seen] == [0, 1, 2, 3]
    assert all(torch.equal(state, trace.states[row + 1]) for row, state in seen)


def test_a_denoiser_that_asks_is_told_its_node():
    table = replace(random_table(3, 2, noisy=False), alpha=torch.arange(4.0).double())
    told = []

    def denoiser(x: Tensor, timestep: Tensor, condition: None, node: tuple[Tensor, Tensor]) -> Tensor:
        told.append(float(node[0]))
        return x

    denoiser.needs_node = True
    sample(denoiser, table, start_noise([1], SHAPE))
    assert told == [0.0, 1.0, 2.0]


def test_history_is_dropped_as_soon_as_no_row_needs_it():
    """A one-step table keeps one state and one output alive, whatever its length."""
    table = ipndm(NoiseSchedule.linear(), torch.linspace(999, 99, 10), order=1)
    alive, most = weakref.WeakSet(), []

    class Watched(Tensor):
        pass

    def denoiser(x: Tensor, timestep: Tensor, condition: None) -> Tensor:
        most.append(len(alive))
        output = x.as_subclass(Tensor).clone().as_subclass(Watched)
        alive.add(output)
        return output

    with torch.no_grad():
        sample(denoiser, table, start_noise([1], SHAPE))
    assert max(most) <= 1
