"""Tiny pipelines of the rows, as small as they build."""

from typing import Any

import diffusers
import torch
from diffusers import LCMScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3Model,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from tests.bridge.parts import LENGTH, ddim, flow, parts_of
from tests.tiny_pipelines import tiny_pipeline


def of(name: str, **components: Any) -> Any:
    """A pipeline of diffusers, by its class's name."""
    return getattr(diffusers, name)(**components)


def bare(name: str, network: Any, *, absent: str = "vae text_encoder tokenizer", **components: Any) -> Any:
    """A pipeline of a transformer and a scheduler, called with embeddings; what is `absent` is None."""
    nothing = dict.fromkeys(absent.split())
    return of(name, **nothing | {"transformer": network, "scheduler": flow()} | components)


def sd(name: str, **changed: Any) -> Any:
    """A pipeline of Stable Diffusion's components, some of them changed or added."""
    return of(name, **parts_of("sd", **changed), requires_safety_checker=False)


def unet(in_channels: int = 4, **config: Any) -> Any:
    """Stable Diffusion's U-Net with another input or condition."""
    own = {name: value for name, value in tiny_pipeline("sd").unet.config.items() if not name.startswith("_")}
    return diffusers.UNet2DConditionModel(**own | {"in_channels": in_channels} | config)


def controlnet(kind: str) -> Any:
    """A control network for 16x16 pictures."""
    network = tiny_pipeline(kind).unet
    return diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 8))


