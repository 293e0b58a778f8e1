"""What students of diffusers networks have in common: they are saved as pipelines, and LoRA files, of the teacher's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from denoisers.diffusers_base import PromptDenoiser
from denoisers.pipeline_folder import save_pipeline
from solvers.files import atomic_write
from solvers.identity import hash_weights


class PipelineStudent(PromptDenoiser):
    """A trainable network of a pipeline, see `denoisers.gamma.Student`; its own weights begin with `network.`."""

    component: str  # of the pipeline
    stored: dict[str, torch.dtype]  # of the teacher's weights
    gamma_embedding: nn.Module

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.network.is_gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        if value:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()

    def save(self, folder: str | Path, training: dict[str, Any], weights: Mapping[str, Tensor]) -> tuple[Path, str]:
        """Write a diffusers folder, see `denoisers.gamma.Student` and `save_pipeline`.

        Weights have the teacher's dtypes; `training` goes into a training.json beside them, and its `teacher_points`
        into the scheduler's config.

        Returns:
            The weights file of the component, whose folder `load_denoiser` loads, and its hash.
        """
        named = self._stored(weights)
        with torch.device("meta"):
            network: Any = type(self.network)(**arguments(self.network))
        network.load_state_dict(named, assign=True)
        texts = {"training.json": json.dumps(training, indent=2) + "\n"}
        points = training.get("teacher_points", 50)
        path = save_pipeline(network, self.component, folder, self.scheduler_config, points, self.source, texts)
        return path, hash_weights(named)

    def save_lora(self, file: str | Path, adapters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Write what was learned as a LoRA of the teacher's pipeline, for `pipe.load_lora_weights(folder)`.

        Nothing where diffusers loads no LoRA into the network.

        Args:
            file: the .safetensors file.
            adapters: layer.lora_A.weight (rank, inputs) and layer.lora_B.weight (outputs, rank), at scale 1.
            weights: all weights of the student, as for `save`.
        """
        if not isinstance(self.network, PeftAdapterMixin):
            return
        named = self._stored({**adapters, **self.further_lora(weights, rank=len(next(iter(adapters.values()))))})
        with atomic_write(file) as temporary:
            prefixed = {f"{self.component}.{name}": value.contiguous() for name, value in named.items()}
            save_file(prefixed, temporary, {"format": "pt"})

    def further_lora(self, weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Factors, all of one rank, that stand for what is not in the adapters."""
        return {}

    def _stored(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's weights as they are written."""
        plain = {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}
        return {name: value.to(self.stored.get(name, self.network_dtype)) for name, value in plain.items()}

    @property
    def network_dtype(self) -> torch.dtype:
        """What most of the teacher's weights have."""
        dtypes = list(self.stored.values())
        return max(set(dtypes), key=dtypes.count)


def arguments(network: Any) -> Any:
    """Arguments of the constructor; diffusers' config also holds notes to itself."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def dtypes(network: nn.Module) -> dict[str, torch.dtype]:
    """The number format of each weight."""
    return {name: value.dtype for name, value in network.state_dict().items()}
