"""Metrics do not depend on batches, their order or the number of processes."""

import pytest
import torch

from evaluation import distances
from evaluation.distances import Gaussian
from evaluation.metrics import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall, ReferenceError
from tests.evaluation.helpers import frechet_distance, in_processes, kernel_distance, statistics

FEATURES = torch.randn(48, 12, generator=torch.Generator().manual_seed(3)) * 0.5 + 0.1
DATA = statistics()


def values(parts):
    """All metrics of batches of features."""
    metrics = [FrechetDistance(DATA), KernelDistance(DATA), PrecisionRecall(DATA), InceptionScore(), ReferenceError()]
    for part in parts:
        for metric in metrics[:4]:
            metric.update(part)
        metrics[4].update(part, part * 0.9)
    fd, kid, both, score, error = (metric.compute() for metric in metrics)
    named = {"fd": fd, "kid": kid, "score": score, **both, **error}
    return {name: float(value) for name, value in named.items()}


def test_values_are_those_of_the_functions():
    found = values([FEATURES])
    assert found["fd"] == pytest.approx(frechet_distance(DATA.gaussian, Gaussian.of(FEATURES)), rel=1e-9)
    assert found["kid"] == pytest.approx(kernel_distance(FEATURES, DATA.features), rel=1e-12)
    precision, recall = distances.precision_recall(FEATURES, DATA.manifold)
    assert (found["precision"], found["recall"]) == (precision, recall)
    assert found["score"] == pytest.approx(distances.inception_score(FEATURES), rel=1e-12)
    assert found["rmse"] == pytest.approx(0.1 * float(FEATURES.square().mean().sqrt()), rel=1e-5)
    errors = (0.1 * FEATURES).square().mean(1).sqrt().sort().values
    assert found["median"] == pytest.approx(float(errors[23]), rel=1e-5)
    assert float(errors[-2]) < found["p99"] < found["worst"] == pytest.approx(float(errors[-1]), rel=1e-5)
    assert found["psnr"] == pytest.approx(distances.psnr(found["rmse"]), rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 48])
def test_batch_size_and_order_do_not_matter(size):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    assert values(FEATURES[order].split(size)) == pytest.approx(values([FEATURES]), rel=1e-10)


@pytest.mark.parametrize("number", [2, 3])
def test_the_number_of_processes_does_not_matter(number, tmp_path):
    shares = [FEATURES[rank::number].split(5) for rank in range(number)]
    found = in_processes(lambda rank: values(shares[rank]), number, tmp_path / "work")
    for result in found:
        assert result == pytest.approx(values([FEATURES]), rel=1e-10)


def test_errors():
    metric = FrechetDistance(DATA)
    metric.update(FEATURES[:12])
    with pytest.raises(ValueError, match="12 images are too few"):
        metric.compute()
    broken = FEATURES.clone()
    broken[5, 2] = torch.inf
    for metric in (FrechetDistance(DATA), KernelDistance(DATA), InceptionScore()):
        with pytest.raises(ValueError, match="the first at index 5"):
            metric.update(broken)
    with pytest.raises(ValueError, match="no images were given"):
        KernelDistance(DATA).compute()
    with pytest.raises(ValueError, match="no images were given"):
        ReferenceError().compute()
