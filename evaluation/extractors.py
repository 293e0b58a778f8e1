"""Networks that turn images into the features distances are measured in: the shipped classifier, timm, Inception."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from evaluation.classifier import load_classifier
from evaluation.distances import require_finite

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
DEFAULT_EXTRACTOR = CHECKPOINTS / "cifar10-classifier"


class Extractor(nn.Module):
    """Features, and class scores where there are classes, of images in [-1, 1].

    Images are cut off at -1 and 1 and rounded to 8 bit first, as if they had been saved, so that samples and data are
    treated alike.

    Args:
        network: the network that `compute` calls.
        identity: JSON types that, with the preprocessing, determine the features; hashed to `fingerprint`.
        num_features: dimension of the features.
        num_classes: number of class scores, 0 for none.
        image_shape: (channels, height, width) of the images it takes, None where any size of 3 channels goes.
    """

    def __init__(
        self,
        network: nn.Module,
        identity: dict[str, Any],
        num_features: int,
        num_classes: int = 0,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.identity = {"preprocessing": "clamp to [-1, 1], 8 bit", **identity}
        self.num_features, self.num_classes, self.image_shape = num_features, num_classes, image_shape

    @property
    def fingerprint(self) -> str:
        """Hash of everything the features depend on."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it takes images of this (channels, height, width)."""
        return tuple(shape) == self.image_shape if self.image_shape else len(shape) == 3 and shape[0] == 3

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(features (batch, num_features), class scores (batch, num_classes) or None), float32.

        Args:
            images: (batch, channels, height, width) in [-1, 1].
        Raises:
            ValueError: images of another shape, or with values that are not finite.
        """
        if not self.fits(tuple(images.shape[1:])):
            wanted = self.image_shape or "(3, height, width)"
            raise ValueError(
                f"the extractor {self.identity['name']} takes images {wanted}, not {tuple(images.shape[1:])}"
            )
        require_finite(images)
        return self.compute(quantised(images))

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network on quantised images."""
        features = self.network.features(images)
        return features, self.network.head(features)


class TimmExtractor(Extractor):
    """Pooled features of a timm model, at the model's own resolution and normalisation."""

    def __init__(self, name: str) -> None:
        import timm

        try:
            network = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:
            raise ValueError(
                f"timm cannot load {name!r} ({_first_line(error)}): check the name and the network"
            ) from error
        settings = timm.data.resolve_model_data_config(network)
        identity = {
            "name": f"timm:{name}",
            "timm": timm.__version__,
            "size": list(settings["input_size"]),
            "mean": list(settings["mean"]),
            "std": list(settings["std"]),
            "resize": "bicubic, antialiased",
        }
        super().__init__(network, identity, network.num_features)
        self.size = settings["input_size"][1:]
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(settings["std"]).view(3, 1, 1))

    def compute(self, images: Tensor) -> tuple[Tensor, None]:
        """Resize, normalise, pool."""
        resized = interpolate(images, self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.network(((resized + 1) / 2 - self.mean) / self.std).float(), None


class InceptionExtractor(Extractor):
    """The 2048 pooled features and 1008 class scores of the FID Inception v3 of torch-fidelity."""

    def __init__(self) -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except Exception as error:
            raise ValueError(
                f"Inception v3 is not available ({_first_line(error)}): pip install torch-fidelity and download its "
                "weights once, or use the classifier in checkpoints/cifar10-classifier"
            ) from error
        super().__init__(network, {"name": "inception", "weights": "torch-fidelity inception-v3-compat"}, 2048, 1008)

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """torch-fidelity's own resizing, on bytes."""
        features, scores = self.network._torch_fidelity_forward(((images + 1) * 127.5).round().byte())
        return features.float(), scores.float()


def extractor_of(denoiser: Any) -> Path:
    """Folder of the shipped classifier of a model's data, which its name begins with: cifar10's where there is none.

    `fashion-sit` and `fashion-sit-student` are measured by `fashion-classifier`.
    """
    data = str(getattr(denoiser, "name", "")).partition("-")[0]
    folder = CHECKPOINTS / f"{data}-classifier"
    return folder if folder.is_dir() else DEFAULT_EXTRACTOR


def load_extractor(name: str | Path = DEFAULT_EXTRACTOR) -> Extractor:
    """The extractor of a name.

    Args:
        name: folder of a classifier of this project, `timm:NAME` (`timm:vit_large_patch14_dinov2.lvd142m` for
            FD-DINOv2) or `inception`.
    Raises:
        ValueError: nothing of that name, or weights that cannot be loaded.
    """
    if str(name) == "inception":
        return InceptionExtractor()
    if str(name).startswith("timm:"):
        return TimmExtractor(str(name)[5:])
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"no extractor {str(name)!r}: give a classifier's folder, timm:NAME or inception")
    network = load_classifier(folder)
    identity = {"name": folder.resolve().name, "weights": network.weights_sha256}
    sizes = network.config
    return Extractor(network, identity, network.num_features, sizes["num_classes"], (sizes["in_channels"], 32, 32))


def quantised(images: Tensor) -> Tensor:
    """Images cut off at -1 and 1 and rounded to the 256 values of a saved picture, still in [-1, 1]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
