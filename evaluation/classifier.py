"""A small image classifier whose pooled features the offline metrics use: 32x32 images, CPU-cheap."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from solvers.files import atomic_write, sha256

FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


class Classifier(nn.Module):
    """A narrow convolutional network: whitened 2x2 patches, three blocks, average pooling, one linear layer.

    Args:
        widths: channels of the three blocks; the last one is the number of features.
        num_classes: classes.
        in_channels: channels of the images.
        layer: the module whose output, averaged over places, distances are measured in; default: the last block.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (32, 128, 128),
        num_classes: int = 10,
        in_channels: int = 3,
        layer: str | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "widths": list(widths),
            "num_classes": num_classes,
            "in_channels": in_channels,
            "layer": layer,
        }
        patches = 8 * in_channels
        self.whiten = nn.Conv2d(in_channels, patches, 2, bias=False).requires_grad_(False)
        inputs = (patches, *widths[:-1])
        self.blocks = nn.Sequential(*(_block(before, after) for before, after in zip(inputs, widths)))
        self.head = nn.Linear(widths[-1], num_classes)

    @property
    def num_features(self) -> int:
        """Dimension of `features`."""
        return self.head.in_features

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (batch, num_features) of images (batch, channels, height, width) in [-1, 1]."""
        patches = functional.gelu(self.whiten(images))
        return self.blocks(patches).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores before the softmax, (batch, num_classes)."""
        return self.head(self.features(images))

    @torch.no_grad()
    def fit_whitening(self, images: Tensor) -> None:
        """Set the first layer to both signs of the whitened principal directions of the images' 2x2 patches."""
        patches = functional.unfold(images, 2).transpose(1, 2).flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        directions = (vectors / (values + 1e-3).sqrt()).T.reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([directions, -directions]))


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(after),
        nn.GELU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.GELU(),
    )


def save_classifier(classifier: Classifier, folder: str | Path, training: dict[str, Any] | None = None) -> None:
    """Write `model.safetensors` (float16) and `config.json`, which also keeps `training` (JSON types)."""
    folder = Path(folder)
    weights = {
        name: value.detach().cpu().half().contiguous() if value.is_floating_point() else value.cpu()
        for name, value in classifier.state_dict().items()
    }
    with atomic_write(folder / WEIGHTS_NAME) as path:
        save_file(weights, path)
    config = {
        "format_version": FORMAT_VERSION,
        "network": classifier.config,
        "weights_sha256": sha256(folder / WEIGHTS_NAME),
        "training": training or {},
    }
    with atomic_write(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def load_classifier(folder: str | Path) -> Classifier:
    """Load a classifier folder in float32 and evaluation mode, without gradients; `.weights_sha256` is its hash.

    Raises:
        ValueError: files missing, damaged, of an unknown version, or weights that do not fit.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not (config_path.is_file() and weights_path.is_file()):
        raise ValueError(f"{folder} is no classifier: it needs {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        config = json.loads(config_path.read_text())
        if config["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {config['format_version']!r}, this project reads {FORMAT_VERSION}")
        if sha256(weights_path) != config["weights_sha256"]:
            raise ValueError(f"{WEIGHTS_NAME} differs from the hash in {CONFIG_NAME}")
        classifier = Classifier(**config["network"])
        classifier.load_state_dict({name: _widen(value) for name, value in load_file(weights_path).items()})
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}; copy the folder again") from error
    classifier.weights_sha256 = config["weights_sha256"]
    return classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
