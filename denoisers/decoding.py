"""Latents to pictures and back, as the pipelines of an autoencoder do it.

    latents = (z - shift_factor) * scaling_factor,    or, with its latents_mean and latents_std,
    latents = (z - latents_mean) * scaling_factor / latents_std,  scaling_factor 1 where there is none,

where z is what the autoencoder itself encodes to and decodes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def to_latents(encoded: Tensor, config: Any) -> Tensor:
    """What an autoencoder encodes to, (batch, channels, ...), as the network takes it."""
    mean, factor = _statistics(encoded, config)
    return (encoded - mean) * factor


def from_latents(latents: Tensor, config: Any) -> Tensor:
    """Inverse of `to_latents`."""
    mean, factor = _statistics(latents, config)
    return latents / factor + mean


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor, upcast: bool = False) -> Tensor:
    """Pictures or videos in [-1, 1], one at a time for memory.

    Args:
        autoencoder: with `enable_tiling`, it decodes large pictures tile by tile.
        latents: (batch, channels, height, width), of videos with frames before the height, as the network gives them.
        upcast: decode in float32 where the autoencoder is in float16 and its config asks for it (`force_upcast`).
    """
    with _in_float32(autoencoder, upcast):
        encoded = from_latents(latents.to(autoencoder.device, autoencoder.dtype), autoencoder.config)
        images = [autoencoder.decode(one, return_dict=False)[0] for one in encoded.split(1)]
    return torch.cat(images).to(latents.device, latents.dtype)


def _statistics(like: Tensor, config: Any) -> tuple[Tensor | float, Tensor | float]:
    """(mean, factor) with latents = (z - mean) * factor."""
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    factor = getattr(config, "scaling_factor", 1.0)
    if mean is None or deviation is None:
        return getattr(config, "shift_factor", None) or 0.0, factor
    mean, deviation = (like.new_tensor(values).reshape(-1, *[1] * (like.ndim - 2)) for values in (mean, deviation))
    return mean, factor / deviation


@contextmanager
def _in_float32(autoencoder: nn.Module, upcast: bool) -> Iterator[None]:
    """float16 weights as float32 for a while: activations of some autoencoders leave the range of float16."""
    config: Any = autoencoder.config
    if not (upcast and config.force_upcast and autoencoder.dtype == torch.float16):
        yield
        return
    autoencoder.float()
    try:
        yield
    finally:
        autoencoder.half()
