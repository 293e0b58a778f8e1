"""Small models, solvers and process groups for the evaluation tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.args import CompareArgs
from evaluation.contenders import Contender, Group
from evaluation.distances import FrechetTo, Gaussian, KernelTo
from evaluation.extractors import Extractor
from evaluation.statistics import DataStatistics
from solvers import NoiseSchedule
from solvers.named import named_solver


class Mixture(nn.Module):
    """Exact denoiser for Gaussians of deviation 0.2 around a few fixed images; counts its evaluations."""

    schedule = NoiseSchedule.linear()
    sample_shape = (3, 8, 8)
    num_classes = 10

    def __init__(self, num_images: int = 20, fail_after: int | None = None, gives_nan: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        coarse = torch.rand(num_images, 3, 2, 2, generator=generator) * 1.6 - 0.8
        self.images = nn.Parameter(nn.functional.interpolate(coarse, scale_factor=4), requires_grad=False)
        self.calls, self.fail_after, self.gives_nan = 0, fail_after, gives_nan

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.fail_after is not None and self.calls >= self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        alpha, sigma = (value.to(x.dtype).reshape(-1, 1) for value in self.schedule.alpha_sigma(timestep.double()))
        variance = sigma**2 + 0.04 * alpha**2
        flat, images = x.flatten(1), self.images.flatten(1)
        distances = (flat[:, None] - alpha[..., None] * images).square().sum(-1)
        data = (-distances / (2 * variance)).softmax(-1) @ images
        data = data + 0.04 * alpha / variance * (flat - alpha * data)
        return ((flat - alpha * data) / sigma).view_as(x) * (float("nan") if self.gives_nan else 1)


class Pooled(nn.Module):
    """Features of 3 x 8 x 8 images: their 2 x 2 block means, and two class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)
        generator = torch.Generator().manual_seed(2)
        self.head.weight.data = torch.randn(2, 12, generator=generator)
        self.head.bias.data.zero_()

    def features(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4).flatten(1)


def extractor(name: str = "pooled") -> Extractor:
    return Extractor(Pooled(), {"name": name}, 12, 2, (3, 8, 8))


def statistics(seed: int = 0, count: int = 200) -> DataStatistics:
    features = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) * 0.4
    return DataStatistics(Gaussian.of(features), features, extractor().fingerprint, f"data{seed}", "random")


def spaces(seed: int = 0, count: int = 200) -> list[tuple[Extractor, DataStatistics]]:
    return [(extractor(), statistics(seed, count))]


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    return float(FrechetTo(first)(second.mean[None], second.covariance[None]))


def kernel_distance(first: Tensor, second: Tensor) -> float:
    return KernelTo(second)(first)


def group(denoiser: nn.Module, names: list[str], reference: str = "ddim:12") -> Group:
    def contender(name: str) -> Contender:
        return Contender(name, named_solver(name, denoiser.schedule), denoiser)

    return Group(contender(reference), tuple(contender(name) for name in names))


def compare_args(folder: Path, **options: Any) -> CompareArgs:
    """Of solvers that are loaded already; report and cache in a folder."""
    return CompareArgs(
        "mixture", ["loaded"], **{"output": str(folder / "out"), "cache": str(folder / "cache")} | options
    )


def in_processes(function: Callable[[int], object], number: int, folder: Path) -> list:
    """Results (JSON types) of `function(rank)` in forked gloo processes."""
    folder.mkdir(parents=True)
    torch.multiprocessing.start_processes(_work, (function, number, str(folder)), number, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(number)]


def _work(rank: int, function: Callable[[int], object], number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=number)
    result = function(rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
