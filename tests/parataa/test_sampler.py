import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parataa import ParallelSettings, parallel_sample
from solvers import NoiseSchedule, sample, sample_trace, start_noise
from solvers.named import named_solver, solver_names
from tests.analytic import gaussian_denoiser
from tests.parataa.problems import SHAPE, euler_table, mixing_denoiser, relative

VP, FLOW = NoiseSchedule.linear(beta_end=0.01), NoiseSchedule.flow()  # alpha[0] = 0.08: rounding grows less
EDM = NoiseSchedule.edm(sigma_max=10.0)
NAMED = [(schedule, name) for schedule in (VP, FLOW, EDM) for name in solver_names(schedule)]
IDS = [f"{schedule.kind}-{name}" for schedule, name in NAMED]
SEEDS = [3, 1, 4]
PRECISIONS = [(torch.float32, 1e-7, 1e-5), (torch.float64, 1e-12, 1e-10)]


def compare(schedule, table, dtype, tolerance, **options):
    """(relative difference to the sequential result, stats)."""
    denoiser, noise = mixing_denoiser(schedule), start_noise(SEEDS, SHAPE, dtype)
    condition = torch.tensor([1.0, -1.0, 2.0], dtype=dtype)
    images, stats = parallel_sample(denoiser, table, noise, condition, seeds=SEEDS, tolerance=tolerance, **options)
    assert images.dtype == dtype
    return relative(images, sample(denoiser, table, noise, condition, seeds=SEEDS)), stats


@pytest.mark.parametrize(("schedule", "name"), NAMED, ids=IDS)
@pytest.mark.parametrize("plain", [False, True], ids=["defaults", "plain"])
def test_equals_the_sequential_sampler(schedule, name, plain):
    table = named_solver(f"{name}:14", schedule)
    options = {"memory": 1, "data_std": None} if plain else {}
    for dtype, tolerance, bound in PRECISIONS:
        error, stats = compare(schedule, table, dtype, tolerance, **options)
        assert stats.converged
        assert error < bound
        assert stats.rounds <= table.nfe


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "epsilon"])
def test_equals_the_sequential_sampler_for_every_prediction_type(prediction_type):
    schedule = NoiseSchedule.cosine(prediction_type=prediction_type)
    error, stats = compare(schedule, named_solver("dpmpp:9", schedule), torch.float64, 1e-12, order=4, window=6)
    assert stats.converged
    assert error < 1e-10


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    order=st.integers(1, 9),
    window=st.integers(1, 9),
    memory=st.integers(1, 5),
    data_std=st.sampled_from([None, 0.0, 0.5]),
    safeguard=st.sampled_from([0.5, float("inf")]),
    name=st.sampled_from(["ddim", "dpmpp3m", "sa", "unipc"]),
    early_stop=st.booleans(),
)
def test_any_setting_converges_within_n_rounds(rows, order, window, memory, data_std, safeguard, name, early_stop):
    table = named_solver(f"{name}:{rows}", VP)
    options = {"order": min(order, rows), "window": min(window, rows), "memory": memory, "data_std": data_std}
    error, stats = compare(VP, table, torch.float64, 1e-12, safeguard=safeguard, early_stop=early_stop, **options)
    assert stats.converged
    assert stats.reason in (["finished", "settled"] if early_stop else ["finished"])
    assert stats.rounds <= rows
    assert error < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_window_one_is_the_sequential_sampler(dtype):
    table = named_solver("dpmpp_sde:11", VP)
    error, stats = compare(VP, table, dtype, 1e-3, window=1)
    assert error < 20 * torch.finfo(dtype).eps
    assert stats.rounds == table.nfe
    assert stats.evaluations == table.nfe * len(SEEDS)


def test_a_state_that_is_known_exactly_finishes_in_two_rounds():
    """With the data's own standard deviation the outputs of Gaussian data are foreseen exactly."""
    table = euler_table(VP, 12)
    noise = start_noise(range(2), SHAPE, torch.float64)
    denoiser = gaussian_denoiser(VP, mean=0.3, std=0.6)
    images, stats = parallel_sample(denoiser, table, noise, data_std=0.6, memory=1, tolerance=1e-10)
    assert relative(images, sample(denoiser, table, noise)) < 1e-12
    assert stats.rounds == 2
    assert parallel_sample(denoiser, table, noise, data_std=None, memory=1, tolerance=1e-10)[1].rounds > 5


