"""Data statistics: cached by data, extractor and preprocessing; never mixed up."""

import numpy as np
import pytest
import torch

from data.named import NAMED_SETS
from evaluation.classifier import Classifier, save_classifier
from evaluation.distances import Gaussian
from evaluation.extractors import Extractor, load_extractor
from evaluation.sources import Pictures
from evaluation.statistics import (
    compute_statistics,
    data_hash,
    data_statistics,
    find_statistics,
    load_statistics,
    main,
    save_statistics,
)
from tests.evaluation.helpers import Pooled, extractor

IMAGES = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
PICTURES = Pictures.of(IMAGES)


def test_statistics_are_those_of_the_features():
    found = compute_statistics(PICTURES, extractor())
    features, _ = extractor()(IMAGES.float() / 127.5 - 1)
    expected = Gaussian.of(features)
    assert torch.allclose(found.gaussian.mean, expected.mean, atol=1e-6)
    assert torch.allclose(found.gaussian.covariance, expected.covariance, atol=1e-6)
    assert found.gaussian.count == 50
    assert torch.allclose(found.features, features, atol=1e-3)


def test_progress_counts_pictures(monkeypatch, capsys):
    monkeypatch.setattr("solvers.progress.EVERY", 0.0)
    compute_statistics(PICTURES, extractor())
    assert "data statistics: 50 of 50 pictures, " in capsys.readouterr().err


def test_a_file_gives_the_same_statistics_back(tmp_path):
    found = compute_statistics(Pictures.of(IMAGES, "fifty images"), extractor())
    save_statistics(found, tmp_path / "s.safetensors")
    loaded = load_statistics(tmp_path / "s.safetensors", extractor())
    assert torch.equal(loaded.gaussian.covariance, found.gaussian.covariance)
    assert torch.equal(loaded.features, found.features)
    assert (loaded.description, loaded.fingerprint) == ("fifty images", found.fingerprint)


def test_they_are_computed_once_per_data_and_extractor(tmp_path):
    class Counting(torch.nn.Module):
        calls = 0

        def __call__(self, images):
            Counting.calls += 1
            return extractor()(images)

        fingerprint = extractor().fingerprint

    first = data_statistics(PICTURES, Counting(), tmp_path)
    again = data_statistics(PICTURES, Counting(), tmp_path)
    assert Counting.calls == 1
    assert torch.equal(first.gaussian.mean, again.gaussian.mean)
    changed = IMAGES.clone()
    changed[0, 0, 0, 0] += 1
    data_statistics(Pictures.of(changed), Counting(), tmp_path)
    assert Counting.calls == 2
    data_statistics(PICTURES, extractor("another"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_hash_of_data_sees_values_order_and_shape():
    assert data_hash(PICTURES) == data_hash(Pictures.of(IMAGES.clone()))
    assert data_hash(PICTURES) != data_hash(Pictures.of(IMAGES.flip(0)))
    assert data_hash(PICTURES) != data_hash(Pictures.of(IMAGES.view(50, 3, 4, 16)))


def test_errors(tmp_path):
    path = tmp_path / "s.safetensors"
    save_statistics(compute_statistics(PICTURES, extractor()), path)
    with pytest.raises(ValueError, match="distances between different feature spaces mean nothing"):
        load_statistics(path, extractor("another"))
    with pytest.raises(ValueError, match="no data statistics at"):
        load_statistics(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a file of data statistics"):
        load_statistics(path)
    with pytest.raises(ValueError, match="give uint8 pictures"):
        Pictures.of(IMAGES.float())
    with pytest.raises(ValueError, match="has no pictures"):
        find_statistics(str(tmp_path), extractor())
    assert find_statistics(None, extractor(), tmp_path / "nowhere") is None


def test_the_command_writes_them_beside_a_classifier(tmp_path):
    save_classifier(Classifier((4, 4, 4), in_channels=1), tmp_path / "classifier")
    for part, count in (("train", 9), ("test", 7)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        np.savez(tmp_path / f"mnist-{part}.npz", images=images, labels=np.zeros(count, np.uint8))
    options = ["--extractor", str(tmp_path / "classifier"), "--source", "mnist"]
    for split, count in (("train", 9), ("test", 7)):
        main([str(tmp_path), *options, "--split", split, "--description", f"{split} images"])
        network = load_extractor(tmp_path / "classifier")
        found = find_statistics(None, network, tmp_path / "classifier")
        assert (found.gaussian.count, found.description) == (count, f"{split} images")
    images, _ = NAMED_SETS["mnist"].load(tmp_path, False)
    assert found.data == data_hash(Pictures.of(torch.from_numpy(images)))


class Elsewhere(Extractor):
    """An extractor on a device without values."""

    def forward(self, images):
        assert images.device.type == "meta"
        return torch.ones(len(images), 12), None


def test_images_of_the_data_go_to_the_extractors_device():
    network = Elsewhere(Pooled().to("meta"), {"name": "elsewhere"}, 12)
    found = compute_statistics(Pictures.of(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)), network)
    assert found.gaussian.mean.tolist() == [1.0] * 12
