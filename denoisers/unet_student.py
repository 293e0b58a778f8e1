"""Students of SLAM from `UNet2DConditionModel`: gamma goes where LCM's networks are told a guidance scale."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from denoisers.diffusers_models import PromptUNet
from denoisers.pipeline_folder import lcm_scheduler, save_pipeline
from solvers.identity import hash_weights

EMBEDDING_WIDTH = 256


class PromptUNetStudent(PromptUNet):
    """A trainable `UNet2DConditionModel` that is told gamma, see `denoisers.gamma.Student`.

    Args:
        teacher: the denoiser whose weights, size and prompts it starts with.
    Raises:
        ValueError: a teacher with a guidance embedding of its own.
    """

    def __init__(self, teacher: PromptUNet) -> None:
        size, network = teacher.size, student_network(teacher.network)
        super().__init__(network, teacher.scheduler_config, *size.pixels, vae_scale=size.vae_scale, name=teacher.name)
        self.conditions, self.source = teacher.conditions, teacher.source
        self.stored_dtype = teacher.network.dtype
        self.train()

    @property
    def gamma_embedding(self) -> nn.Module:
        """The projection of gamma's sinusoids onto those of the timestep."""
        return self.network.time_embedding.cond_proj

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
        """Write a diffusers folder with LCMScheduler, see `denoisers.gamma.Student` and `save_pipeline`.

        Weights have the teacher's dtype; `training` goes into unet/training.json, and its
        `teacher_points` into the scheduler's config.

        Returns:
            unet/diffusion_pytorch_model.safetensors in `folder`, whose folder `load_denoiser` loads, and its hash.
        """
        named = {name.removeprefix("network."): value.to(self.stored_dtype) for name, value in weights.items()}
        with torch.device("meta"):
            network: Any = UNet2DConditionModel(**arguments(self.network))
        network.load_state_dict(named, assign=True)
        path = save_pipeline(
            network,
            folder,
            lcm_scheduler(self.scheduler_config, training.get("teacher_points", 50)),
            self.source,
            {"training.json": json.dumps(training, indent=2) + "\n"},
        )
        return path, hash_weights(named)


def student_network(network: Any) -> Any:
    """A float32 copy, on the same device, with a guidance embedding whose projection is zero.

    Raises:
        ValueError: the network has a guidance embedding already.
    """
    width = network.config.time_cond_proj_dim
    if width is not None:
        raise ValueError(
            f"the network has a guidance embedding already (time_cond_proj_dim {width}), as LCM and SLAM students do: "
            "distil the model that it was made from"
        )
    student: Any = UNet2DConditionModel(**(arguments(network) | {"time_cond_proj_dim": EMBEDDING_WIDTH}))
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    student.load_state_dict(network.state_dict(), strict=False)
    return student.to(network.device)


def arguments(network: Any) -> Any:
    """Arguments of the constructor; diffusers' config also holds notes to itself."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}
