"""Intervals are as wide as the scatter of independent repetitions."""

import pytest
import torch

from evaluation.bootstrap import frechet_interval, kernel_interval, resamplings, rmse_interval
from evaluation.distances import FrechetTo, Gaussian, KernelTo
from evaluation.parts import Parts


def draw(seed, n=200, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.1 + 0.1


def test_resamplings_draw_as_many_images_and_repeat():
    counts = resamplings(30, 50)
    assert torch.equal(counts.sum(1), torch.full((50,), 30.0, dtype=torch.float64))
    assert torch.equal(counts, resamplings(30, 50))
    assert not torch.equal(counts[0], counts[1])


def test_the_rmse_interval_is_as_wide_as_the_scatter():
    errors = [draw(seed, 400, 1).square().flatten() for seed in range(60)]
    scatter = torch.stack([values.mean().sqrt() for values in errors]).std()
    low, high = rmse_interval(errors[0], resamplings(400, 200))
    assert low < float(errors[0].mean().sqrt()) < high
    assert (high - low) / 3.92 == pytest.approx(float(scatter), rel=0.3)


def test_the_frechet_interval_is_as_wide_as_the_scatter_and_holds_the_estimate():
    distance = FrechetTo(Gaussian(torch.zeros(4).double(), torch.eye(4).double(), 1000))
    estimates = [Gaussian.of(draw(seed)) for seed in range(60)]
    values = distance(torch.stack([e.mean for e in estimates]), torch.stack([e.covariance for e in estimates]))
    low, high = frechet_interval(Parts.of(draw(0)), distance, resamplings(200, 200))
    assert low < float(values[0]) < high
    assert (high - low) / 3.92 == pytest.approx(float(values.std()), rel=0.35)
    # Twice the mean of the resampled distances less the estimate would be biased: the interval is around the estimate.
    assert (low + high) / 2 == pytest.approx(float(values[0]), rel=0.3)


def test_the_kernel_interval_is_as_wide_as_the_scatter():
    distance = KernelTo(draw(1000, 300) - 0.6)
    values = torch.tensor([distance(draw(seed)) for seed in range(60)])
    low, high = kernel_interval(draw(0), distance, resamplings(200, 200))
    assert low < float(values[0]) < high
    assert (high - low) / 3.92 == pytest.approx(float(values.std()), rel=0.35)


def test_resampled_kernel_distances_are_those_of_the_drawn_images():
    distance = KernelTo(draw(1000, 30), chunk=7)
    features = draw(0, 20)
    whole = torch.ones(1, 20, dtype=torch.float64)
    assert float(distance.resampled(features, whole)[0]) == pytest.approx(distance(features))
    # Images 0 and 1 twice each, 2 once: of the 25 ordered pairs of draws 9 are of an image with itself.
    counts = torch.zeros(1, 20, dtype=torch.float64)
    counts[0, :3] = torch.tensor([2.0, 2.0, 1.0])
    kernel = (features[:3] @ features[:3].T / 4 + 1) ** 3
    pairs = 2 * (4 * kernel[0, 1] + 2 * kernel[0, 2] + 2 * kernel[1, 2]) / 16
    across = ((features[[0, 0, 1, 1, 2]] @ distance.target.T / 4 + 1) ** 3).mean()
    expected = pairs + distance.within - 2 * across
    assert float(distance.resampled(features[:5], counts[:, :5])[0]) == pytest.approx(float(expected))


def test_intervals_leave_out_two_and_a_half_percent_on_either_side():
    squared = torch.arange(1001, dtype=torch.float64)
    low, high = rmse_interval(squared, torch.eye(1001, dtype=torch.float64) * 1001)
    assert (low**2, high**2) == pytest.approx((25, 975))