@pytest.mark.parametrize("window", [6, 40])
def test_the_tolerance_is_about_the_error_for_any_window(window):
    """A looser one costs fewer evaluations, a tighter one more, and the error follows."""
    table, denoiser = euler_table(VP, 40), mixing_denoiser(VP)
    noise = start_noise(range(4), SHAPE, torch.float64)
    expected, evaluations = sample(denoiser, table, noise), []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-5):
        images, stats = parallel_sample(denoiser, table, noise, tolerance=tolerance, window=window)
        assert float((images - expected).norm() / expected.norm()) <= tolerance
        evaluations.append(stats.evaluations)
    assert evaluations == sorted(set(evaluations))


def test_permuting_or_splitting_the_batch_changes_nothing():
    table, denoiser = euler_table(VP, 20, noisy=0.1), mixing_denoiser(VP)
    noise, seeds = start_noise(range(4), SHAPE, torch.float64), [0, 1, 2, 3]
    condition = torch.tensor([0.0, 5.0, -2.0, 1.0], dtype=torch.float64)
    noise = noise * torch.tensor([1.0, 0.1, 2.0, 0.5]).reshape(-1, 1, 1, 1)  # samples that need different windows
    options = {"tolerance": 5e-3, "window": 8}

    def run(index):
        picked = [seeds[i] for i in index]
        return parallel_sample(denoiser, table, noise[index], condition[index], seeds=picked, **options)

    whole, stats = run([0, 1, 2, 3])
    assert len(set(stats.sample_rounds)) > 1
    for index in ([3, 0, 2, 1], [2], [1, 3]):
        images, part = run(index)
        assert torch.allclose(images, whole[index], rtol=0, atol=1e-13)
        assert part.sample_rounds == tuple(stats.sample_rounds[i] for i in index)


def test_settings_may_be_given_as_one_object_by_name_or_both():
    table, denoiser, noise = euler_table(VP, 9), mixing_denoiser(VP), start_noise(range(2), SHAPE)
    named, stats = parallel_sample(denoiser, table, noise, tolerance=1e-6, window=4)
    together = ParallelSettings(tolerance=1e-6, window=4)
    for options in ({"settings": together}, {"settings": replace(together, window=2), "window": 4}):
        images, same = parallel_sample(denoiser, table, noise, **options)
        assert torch.equal(images, named)
        assert same.rounds == stats.rounds
    assert parallel_sample(denoiser, table, noise)[1].rounds < stats.rounds


def test_batch_size_only_splits_the_calls():
    table, denoiser = euler_table(VP, 8), mixing_denoiser(VP)
    noise, sizes = start_noise(range(3), SHAPE, torch.float64), []

    def counting(x, timestep, condition):
        sizes.append(len(x))
        return denoiser(x, timestep, condition)

    whole, stats = parallel_sample(denoiser, table, noise, tolerance=1e-9)
    images, split = parallel_sample(counting, table, noise, tolerance=1e-9, batch_size=5)
    assert torch.allclose(images, whole, rtol=0, atol=1e-13)
    assert max(sizes) == 5
    assert sum(sizes) == split.evaluations == stats.evaluations


def test_noises_may_be_given_as_a_tensor_or_a_function():
    table, denoiser = euler_table(VP, 6, noisy=0.5), mixing_denoiser(VP)
    noise, fresh = start_noise(range(2), SHAPE), torch.randn(6, 2, *SHAPE)
    expected = sample(denoiser, table, noise, step_noise=fresh)
    for step_noise in (fresh, fresh.__getitem__):
        images, _ = parallel_sample(denoiser, table, noise, step_noise=step_noise, tolerance=1e-7)
        assert relative(images, expected) < 1e-5


def test_a_denoiser_that_needs_the_node_gets_it_row_by_row():
    table = euler_table(VP, 5)

    class Needing:
        needs_node = True

        def __call__(self, x, timestep, condition, node):
            alpha, sigma = (torch.as_tensor(value).to(x).reshape(-1, 1, 1, 1) for value in node)
            return torch.tanh(alpha * x) * sigma

    noise = start_noise(range(2), SHAPE, torch.float64)
    images, _ = parallel_sample(Needing(), table, noise, tolerance=1e-12)
    assert relative(images, sample(Needing(), table, noise)) < 1e-10


