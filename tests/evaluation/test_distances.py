"""Distances against closed forms and against torchmetrics on the same features."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from evaluation.distances import (
    FrechetTo,
    Gaussian,
    KernelTo,
    Manifold,
    density_coverage,
    inception_score,
    precision_recall,
    psnr,
    require_full_rank,
    squared_errors,
)
from tests.evaluation.helpers import frechet_distance, kernel_distance


class AsIs(nn.Module):
    """torchmetrics' feature networks see these 'images' (n, d, 1, 1) and return them as features."""

    num_features = 6

    def forward(self, images):
        return images.flatten(1)


def features(n, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    return torch.randn(n, 6, generator=generator) @ mix * scale + shift


def torchmetrics_value(metric, real, fake):
    metric.update(real[:, :, None, None], real=True)
    metric.update(fake[:, :, None, None], real=False)
    return metric.compute()


def test_frechet_distance_of_commuting_gaussians():
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    first, second = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64) + 0.1
    means = torch.randn(2, 5, dtype=torch.float64)
    gaussians = [Gaussian(m, rotation @ torch.diag(v) @ rotation.T, 100) for m, v in zip(means, (first, second))]
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(*gaussians) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_of_two_dimensional_gaussians_that_do_not_commute():
    # tr sqrt(A B) = sqrt(tr(AB) + 2 sqrt(det(AB))) for 2 x 2 matrices.
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.7, -0.3], [-0.3, 1.9]], dtype=torch.float64)
    product = a @ b
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    expected = 1.0 + float(a.trace() + b.trace()) - 2 * root
    zero, one = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert frechet_distance(Gaussian(zero, a, 9), Gaussian(one, b, 9)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_symmetric_and_zero_to_itself():
    one, two = Gaussian.of(features(50, 0)), Gaussian.of(features(80, 1, 1.3))
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-10)
    assert abs(frechet_distance(one, one)) < 1e-9


def test_frechet_distance_equals_torchmetrics():
    real, fake = features(300, 0), features(200, 1, 1.2, 0.3)
    expected = torchmetrics_value(FrechetInceptionDistance(AsIs(), normalize=True).set_dtype(torch.float64), real, fake)
    assert frechet_distance(Gaussian.of(real), Gaussian.of(fake)) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distances_in_a_batch():
    target, others = Gaussian.of(features(60, 0)), [Gaussian.of(features(40, seed)) for seed in (1, 2)]
    found = FrechetTo(target)(torch.stack([o.mean for o in others]), torch.stack([o.covariance for o in others]))
    assert found.tolist() == pytest.approx([frechet_distance(target, other) for other in others], rel=1e-12)


def test_kernel_distance_equals_its_definition():
    x, y = features(7, 0).double(), features(5, 1, 1.5).double()

    def kernel(a, b):
        return float((a @ b / 6 + 1) ** 3)

    within = [
        sum(kernel(a, b) for a in s for b in s if a is not b) / (len(s) * (len(s) - 1)) for s in (list(x), list(y))
    ]
    across = sum(kernel(a, b) for a in x for b in y) / 35
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)
    assert KernelTo(y, chunk=2)(x) == pytest.approx(kernel_distance(x, y), rel=1e-12)


def test_kernel_distance_has_the_gradient_of_its_differences():
    x, y = features(7, 0).double().requires_grad_(), KernelTo(features(5, 1, 1.5).double(), chunk=3)
    assert float(y.differentiable(x.detach())) == y(x.detach())
    assert torch.autograd.gradcheck(y.differentiable, x)


def test_kernel_distance_equals_torchmetrics():
    real, fake = features(120, 0).double(), features(120, 1, 1.2, 0.3).double()
    metric = KernelInceptionDistance(AsIs(), subsets=1, subset_size=120, normalize=True)
    expected, _ = torchmetrics_value(metric, real, fake)
    assert kernel_distance(real, fake) == pytest.approx(float(expected), rel=1e-6)


def test_inception_score_equals_torchmetrics():
    scores = features(90, 3)
    metric = InceptionScore(AsIs(), splits=1)
    metric.update(scores[:, :, None, None])
    assert inception_score(scores) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_inception_score_of_certain_even_classes_is_their_number():
    assert inception_score(torch.eye(4).repeat(5, 1) * 200) == pytest.approx(4, rel=1e-12)


def test_precision_and_recall_of_points_on_a_line():
    # With the nearest neighbour the real balls have these radii.
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [10.5]])
    generated = torch.tensor([[1.5], [2.9], [5.0], [10.9]])
    radii = Manifold(real, 1).radius.tolist()
    assert radii == [1, 1, 1, 0.5, 0.5]
    # 1.5 and 2.9 lie inside; 5 does not; 10.9 is 0.4 from 10.5.
    assert precision_recall(generated, Manifold(real, 1))[0] == 0.75
    # Generated balls: 1.5 +- 1.4, 2.9 +- 1.4, 5 +- 2.1, 10.9 +- 5.9, which hold 1, 2, 10 and 10.5 but not 0.
    assert precision_recall(generated, Manifold(real, 1))[1] == pytest.approx(0.8)


def test_rmse_and_psnr_equal_torchmetrics():
    images, reference = torch.rand(6, 3, 4, 4) * 2 - 1, torch.rand(6, 3, 4, 4) * 2 - 1
    rmse = float(squared_errors(images, reference).mean().sqrt())
    assert rmse == pytest.approx(float((images - reference).square().mean().sqrt()), rel=1e-6)
    metric = PeakSignalNoiseRatio(data_range=2.0)
    assert psnr(rmse) == pytest.approx(float(metric(images, reference)), rel=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="12 images are too few for a Frechet distance in 12 feature dimensions"):
        require_full_rank(12, 12)
    require_full_rank(13, 12)
    with pytest.raises(ValueError, match="differ in shape"):
        squared_errors(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="1 of 2 reference images hold NaN or infinity, the first at index 1"):
        squared_errors(torch.zeros(2, 1), torch.tensor([[0.0], [float("nan")]]))
    with pytest.raises(ValueError, match="give at least 2"):
        Gaussian.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="undefined"):
        kernel_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="more than 3 images"):
        Manifold(torch.zeros(3, 2))


def test_density_and_coverage_of_points_on_a_line():
    # Real balls, to the second neighbour: 0 +- 2, 1 +- 1, 2 +- 2, 10 +- 8, 10.5 +- 8.5.
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [10.5]])
    assert Manifold(real, 2).radius.tolist() == [2, 1, 2, 8, 8.5]
    # 1.5 lies in the first three; 3 in the third, fourth and fifth; 30 in none.
    density, coverage = density_coverage(torch.tensor([[1.5], [3.0], [30.0]]), Manifold(real, 2))
    assert density == pytest.approx((3 + 3 + 0) / 3 / 2)
    assert coverage == 1
    assert density_coverage(torch.tensor([[1.5]]), Manifold(real, 2))[1] == pytest.approx(3 / 5)