def wan(**config: Any) -> Any:
    """Wan 2.1; with a boundary 2.2, whose second transformer takes over below it."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    sizes |= {"freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 16}
    networks = [diffusers.WanTransformer3DModel(patch_size=(1, 2, 2), **sizes) for _ in range(2)]
    second = networks[1] if config else None
    return bare("WanPipeline", networks[0], transformer_2=second, **config)


def flux(name: str, in_channels: int = 16, scheduler: Any = None, **config: Any) -> Any:
    """A Flux pipeline with another input or scheduler."""
    parts = {key: value for key, value in parts_of("flux").items() if value is not None}
    own = {key: value for key, value in parts["transformer"].config.items() if not key.startswith("_")}
    changed = own | {"in_channels": in_channels, "out_channels": 16} | config
    network = diffusers.FluxTransformer2DModel(**changed)
    return of(name, **parts | {"transformer": network, "scheduler": scheduler or parts["scheduler"]})


def latent_consistency() -> Any:
    """Latent consistency: a network that is told its guidance scale."""
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return sd("LatentConsistencyModelPipeline", unet=unet(time_cond_proj_dim=8), scheduler=scheduler)


def sana() -> Any:
    network = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    return bare("SanaPipeline", network)


def aura_flow() -> Any:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=8, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return bare("AuraFlowPipeline", network)


def chroma() -> Any:
    network = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return bare("ChromaPipeline", network)


def qwen_image() -> Any:
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return bare("QwenImagePipeline", network, scheduler=flow(1.0))


def lumina() -> Any:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=1, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 2, 2), cap_feat_dim=8,
    )  # fmt: skip
    return bare("Lumina2Pipeline", network)


def z_image() -> Any:
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, rope_theta=256.0, t_scale=10.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():
        for token in (network.x_pad_token, network.cap_pad_token):
            token.fill_(1.0)
    return bare("ZImagePipeline", network)


def hunyuan_dit(scheduler: Any) -> Any:
    network = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=16, hidden_size=16,
        activation_fn="gelu-approximate", text_len=LENGTH, text_len_t5=LENGTH,
    )  # fmt: skip
    absent = "vae text_encoder tokenizer text_encoder_2 tokenizer_2 safety_checker feature_extractor"
    return bare("HunyuanDiTPipeline", network, absent=absent, scheduler=scheduler, requires_safety_checker=False)


def latte() -> Any:
    network = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return bare("LattePipeline", network, scheduler=ddim())


def ltx(**scheduler: Any) -> Any:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=8,
    )  # fmt: skip
    return bare("LTXPipeline", network, scheduler=flow(1.0, **scheduler))


def ltx_condition() -> Any:
    """LTX that goes on from pictures, each token at a noise level of its own."""
    flags, fives = (True, True, False, False), (1,) * 5
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=fives,
        decoder_layers_per_block=fives, spatio_temporal_scaling=flags, decoder_spatio_temporal_scaling=flags,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1,
    )  # fmt: skip
    return of("LTXConditionPipeline", **ltx().components | {"vae": vae})


def mochi() -> Any:
    network = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, qk_norm="rms_norm", text_embed_dim=8, time_embed_dim=4, activation_fn="swiglu",
        max_sequence_length=LENGTH,
    )  # fmt: skip
    return bare("MochiPipeline", network, scheduler=flow(1.0))


def hunyuan_video() -> Any:
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=8,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return bare("HunyuanVideoPipeline", network, absent="vae text_encoder tokenizer text_encoder_2 tokenizer_2")


def cogvideo(**config: Any) -> Any:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=LENGTH,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")
    return bare("CogVideoXPipeline", network, **{"scheduler": scheduler} | config)


def kandinsky() -> Any:
    network = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(1, 1, 2), visual_cond=False,
        attention_type="regular",
    )  # fmt: skip
    return bare("Kandinsky5T2VPipeline", network, absent="vae text_encoder tokenizer text_encoder_2 tokenizer_2")


def animate() -> Any:
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    parts = parts_of("sd", motion_adapter=motion, scheduler=ddim())
    del parts["safety_checker"]
    return of("AnimateDiffPipeline", **parts)


def klein() -> Any:
    """FLUX.2 klein, whose shift depends on the number of steps, too."""
    network = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
        layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=16,
    )  # fmt: skip
    scheduler = flow(1.0, use_dynamic_shifting=True)
    return bare("Flux2KleinPipeline", network, absent="text_encoder tokenizer", vae=vae, scheduler=scheduler)


def bria() -> Any:
    network = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(0, 4, 4),
    )  # fmt: skip
    vae = parts_of("sd")["vae"]
    vae.register_to_config(shift_factor=0)
    return bare("BriaPipeline", network, absent="text_encoder tokenizer image_encoder feature_extractor", vae=vae)


def audio_ldm() -> Any:
    network = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(16, 16),
    )  # fmt: skip
    voice = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            normalize_before=False,
        )
    )
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    absent = "text_encoder projection_model tokenizer tokenizer_2 feature_extractor"
    language = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=16, bos_token_id=0, eos_token_id=1))
    texts = {"text_encoder_2": parts_of("pixart")["text_encoder"], "language_model": language}
    return of(
        "AudioLDM2Pipeline",
        **dict.fromkeys(absent.split()),
        **texts,
        vae=vae,
        unet=network,
        vocoder=voice,
        scheduler=ddim(),
    )


def moving_picture() -> Any:
    network = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8,
        num_attention_heads=2, projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, layers_per_block=1
    )
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            projection_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_type="continuous", use_karras_sigmas=True, sigma_max=700.0, sigma_min=0.002, steps_offset=1,
    )  # fmt: skip
    return of(
        "StableVideoDiffusionPipeline", vae=vae, image_encoder=encoder, unet=network, scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(**sizes),
    )  # fmt: skip


def cogview4() -> Any:
    network = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    shift = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "time_shift_type": "linear"}
    return bare("CogView4Pipeline", network, scheduler=flow(1.0, use_dynamic_shifting=True, **shift))


def ace_step() -> Any:
    """Music, whose scheduler counts time from 0 to 1."""
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "sliding_window": 16, **attention}
    network = diffusers.AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, **sizes
    )
    text = Qwen3Model(
        Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=64,
        )
    )
    encoder = AceStepConditionEncoder(
        text_hidden_dim=16, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1,
        **sizes,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=8,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    return of(
        "AceStepPipeline", transformer=network, condition_encoder=encoder, vae=vae, text_encoder=text,
        tokenizer=parts_of("pixart")["tokenizer"], scheduler=flow(1.0, num_train_timesteps=1),
    )  # fmt: skip


def sd3_controlnet() -> Any:
    control = diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    return of("StableDiffusion3ControlNetPipeline", **parts_of("sd3", controlnet=control))


def diffusion_forcing() -> Any:
    """SkyReels 2, whose frames have schedulers of their own."""
    network = diffusers.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return bare("SkyReelsV2DiffusionForcingPipeline", network, scheduler=scheduler)


def hunyuan_video_15(guider: Any = None) -> Any:
    """Its guidance is an object beside the network."""
    network = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=8, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0) if guider is None else guider
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    parts = {"vae": vae, "guider": guider, "scheduler": flow(7.0)}
    return bare("HunyuanVideo15Pipeline", network, absent="text_encoder tokenizer text_encoder_2 tokenizer_2", **parts)
