"""Clean images or latents in memory, and pairs of them with noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.image_shards import read_shards
from data.shards import Trajectories
from denoisers import check_labels, index_condition
from solvers import start_noise
from solvers.nodes import Nodes

PAIR = Nodes(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64))


def noised(data: Tensor, condition: Any, indices: Sequence[int], seeds: Sequence[int]) -> Trajectories:
    """Samples with the noises of `seeds`, as trajectories of two states."""
    index = torch.tensor(list(indices), dtype=torch.int64)
    noise = start_noise(seeds, data.shape[1:], data.dtype)
    states = torch.stack([noise, data[index]], 1)
    return Trajectories(states, None, index_condition(condition, index), tuple(seeds), PAIR)


def read_images(folder: str, pattern: str, denoiser: Any) -> tuple[Tensor, Any]:
    """Images or latents of shards, (n, *shape), in [-1, 1] where the model's samples are images, and their condition.

    Raises:
        ValueError: no shards, or samples that do not fit the denoiser.
    """
    values, labels = read_shards(folder, pattern, arrays=True)
    data = torch.from_numpy(values)
    if data.dtype == torch.uint8:
        data = data.float() * (2 / 255) - 1
    data = data.float()
    if denoiser.sample_shape[0] == 1 and data.shape[1] == 3 and bool((data == data[:, :1]).all()):
        data = data[:, :1]  # a grey picture is decoded to three equal channels
    check_shape(folder, tuple(data.shape[1:]), denoiser)
    _check_range(folder, data)
    return data, check_labels(denoiser, torch.from_numpy(labels)) if getattr(denoiser, "num_classes", None) else None


def check_shape(folder: str, shape: Sequence[int], denoiser: Any) -> None:
    """ValueError unless samples have the denoiser's shape."""
    if tuple(shape) != tuple(denoiser.sample_shape):
        raise ValueError(
            f"{folder} holds samples of shape {tuple(shape)}, the denoiser takes {tuple(denoiser.sample_shape)}: "
            "give samples of its size"
        )


def _check_range(folder: str, data: Tensor) -> None:
    """Images must fill [-1, 1]; latents only need to be finite, and of the order of 1."""
    low, high = float(data.min()), float(data.max())
    is_image = data.shape[1] in (1, 3)
    fits = -1.001 <= low < 0 < high <= 1.001 if is_image else max(-low, high) < 100
    if not fits:  # also when they are not finite
        allowed = "images lie in [-1, 1], black at -1" if is_image else "latents are finite and of the order of 1"
        raise ValueError(f"{folder} holds values from {low:g} to {high:g}: {allowed}; scale them when writing shards")
