"""DiT: the diffusion transformer whose parameters are named as in the public DiT and SiT checkpoints."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from denoisers.checkpoint import WEIGHTS_NAME, save_denoiser
from denoisers.gamma import GammaEmbedder, sinusoids
from solvers.schedule import NoiseSchedule

CONVENTIONS = ("scheduler", "sit")


class DiT(nn.Module):
    """A transformer over image patches, conditioned through adaLN-zero on timestep and class.

    It is a denoiser: `model(x, timestep, condition) -> output`, with `.schedule` and `.sample_shape`.

    Args:
        schedule: where a timestep lies, and what an output is.
        input_size: height and width of the image or latent, a multiple of `patch_size`.
        patch_size: height and width of a patch.
        in_channels: channels of the image or latent.
        hidden_size: width of the tokens, a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over `hidden_size`.
        num_classes: number of classes; the label `num_classes` is the null class.
        learn_sigma: the last layer has 2 * in_channels channels, of which only the first half is returned.
        convention: `scheduler`: the network is told the timestep as it is, and its output is what the schedule says.
            `sit`: as in the official SiT code, time 0 is noise, 1 is data and the output is data - noise; timestep
            and output are translated from and to the flow schedule's.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        gamma: a student of SLAM, which also takes gamma; see `denoisers.gamma.Student`.
    Raises:
        ValueError: sizes that do not divide, an unknown convention, or `sit` without a flow schedule.
    Source: arXiv 2212.09748 (adaLN-Zero); arXiv 2401.08740 for the `sit` convention.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        input_size: int = 32,
        patch_size: int = 4,
        in_channels: int = 3,
        hidden_size: int = 256,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
        learn_sigma: bool = False,
        convention: str = "scheduler",
        gradient_checkpointing: bool = False,
        gamma: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, patch_size, hidden_size, num_heads)
        _check_convention(convention, schedule)
        self.schedule, self.convention, self.learn_sigma = schedule, convention, learn_sigma
        self.gradient_checkpointing = gradient_checkpointing
        self.num_classes = num_classes
        self.sample_shape = (in_channels, input_size, input_size)
        self.config = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "convention": convention,
            **({"gamma": True} if gamma else {}),  # absent elsewhere, as in checkpoints from before there were students
        }
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(position_embedding(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        if gamma:
            self.gamma_embedding = GammaEmbedder(hidden_size)
        self._initialize()

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return {name: tuple(value.shape) for name, value in self.state_dict().items()}

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """The network's output at a state.

        Args:
            x: (batch, *sample_shape).
            timestep: float, scalar or (batch,), in the schedule's units, may be fractional.
            condition: class labels, int64 (batch,), `num_classes` for unconditional; None: all unconditional.
            gamma: of a student, (batch,) in [0, 1]; None stands for 1, where its embedding vanishes.
        Returns:
            (batch, *sample_shape), of the schedule's prediction type.
        """
        if self.convention == "sit":
            timestep = 1 - timestep / self.schedule.parameters["timestep_scale"]
        if condition is None:
            condition = torch.full((len(x),), self.num_classes, device=x.device)
        context = self.t_embedder(timestep.expand(len(x))) + self.y_embedder(condition)
        if gamma is not None:
            context = context + self.gamma_embedding(gamma)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = self._run(block, tokens, context)
        output = self._unpatchify(self.final_layer(tokens, context))
        if self.learn_sigma:
            output = output[:, : self.sample_shape[0]]
        return -output if self.convention == "sit" else output

    def null_condition(self, condition: Tensor) -> Tensor:
        """The null class for every sample of `condition`, for classifier-free guidance."""
        return torch.full_like(condition, self.num_classes)

    def with_gamma(self) -> "DiT":
        """A student that starts from these weights, see `denoisers.gamma.Student`; float32, in training mode."""
        student = DiT(self.schedule, **self.config | {"gamma": True})
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith("gamma_embedding")}
        student.load_state_dict(weights, strict=False)
        return student.to(self.pos_embed.device).train()

    def save(self, folder: str | Path, training: dict[str, Any], weights: Mapping[str, Tensor]) -> tuple[Path, str]:
        """Write a checkpoint folder with these weights, see `denoisers.gamma.Student`."""
        digest = save_denoiser(self, folder, training, weights)
        return Path(folder) / WEIGHTS_NAME, digest

    def _run(self, block: nn.Module, tokens: Tensor, context: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, context, use_reentrant=False)
        return block(tokens, context)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, patch * patch * channels) -> (batch, channels, height, width)."""
        side, patch = self.config["input_size"] // self.config["patch_size"], self.config["patch_size"]
        grid = tokens.reshape(len(tokens), side, side, patch, patch, -1)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, side * patch, side * patch)

    def _initialize(self) -> None:
        """Xavier for linear layers, 0.02 for embeddings, zero for everything that gates or ends the network."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, *(self.t_embedder.mlp[i].weight for i in (0, 2))):
            nn.init.normal_(weight, std=0.02)
        for layer in (*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if "gamma" in self.config:
            nn.init.zeros_(self.gamma_embedding.mlp[2].weight)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the context."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = _norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = _norm(hidden_size)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Tokens (batch, tokens, hidden), context (batch, hidden)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(context).unsqueeze(1).chunk(6, dim=-1)
        tokens = tokens + gate1 * self.attn(self.norm1(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """From tokens to the pixels of their patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Tokens (batch, tokens, hidden) -> (batch, tokens, patch * patch * channels)."""
        shift, scale = self.adaLN_modulation(context).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(tokens) * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    """Cosines and sines of the timestep, then an MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        layers = nn.Linear(2 * num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(*layers)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps (batch,), possibly fractional, -> (batch, hidden)."""
        return self.mlp(sinusoids(timestep, self.num_frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of classes whose last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (batch,) -> (batch, hidden)."""
        return self.embedding_table(labels)


def position_embedding(hidden_size: int, side: int) -> Tensor:
    """Sines and cosines of column, then row: (1, side * side, hidden_size), float32."""
    position = torch.arange(side, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angle = position[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1)
    rows, columns = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    return torch.cat([columns, rows], dim=-1).float().unsqueeze(0)


def _norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def _check_sizes(input_size: int, patch_size: int, hidden_size: int, num_heads: int) -> None:
    if input_size % patch_size:
        raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}: change one of them")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")


def _check_convention(convention: str, schedule: NoiseSchedule) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}: use one of {', '.join(CONVENTIONS)}")
    if convention == "sit" and (schedule.kind, schedule.prediction_type) != ("flow", "flow_prediction"):
        found = f"{schedule.kind} with {schedule.prediction_type}"
        raise ValueError(f"convention 'sit' needs a flow schedule with flow_prediction, found {found}")
