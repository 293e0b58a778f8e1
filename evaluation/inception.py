"""The Inception v3 of FID: torchvision's, with the poolings and the input of the TensorFlow network of 2015."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, linear, max_pool2d

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SIZE, CLASSES = 299, 1008


class Inception(nn.Module):
    """2,048 pooled features and 1,008 class scores of images in [-1, 1], the scores without their bias.

    Poolings inside the blocks leave the border out of their means, the last block's takes the maximum, and images are
    resized as TensorFlow 1 does, from their corner and without antialiasing.

    Args:
        weights: file of the weights as torch-fidelity names them; default: downloaded once, and checked by its hash.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        from torchvision.models import inception as parts

        super().__init__()
        blocks = [parts.InceptionA, parts.InceptionB, parts.InceptionC, parts.InceptionD, parts.InceptionE]
        for index in (0, 2, 4):
            blocks[index] = _pooling(blocks[index], _mean)
        known = [parts.BasicConv2d, *blocks, parts.InceptionAux]
        self.body = parts.Inception3(CLASSES, aux_logits=False, inception_blocks=known, init_weights=False)
        self.body.Mixed_7c = _pooling(parts.InceptionE, _maximum)(2048)
        self.body.load_state_dict(_read(weights))
        self.head, self.body.fc = self.body.fc, nn.Identity()
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features (batch, 2048), class scores (batch, 1008)) of images (batch, 3, height, width)."""
        pixels = (images + 1) * 127.5
        features = self.body((_resized(_resized(pixels, 2), 3) - 128) / 128)
        return features, linear(features, self.head.weight)


def _pooling(block: type[nn.Module], pool) -> type[nn.Module]:
    """The block with another pooling before its last branch."""

    class Pooling(block):
        def _forward(self, x: Tensor) -> list[Tensor]:
            return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

    return Pooling


def _mean(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return max_pool2d(x, 3, 1, 1)


def _resized(pixels: Tensor, dim: int) -> Tensor:
    """Linear interpolation along an axis at the places index * length / SIZE."""
    length = pixels.shape[dim]
    places = torch.arange(SIZE, device=pixels.device) * torch.tensor(length / SIZE)
    low = places.long()
    weight = (places - low).view(-1, *[1] * (3 - dim))
    first, second = (pixels.index_select(dim, index) for index in (low, (low + 1).clamp(max=length - 1)))
    return first + (second - first) * weight


def _read(path: str | Path | None) -> dict[str, Tensor]:
    if path is None:
        return torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True)
