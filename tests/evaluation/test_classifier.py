"""The classifier: whitening, files and the shipped one."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import unfold

from evaluation.classifier import Classifier, load_classifier, save_classifier
from evaluation.extractors import CHECKPOINTS, DEFAULT_EXTRACTOR, extractor_of, load_extractor, quantised
from evaluation.statistics import STATISTICS_NAME, load_statistics


def small():
    return Classifier((4, 6, 5), num_classes=3)


def test_the_first_layer_whitens_patches():
    mix = torch.randn(3, 3)
    images = torch.einsum("ij,njhw->nihw", mix, torch.randn(64, 3, 16, 16))
    network = small()
    network.fit_whitening(images)
    outputs = network.whiten(images).transpose(0, 1).flatten(1).double()
    covariance = torch.cov(outputs)
    assert torch.allclose(covariance[:12, :12], torch.eye(12).double(), atol=0.02)
    assert torch.allclose(outputs[12:], -outputs[:12], atol=1e-5)
    assert unfold(images, 2).shape[1] == 12


def test_files_give_the_same_scores_back(tmp_path):
    network = small().eval()
    save_classifier(network, tmp_path, {"accuracy": 0.5})
    loaded = load_classifier(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(loaded(images), network(images), atol=2e-3)
    assert loaded.features(images).shape == (2, 5)
    assert json.loads((tmp_path / "config.json").read_text())["training"] == {"accuracy": 0.5}


def test_a_damaged_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no classifier"):
        load_classifier(tmp_path)
    save_classifier(small(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="differs from the hash"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 7}))
    with pytest.raises(ValueError, match="format_version is 7, this project reads 1"):
        load_classifier(tmp_path)


def test_quantising_gives_the_values_of_saved_pictures():
    saved = torch.arange(256).float() / 127.5 - 1
    assert torch.equal(quantised(saved[None]), saved[None])
    assert torch.equal(quantised(torch.tensor([[-3.0, 3.0, 1 / 300]])), saved[[0, 255, 128]][None])


@pytest.mark.parametrize(
    ("name", "channels", "accuracy", "count", "size"),
    [("cifar10", 3, 0.85, 50000, 4e6), ("fashion", 1, 0.93, 10000, 1e6)],
)
def test_the_shipped_classifiers_are_small_and_have_their_statistics(name, channels, accuracy, count, size):
    folder = CHECKPOINTS / f"{name}-classifier"
    assert sum(path.stat().st_size for path in folder.iterdir()) < size
    extractor = load_extractor(folder)
    assert json.loads((folder / "config.json").read_text())["training"]["val/accuracy"] > accuracy
    statistics = load_statistics(folder / STATISTICS_NAME, extractor)
    assert statistics.gaussian.count == count
    features, scores = extractor(torch.zeros(2, channels, 32, 32))
    assert (features.shape, scores.shape) == ((2, extractor.num_features), (2, 10))
    # The mean of the data's features is inside their spread; noise is far outside.
    noise, _ = extractor(torch.randn(64, channels, 32, 32))
    spread = statistics.gaussian.covariance.diagonal().sum()
    assert float((noise.double().mean(0) - statistics.gaussian.mean).square().sum()) > 0.3 * float(spread)


def test_a_models_name_chooses_the_classifier_of_its_data():
    chosen = {
        name: extractor_of(SimpleNamespace(name=name)).name
        for name in ("fashion-sit", "fashion-sit-student", "cifar10-dit", "my-fashion", "mnist-sit")
    }
    assert chosen == {
        "fashion-sit": "fashion-classifier",
        "fashion-sit-student": "fashion-classifier",
        "cifar10-dit": "cifar10-classifier",
        "my-fashion": "cifar10-classifier",
        "mnist-sit": "cifar10-classifier",
    }
    assert extractor_of(lambda x, timestep, condition: x) == DEFAULT_EXTRACTOR


def test_extractor_errors():
    extractor = load_extractor()
    with pytest.raises(ValueError, match=r"takes images \(3, 32, 32\), not \(3, 16, 16\)"):
        extractor(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="hold NaN or infinity, the first at index 1"):
        extractor(torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), torch.nan)]))
    with pytest.raises(ValueError, match="the extractor nothing cannot be loaded: there is no such folder"):
        load_extractor("nothing")
    with pytest.raises(ValueError, match=r"nothing@blocks\.9 cannot be loaded: there is no such folder"):
        load_extractor("nothing@blocks.9")
    with pytest.raises(ValueError, match=r"cifar10-classifier@blocks\.9 cannot be loaded: .*no attribute `9`"):
        load_extractor(f"{DEFAULT_EXTRACTOR}@blocks.9")
    with pytest.raises(ValueError, match="takes grey images, these have colour"):
        load_extractor(CHECKPOINTS / "fashion-classifier")(torch.rand(1, 3, 32, 32))
