"""Parts of tiny pipelines that several rows share."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tests.tiny_pipelines import randomise, tiny_pipeline

LENGTH = 8  # tokens of a prompt


def ready(build: Callable[[], Any]) -> Any:
    """A pipeline of a builder: the same weights at every call, none of them zero, evaluation mode, no progress bar."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build()
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                randomise(module.eval().requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts_of(kind: str, **changed: Any) -> dict[str, Any]:
    """Components of a tiny pipeline, some of them changed or added."""
    return {**tiny_pipeline(kind).components, **changed}


def flow(shift: float = 3.0, **config: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of flow models."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def ddim(beta_end: float = 0.012, **config: Any) -> DDIMScheduler:
    """A scheduler of diffusion models that draws no noise."""
    settings = {"beta_start": 0.00085, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    return DDIMScheduler(beta_end=beta_end, clip_sample=False, **settings | config)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Unit noise, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    """(1, channels, size, size) in [0, 1]."""
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(seed))


def embedded(width: int, names: tuple[str, ...] = ("prompt_embeds",), **further: Any) -> list[dict[str, Any]]:
    """Two prompts as embeddings: (1, LENGTH, width) for each name, masks for names of masks; `further` for both."""

    def value(name: str, seed: int) -> Tensor:
        is_mask = "mask" in name
        return torch.ones(1, LENGTH, dtype=torch.bool) if is_mask else noise(1, LENGTH, width, seed=seed)

    return [{name: value(name, 10 * k + place) for place, name in enumerate(names)} | further for k in range(2)]
