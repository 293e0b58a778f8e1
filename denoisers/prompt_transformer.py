"""Transformers of text-to-image and text-to-video pipelines as denoisers, and their students of SLAM."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from denoisers.gamma import GammaEmbedder
from denoisers.pipeline_student import PipelineStudent, dtypes

EMBEDDERS = ("timestep_embedder", "time_embedder")  # as diffusers names what all blocks are told of the timestep


class PromptTransformer(PipelineStudent):
    """A transformer conditioned on prompt embeddings; with a `gamma_embedding` it is a student.

    gamma is told beside the timestep, and its embedding vanishes at 1, so a student's network is of the teacher's class
    and goes into the same pipeline. A family says how its network is called, see `denoisers.diffusers_models`.
    """

    component = "transformer"

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the transformer, from the input to the output."""
        stacks = [part for part in self.network.children() if isinstance(part, nn.ModuleList)]
        return [block for stack in stacks for block in stack]

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, gamma: Tensor | None = None) -> Tensor:
        """The network's output at a state, (batch, *sample_shape); gamma (batch,) is for students."""
        with self._told(gamma):
            return super().forward(x, timestep, condition)

    def with_gamma(self) -> Any:
        """A student that starts from these weights, see `denoisers.gamma.Student`."""
        student = copy.copy(self)
        student.__dict__.pop("decode", None)
        network = copy.deepcopy(self.network).float().requires_grad_(True)
        width = timestep_embedder(network).linear_2.out_features
        student._modules = {"network": network, "gamma_embedding": GammaEmbedder(width)}
        nn.init.zeros_(student.gamma_embedding.mlp[2].weight)
        student.stored = dtypes(self.network)
        return student.to(self.network.device).train()

    @contextmanager
    def _told(self, gamma: Tensor | None) -> Iterator[None]:
        """The embedding of gamma is added to that of the timestep."""
        if gamma is None:
            yield
            return

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + self.gamma_embedding(gamma).to(output.dtype)

        hook = timestep_embedder(self.network).register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


def timestep_embedder(network: nn.Module) -> Any:
    """The one module that embeds a transformer's timestep.

    Raises:
        ValueError: there is none, or there are several.
    """
    parts = network.named_modules()
    found = [part for name, part in parts if isinstance(part, TimestepEmbedding) and name.split(".")[-1] in EMBEDDERS]
    if len(found) != 1:
        raise ValueError(
            f"{type(network).__name__} has {len(found)} embeddings of its timestep: a student is told gamma beside the "
            "only one; distil another model, or give its denoiser a method with_gamma (see denoisers/gamma.py)"
        )
    return found[0]
