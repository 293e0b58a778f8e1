"""Tiny random diffusers pipelines, built on the spot: classes and calls of the real ones, a fraction of a second."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

KINDS = ("sd", "sdxl", "dit", "pixart", "sd3", "flux")
FURTHER_KINDS = ("qwen", "wan")
LENGTH = 8  # tokens of a prompt
LENGTHS = dict.fromkeys(("pixart", "sd3", "flux", "wan"), LENGTH) | {"qwen": 232}  # Qwen's stands in a template


def tiny_pipeline(kind: str, seed: int = 0) -> Any:
    """A random pipeline of KINDS or FURTHER_KINDS: float32, on the CPU, in evaluation mode, without progress bars.

    VP pipelines carry a DDIM scheduler without clipping, flow pipelines the Euler one (Flux: dynamic shift).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                randomise(module.eval().requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(kind: str, prompts: list[str], guidance_scale: float, num_inference_steps: int) -> dict[str, Any]:
    """Keyword arguments of a call that ends in latents (DiT: pixels as tensors), in the smallest image size."""
    shared = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    if kind == "qwen":
        shared = {"true_cfg_scale": shared.pop("guidance_scale"), "negative_prompt": [" "] * len(prompts), **shared}
    if kind == "dit":
        return shared | {"class_labels": [len(prompt) % 1000 for prompt in prompts], "output_type": "pt"}
    shared |= {"prompt": prompts, "output_type": "latent", **size(kind), **encoding(kind)}
    if kind == "pixart":
        shared |= {"use_resolution_binning": False, "clean_caption": False}
    return shared


def encoding(kind: str) -> dict[str, Any]:
    """Options of `encode_prompts` that belong to such a call."""
    return {"max_sequence_length": LENGTHS[kind]} if kind in LENGTHS else {}


def size(kind: str) -> dict[str, int]:
    """Options of `from_pipeline` that belong to such a call."""
    return {"height": 16, "width": 16, **({"num_frames": 3} if kind == "wan" else {})}


def tiny_unet(seed: int = 0, in_channels: int = 3, num_class_embeds: int | None = None) -> UNet2DModel:
    """An unconditional (or class-conditional) pixel U-Net of 8x8 images, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=num_class_embeds,
        )
    return unet.eval().requires_grad_(False)


def _sd() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        unet=_unet_2d_condition(cross_attention_dim=16),
        scheduler=_ddim(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    unet = _unet_2d_condition(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=_ddim(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def _dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer, vae=_vae(4), scheduler=_ddim(beta_schedule="linear"))


def _pixart() -> PixArtAlphaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        vae=_vae(4),
        transformer=transformer,
        scheduler=_ddim(beta_schedule="linear"),
    )


def _sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, shift_factor=0.05),
        text_encoder=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(width=32),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux(guidance_embeds: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.05),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


def _wan() -> WanPipeline:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )
    sizes = {"scale_factor_spatial": 2, "scale_factor_temporal": 1}
    return WanPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
        ),
        vae=AutoencoderKLWan(**_video_vae(), **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


def _qwen() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKLQwenImage(**_video_vae()),
        text_encoder=Qwen2_5_VLForConditionalGeneration(_qwen_config()),
        tokenizer=_qwen_tokenizer(),
        transformer=transformer,
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": _sd,
    "sdxl": _sdxl,
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "wan": _wan,
    "qwen": _qwen,
}


def randomise(module: nn.Module) -> None:
    """Fill zero-initialised layers, so that every input has an influence on the output."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)


def _ddim(**config: Any) -> DDIMScheduler:
    ends = {"scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02)}[config["beta_schedule"]]
    return DDIMScheduler(
        beta_start=ends[0],
        beta_end=ends[1],
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        **config,
    )


def _unet_2d_condition(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def _vae(latent_channels: int, **config: Any) -> AutoencoderKL:
    """Halves height and width: 16x16 pixels are 8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )


def _video_vae() -> dict[str, Any]:
    """Halves height and width, and keeps all frames."""
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]}
    return {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        **statistics,
    }


def _qwen_config() -> Qwen2_5_VLConfig:
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 260,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def _clip(kind: type) -> Any:
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=514,
        max_position_embeddings=LENGTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return kind(config)


def _t5(width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(T5Config(d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=64))


@cache
def _clip_tokenizer() -> CLIPTokenizer:
    """One token per byte character, with and without the end-of-word mark."""
    characters = [chr(code) for code in _byte_characters()]
    names = characters + [name + "</w>" for name in characters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({name: index for index, name in enumerate(names)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=LENGTH)


@cache
def _qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per byte character."""
    vocabulary = {chr(code): index for index, code in enumerate(_byte_characters())}
    return Qwen2Tokenizer(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[])


def _byte_characters() -> list[int]:
    """The 256 printable stand-ins of bytes that byte-level vocabularies use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + index for index in range(256 - len(printable))]


@cache
def _t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz "]
    return T5TokenizerFast(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)], extra_ids=0)
