"""`UNet2DConditionModel` as a denoiser, and its students of SLAM, told gamma where LCM's networks are told a scale."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from denoisers.diffusers_base import PromptDenoiser
from denoisers.pipeline_student import PipelineStudent, arguments, dtypes

EMBEDDING_WIDTH = 256


class PromptUNet(PromptDenoiser):
    """`UNet2DConditionModel`: Stable Diffusion 1.x and 2.x, and XL with its pooled text and size conditions.

    One with LCM's guidance embedding (`time_cond_proj_dim`) is told its guidance scale or, as a student of SLAM, gamma:
    see `gamma_sinusoids`.
    """

    @property
    def condition_widths(self) -> dict[str, int]:
        """Last dimension of every embedding that the network needs."""
        config = self.network.config
        widths = {"encoder_hidden_states": config.cross_attention_dim}
        if config.addition_embed_type == "text_time":
            sizes = 6 * config.addition_time_embed_dim
            widths |= {"text_embeds": config.projection_class_embeddings_input_dim - sizes, "time_ids": 6}
        return widths

    @property
    def upcasts_decoder(self) -> bool:  # type: ignore[override]
        """The pipeline of XL does."""
        return self.network.config.addition_embed_type == "text_time"

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the U-Net, from the input to the output."""
        return [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks]

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, gamma: Tensor | None = None) -> Tensor:
        """The network's output at a state, (batch, *sample_shape); gamma (batch,) is for students; None: the scale."""
        condition, scale = self.scale_of(condition)
        self._check_condition(condition)
        width = self.network.config.time_cond_proj_dim
        if width is not None:
            told = torch.as_tensor(1 - (scale - 1) / 10, dtype=torch.float32, device=x.device)
            gamma = told.expand(len(x)) if gamma is None else gamma
            condition = condition | {"timestep_cond": gamma_sinusoids(gamma, width)}
        return super().forward(x, timestep, condition)

    def evaluate(self, x: Tensor, timestep: Tensor, condition: dict[str, Tensor]) -> Tensor:
        added = {key: value for key, value in condition.items() if key in ("text_embeds", "time_ids")}
        return self.network(
            x,
            timestep,
            condition["encoder_hidden_states"],
            timestep_cond=condition.get("timestep_cond"),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]

    def with_gamma(self) -> Any:
        """A student that starts from these weights, see `denoisers.gamma.Student`."""
        return PromptUNetStudent(self)


class PromptUNetStudent(PromptUNet, PipelineStudent):
    """A trainable `UNet2DConditionModel` that is told gamma, see `denoisers.gamma.Student`.

    Args:
        teacher: the denoiser whose weights, size and prompts it starts with.
    Raises:
        ValueError: a teacher with a guidance embedding of its own.
    """

    component = "unet"

    def __init__(self, teacher: PromptUNet) -> None:
        size, network = teacher.size, student_network(teacher.network)
        super().__init__(network, teacher.scheduler_config, *size.pixels, vae_scale=size.vae_scale, name=teacher.name)
        self.conditions, self.source = teacher.conditions, teacher.source
        self.stored = dtypes(teacher.network)
        self.train()

    @property
    def gamma_embedding(self) -> nn.Module:  # type: ignore[override]
        """The projection of gamma's sinusoids onto those of the timestep."""
        return self.network.time_embedding.cond_proj

    def further_lora(self, weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """What stands for gamma = 1, none where it adds nothing.

        The pipeline's network is not told gamma. At gamma = 1 that adds a constant to the timestep's sinusoids, which
        is a LoRA of the next layer, see `constant_reader`.
        """
        embedding = "network.time_embedding"
        gamma = gamma_sinusoids(torch.ones(1), self.network.config.time_cond_proj_dim)[0]
        constant = weights[f"{embedding}.cond_proj.weight"].float() @ gamma
        if not constant.any():
            return {}
        first = weights[f"{embedding}.linear_1.weight"].float()
        down, up = torch.zeros(rank, first.shape[1]), torch.zeros(first.shape[0], rank)
        down[0], up[:, 0] = constant_reader(self.network), first @ constant
        return {f"{embedding}.linear_1.lora_A.weight": down, f"{embedding}.linear_1.lora_B.weight": up}


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


def constant_reader(network: Any) -> Tensor:
    """Weights of the timestep's sinusoids whose sum is 1 at every timestep, float32, (channels,).

    By least squares over timesteps 0 to 999 (off by 6e-5 for the 320 channels of Stable Diffusion).
    """
    features = network.time_proj(torch.arange(1000)).double().cpu()
    ridge = 1e-6 * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(features.T @ features / len(features) + ridge, features.mean(0)).float()


def gamma_sinusoids(gamma: Tensor, width: int) -> Tensor:
    """What LCM's U-Nets are told of a guidance scale, at index 10 - 10 gamma: (batch,) -> (batch, width).

        sin, cos of 1000 (10 - 10 gamma) 10000^(-i / (width / 2 - 1)),  i < width / 2

    gamma = 1 is index 0, where a diffusers pipeline without guidance is: it embeds guidance_scale - 1.

    Source: `get_guidance_scale_embedding` of diffusers' pipelines; the index is that of SLAM's released student.
    """
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=gamma.device, dtype=torch.float32) / (half - 1))
    angles = 1000 * (10 - 10 * gamma.float())[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
