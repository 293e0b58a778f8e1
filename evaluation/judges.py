"""Networks that judge an image by itself: LPIPS beside its reference, CLIP score beside its prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.extractors import ClipExtractor, load_extractor, quantised
from solvers.errors import one_line
from solvers.files import sha256

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class Lpips(nn.Module):
    """LPIPS of images and their reference, by torchmetrics; arXiv 1801.03924.

    Args:
        name: `alex`, `vgg` or `squeeze`, whose weights torchvision downloads once, or one of them with `:FILE`, the
            weights as torchvision's file has them.
    Raises:
        ValueError: another name, or weights that cannot be loaded.
    """

    def __init__(self, name: str = "alex") -> None:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        super().__init__()
        backbone, _, file = name.partition(":")
        if backbone not in BACKBONES:
            raise ValueError(f"there is no LPIPS of {backbone!r}: use one of {', '.join(BACKBONES)}, or NAME:FILE")
        try:
            self.network = _NoTrainLpips(net=backbone, pnet_rand=bool(file))
            if file:
                self.network.net.load_state_dict(_features(file, self.network.net))
        except Exception as error:  # of torch, torchvision and the network
            raise ValueError(one_line(f"the weights of LPIPS {name} cannot be loaded: {error}")) from error
        self.identity: dict[str, Any] = {"lpips": backbone} | ({"weights": sha256(file)} if file else {})

    @torch.inference_mode()
    def forward(self, images: Tensor, reference: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """(batch,) of images and their reference in [-1, 1], cut off and rounded to 8 bits; grey ones in colour."""
        device = next(self.network.parameters()).device
        first, second = (quantised(x).expand(-1, 3, -1, -1).to(device) for x in (images, reference))
        return self.network(first, second).flatten()


class ClipScore(nn.Module):
    """100 times the cosine between the CLIP embeddings of images and prompts, none below 0; arXiv 2104.08718.

    Args:
        name: of a CLIP model of the hub, or a folder.
    """

    def __init__(self, name: str = "openai/clip-vit-large-patch14") -> None:
        super().__init__()
        self.extractor: ClipExtractor = load_extractor(f"clip:{name}")
        self.identity = self.extractor.identity

    @torch.inference_mode()
    def forward(self, images: Tensor, reference: Tensor | None, prompts: Sequence[str]) -> Tensor:
        """(batch,) of images in [-1, 1] and their prompts."""
        texts = self.extractor.texts(prompts)
        features, _ = self.extractor(images.to(texts.device))
        return 100 * torch.cosine_similarity(features, texts).clamp_min(0)


def load_judges(
    metrics: Sequence[str] | None, lpips: str, clip: str, device: torch.device | None = None
) -> dict[str, nn.Module]:
    """Those that metrics ask for.

    Args:
        metrics: names; None for the default ones, of which they are none.
        lpips, clip: see the classes.
        device: of the networks.
    """
    kinds = {"lpips": lambda: Lpips(lpips), "clip_score": lambda: ClipScore(clip)}
    return {name: make().to(device) for name, make in kinds.items() if name in (metrics or ())}


def prompts_of(denoiser: Any, seeds: Sequence[int]) -> list[str] | None:
    """The prompt of each seed, as `denoisers.labels.class_labels` chooses it; None where a denoiser has none."""
    options = getattr(getattr(denoiser, "source", None), "options", {}) | getattr(denoiser, "settings", {})
    texts = [entry.get("prompt") if isinstance(entry, dict) else entry for entry in options.get("prompts") or ()]
    return [texts[seed % len(texts)] for seed in seeds] if texts and all(isinstance(t, str) for t in texts) else None


def _features(file: str | Path, network: nn.Module) -> dict[str, Tensor]:
    """The part of torchvision's weights that LPIPS uses, which has the same order."""
    weights = torch.load(file, map_location="cpu", weights_only=True)
    values = [value for name, value in weights.items() if name.startswith("features.")]
    return dict(zip(network.state_dict(), values, strict=True))