def test_a_warm_start_saves_rounds_and_changes_nothing():
    table, denoiser = euler_table(VP, 30), mixing_denoiser(VP)
    noise, near = start_noise(range(2), SHAPE, torch.float64), torch.full((2,), 1e-3)
    cold, before = parallel_sample(denoiser, table, noise, near, tolerance=1e-9, early_stop=False, keep_states=True)
    trace = sample_trace(denoiser, table, noise, near)
    assert torch.allclose(before.states, torch.stack(trace.states), rtol=0, atol=1e-7)
    again, same = parallel_sample(denoiser, table, noise, near, tolerance=1e-8, warm_start=before.states)
    assert same.rounds == 1
    assert torch.allclose(again, cold, rtol=0, atol=1e-7)
    other = torch.full((2,), 2e-3)
    images, warm = parallel_sample(denoiser, table, noise, other, tolerance=1e-9, warm_start=before.states)
    assert relative(images, sample(denoiser, table, noise, other)) < 1e-7
    assert warm.rounds < before.rounds


def test_the_callback_sees_every_round_and_the_residuals_are_true():
    table, denoiser = euler_table(VP, 10), mixing_denoiser(VP)
    noise, seen = start_noise([5], SHAPE, torch.float64), []
    images, stats = parallel_sample(
        denoiser, table, noise, tolerance=1e-9, callback=lambda number, image: seen.append((number, image))
    )
    assert [number for number, _ in seen] == list(range(1, stats.rounds + 1))
    assert torch.equal(seen[-1][1], images)
    assert stats.residuals.shape == (stats.rounds, 1)
    copies = noise.expand(10, *SHAPE)
    following = table.state_coef.diagonal().reshape(-1, 1, 1, 1) * copies
    following = following + table.output_coef.diagonal().reshape(-1, 1, 1, 1) * denoiser(copies, table.timesteps)
    first = (following - copies).flatten(1).square().mean(1).sqrt().max()
    assert float(stats.residuals[0, 0]) == pytest.approx(float(first), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"order": 1, "memory": 1, "data_std": None}, {"order": 5}, {"window": 7}])
def test_early_stop_ends_before_all_rows_are_finished(options):
    table, denoiser, tolerance = euler_table(VP, 60), mixing_denoiser(VP), 3e-2
    noise = start_noise(range(2), SHAPE, torch.float64)
    expected = sample(denoiser, table, noise)
    _, full = parallel_sample(denoiser, table, noise, tolerance=tolerance, early_stop=False, **options)
    images, early = parallel_sample(denoiser, table, noise, tolerance=tolerance, **options)
    assert early.converged
    assert early.rounds <= full.rounds
    assert relative(images, expected) < tolerance
    if "window" in options:
        assert early.reason == "settled"
        assert early.rounds < full.rounds


def test_too_few_rounds_warn_and_say_so():
    table, denoiser = euler_table(VP, 10), mixing_denoiser(VP)
    with pytest.warns(UserWarning, match=r"2 of 2 samples did not converge in 2 rounds.*raise max_rounds"):
        images, stats = parallel_sample(denoiser, table, start_noise(range(2), SHAPE), max_rounds=2, tolerance=1e-9)
    assert not stats.converged
    assert stats.reason == "max_rounds"
    assert stats.rounds == 2
    assert bool(images.isfinite().all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parallel_sample(denoiser, table, start_noise(range(2), SHAPE), max_rounds=10)[1].converged


def test_memory_is_bounded_by_window_and_memory():
    """The largest tensors held between rounds do not grow with the table."""
    from parataa.iteration import Iterate
    from parataa.sampler import _Run

    held = []

    def size(iterate: Iterate) -> int:
        tensors = [iterate.states, *(value for kept in iterate.kept for value in kept.values())]
        if iterate.history is not None:
            tensors += [getattr(iterate.history, name) for name in ("states", "residual", "moved", "changed")]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors) // (8 * 18)

    original = _Run.advance

    def advance(self, outputs):
        original(self, outputs)
        held.append(max(size(iterate) for iterate in self.iterates))

    _Run.advance = advance
    try:
        for rows in (20, 40):
            held.clear()
            options = {"window": 6, "memory": 3, "tolerance": 1e-12}
            table = euler_table(VP, rows, noisy=0.3)
            parallel_sample(mixing_denoiser(VP), table, start_noise([0], SHAPE, torch.float64), seeds=[0], **options)
            assert max(held) <= (2 * options["memory"] + 2) * options["window"] + 2
    finally:
        _Run.advance = original
