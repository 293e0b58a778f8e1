"""Metrics: features and a distance, in any number of spaces, parts and processes."""

from typing import get_args

import pytest
import torch

from evaluation import args, distances, parts
from evaluation.bootstrap import frechet_interval, resamplings
from evaluation.distances import Gaussian
from evaluation.evaluate import Figures
from evaluation.metrics import NAMES, choose_metrics
from evaluation.parts import Parts, evenly
from tests.evaluation.helpers import extractor, frechet_distance, in_processes, kernel_distance, spaces, statistics

IMAGES = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
FEATURES, SCORES = extractor()(IMAGES)
DATA = statistics()
ASKED = [name for name in NAMES if name not in ("lpips", "clip_score")]
MEASURE = choose_metrics(ASKED, spaces(), 48, (3, 8, 8))


def values(batches):
    """All figures of batches of images."""
    metric = Figures(MEASURE)
    for batch in batches:
        metric.update(batch, batch * 0.9)
    return {name: float(value) for name, value in metric.compute().items()}


def test_values_are_those_of_the_functions():
    found = values([IMAGES])
    assert found["fd"] == pytest.approx(frechet_distance(DATA.gaussian, Gaussian.of(FEATURES)), rel=1e-9)
    assert found["kid"] == pytest.approx(kernel_distance(FEATURES, DATA.features), rel=1e-12)
    precision, recall = distances.precision_recall(FEATURES, DATA.manifold)
    assert (found["precision"], found["recall"]) == (precision, recall)
    density, coverage = distances.density_coverage(FEATURES, distances.Manifold(DATA.features, 5))
    assert (found["density"], found["coverage"]) == (density, coverage)
    assert found["inception_score"] == pytest.approx(distances.inception_score(SCORES), rel=1e-12)
    assert found["rmse"] == pytest.approx(0.1 * float(IMAGES.square().mean().sqrt()), rel=1e-5)
    errors = (0.1 * IMAGES).square().flatten(1).mean(1).sqrt().sort().values
    assert found["median"] == pytest.approx(float(errors[23]), rel=1e-5)
    assert float(errors[-2]) < found["p99"] < found["worst"] == pytest.approx(float(errors[-1]), rel=1e-5)
    assert found["psnr"] == pytest.approx(distances.psnr(found["rmse"]), rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 48])
def test_batch_size_and_order_do_not_matter(size):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    assert values(IMAGES[order].split(size)) == pytest.approx(values([IMAGES]), rel=1e-5)


@pytest.mark.parametrize("number", [2, 3])
def test_the_number_of_processes_does_not_matter(number, tmp_path):
    shares = [IMAGES[rank::number].split(5) for rank in range(number)]
    found = in_processes(lambda rank: values(shares[rank]), number, tmp_path / "work")
    for result in found:
        assert result == pytest.approx(values([IMAGES]), rel=1e-5)


def test_processes_agree_on_figures_without_classes_and_errors(tmp_path):
    network = extractor()
    network.num_classes = 0
    network.run = lambda images: (network.network.features(images), None)
    measure = choose_metrics(["kid"], [(network, DATA)], 48, (3, 8, 8))

    def measured(rank):
        metric = Figures(measure)
        metric.update(IMAGES[rank::2])
        return {name: float(value) for name, value in metric.compute().items()}

    first, second = in_processes(measured, 2, tmp_path / "work")
    assert first == second == {"kid": pytest.approx(values([IMAGES])["kid"], rel=1e-5)}


def test_every_space_has_figures_of_its_own():
    other = extractor("other")
    other.network.head.weight.data *= 2
    other.register_forward_hook(lambda module, images, output: (output[0] * 2, output[1]))
    measure = choose_metrics(None, [*spaces(), (other, statistics(1))], 48, (3, 8, 8))
    found = measure.figures({name: Parts.of(value) for name, value in measure.values(IMAGES).items()}, 20)
    (single,) = (choose_metrics(None, [(other, statistics(1))], 48, (3, 8, 8)),)
    alone = single.figures({name: Parts.of(value) for name, value in single.values(IMAGES).items()}, 20)
    assert {f"{name}@other" for name in alone if not name.endswith(("_low", "_high"))} < found.keys()
    assert found["fd@other"] == alone["fd"] != found["fd"]
    assert found["fd@other_low"] < found["fd@other"] < found["fd@other_high"]
    assert found["inception_score@other"] != found["inception_score"]


def test_what_is_read_part_by_part_gives_the_same_figures(monkeypatch):
    whole = MEASURE.figures({"features": Parts.of(FEATURES), "scores": Parts.of(SCORES)}, 20)
    monkeypatch.setattr(parts, "PART", 10)
    longest = 0

    def read(rows):
        nonlocal longest
        for block in rows.split(7):
            longest = max(longest, len(block))
            yield block

    split = {
        name: Parts(lambda rows=rows: read(rows), 48) for name, rows in (("features", FEATURES), ("scores", SCORES))
    }
    assert [len(part) for part in split["features"]] == [10, 10, 10, 10, 8]
    assert MEASURE.figures(split, 20) == pytest.approx(whole, rel=1e-9)
    gaussian, expected = Gaussian.of(split["features"]), Gaussian.of(FEATURES)
    assert gaussian.count == 48
    assert torch.allclose(gaussian.covariance, expected.covariance, rtol=1e-12)
    counts = resamplings(48, 20)
    found = frechet_interval(split["features"], DATA.frechet, counts)
    assert found == pytest.approx(frechet_interval(Parts.of(FEATURES), DATA.frechet, counts))
    assert longest == 7


def test_some_rows_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(parts, "PART", 10)
    rows = Parts.of(torch.arange(48))
    assert rows.spread(100).tolist() == list(range(48))
    assert rows.spread(5).tolist() == evenly(48, 5).tolist() == [0, 12, 24, 35, 47]


def test_pairs_are_taken_of_some_images_alone(monkeypatch):
    monkeypatch.setattr("evaluation.metrics.PAIRED", 24)
    some = FEATURES[evenly(48, 24)]
    found = MEASURE.figures({"features": Parts.of(FEATURES), "scores": Parts.of(SCORES)})
    assert found["kid"] == pytest.approx(kernel_distance(some, DATA.features))
    assert found["recall"] == distances.precision_recall(some, DATA.manifold)[1]
    assert found["fd"] == pytest.approx(frechet_distance(DATA.gaussian, Gaussian.of(FEATURES)))


def test_the_command_line_knows_every_metric():
    assert get_args(args.Metric) == NAMES


def test_errors():
    metric = Figures(choose_metrics(None, spaces(), 13, (3, 8, 8)))
    with pytest.raises(ValueError, match="no images were given"):
        metric.compute()
    broken = IMAGES.clone()
    broken[5, 2] = torch.inf
    with pytest.raises(ValueError, match="the first at index 5"):
        metric.update(broken)
    with pytest.raises(ValueError, match=r"lpips was asked for, which `sample\.py compare` and `evaluate` measure"):
        choose_metrics(["lpips"], spaces(), 48, (3, 8, 8))
    with pytest.raises(ValueError, match="fd was asked for: there is no extractor"):
        choose_metrics(["fd"], [], 48, (3, 8, 8))
    with pytest.raises(ValueError, match=r"lpips was asked for: \(4, 8, 8\) are no pictures"):
        choose_metrics(["lpips"], spaces(), 48, (4, 8, 8), {"lpips": torch.nn.Identity()})
    assert choose_metrics(None, [], 48, (3, 8, 8)).notes[0].endswith("because there is no extractor")
