"""Extractors other than the shipped classifier, without their weights."""

import pytest
import timm
import torch

from evaluation.extractors import TimmExtractor, load_extractor
from tests.evaluation.helpers import extractor as pooled


@pytest.fixture
def random_weights(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))


def test_timm_models_see_images_at_their_size_and_normalisation(random_weights, monkeypatch):
    extractor = TimmExtractor("resnet10t")
    assert (extractor.num_features, extractor.num_classes) == (512, 0)
    seen = []
    monkeypatch.setattr(extractor.network, "forward", lambda images: seen.append(images) or images.mean((2, 3)))
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    features, scores = extractor(images)
    assert scores is None
    settings = timm.data.resolve_model_data_config(extractor.network)
    assert tuple(seen[0].shape[1:]) == tuple(settings["input_size"])
    for feature, level in zip(features, (0.0, 128 / 255, 1.0)):
        expected = [(level - mean) / std for mean, std in zip(settings["mean"], settings["std"])]
        assert feature.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_fingerprint_holds_model_and_preprocessing(random_weights):
    one = TimmExtractor("resnet10t")
    assert one.fingerprint == TimmExtractor("resnet10t").fingerprint
    one.identity["size"] = [3, 64, 64]
    assert one.fingerprint != TimmExtractor("resnet10t").fingerprint


def test_a_model_that_cannot_be_loaded_is_named():
    with pytest.raises(ValueError, match="the extractor timm:no_such_model cannot be loaded"):
        load_extractor("timm:no_such_model")


def test_images_are_measured_as_if_they_had_been_saved():
    network, images = pooled(), torch.linspace(-1.5, 1.5, 192).view(1, 3, 8, 8)
    saved = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(network(images)[0], network.network.features(saved))
    assert not torch.equal(network(images)[0], network.network.features(images.clamp(-1, 1)))
