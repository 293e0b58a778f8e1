"""The pipelines that solvers are tried in: one row for each, as small as it builds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import PNDMScheduler

from tests.bridge.builders import (
    ace_step,
    animate,
    audio_ldm,
    aura_flow,
    bria,
    chroma,
    cogvideo,
    cogview4,
    controlnet,
    diffusion_forcing,
    flux,
    hunyuan_dit,
    hunyuan_video,
    hunyuan_video_15,
    kandinsky,
    klein,
    latent_consistency,
    latte,
    ltx,
    ltx_condition,
    lumina,
    mochi,
    moving_picture,
    of,
    qwen_image,
    sana,
    sd,
    sd3_controlnet,
    unet,
    wan,
    z_image,
)
from tests.bridge.parts import LENGTH, ddim, embedded, flow, noise, parts_of, picture, ready
from tests.tiny_pipelines import tiny_pipeline, tiny_unet

TEXT = ("a cat", "dog")
SIZE = {"height": 16, "width": 16, "output_type": "latent"}
SHORT = {"max_sequence_length": LENGTH}
BOTH = ("prompt_embeds", "negative_prompt_embeds")
MASKED = (*BOTH, "prompt_attention_mask", "negative_prompt_attention_mask")
TWICE_MASKED = (*MASKED, *(f"{name}_2" for name in ("prompt_embeds", "negative_prompt_embeds", *MASKED[len(BOTH) :])))
TWO_TEXTS = tuple(f"{name}{part}{end}" for name in BOTH for part in ("", "_mask") for end in ("", "_2"))


@dataclass(frozen=True)
class Row:
    """A pipeline class at work.

    Args:
        name: of the class.
        kind: image, video or audio, and what it is made from.
        build: a pipeline of random weights.
        prompts: as `record_trajectories` takes them.
        call: further arguments of every call.
        refused: a pattern of the line that refuses it; None where solvers are learned for it.
        unsaved: a pattern of the line that refuses to save it with a solver in it.
        note: which of several rows of a class this is.
    """

    name: str
    kind: str
    build: Callable[[], Any]
    prompts: Any = TEXT
    call: Mapping[str, Any] = field(default_factory=lambda: SIZE)
    refused: str | None = None
    unsaved: str | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """The class, and which of its rows."""
        return f"{self.name} {self.note}".strip()

    def pipeline(self) -> Any:
        """The pipeline, the same at every call."""
        return ready(self.build)


ROWS: tuple[Row, ...] = (
    Row("StableDiffusionPipeline", "image", lambda: tiny_pipeline("sd")),
    Row(
        "StableDiffusionPipeline",
        "image",
        lambda: sd("StableDiffusionPipeline", scheduler=PNDMScheduler()),
        note="PNDM",
    ),
    Row("StableDiffusionXLPipeline", "image", lambda: tiny_pipeline("sdxl")),
    Row("StableDiffusion3Pipeline", "image", lambda: tiny_pipeline("sd3"), call=SIZE | SHORT),
    Row("FluxPipeline", "image", lambda: tiny_pipeline("flux"), call=SIZE | SHORT),
    Row(
        "FluxPipeline",
        "image",
        lambda: flux("FluxPipeline", scheduler=flow(1.0)),
        call=SIZE | SHORT,
        note="constant shift",
    ),
    Row(
        "PixArtAlphaPipeline",
        "image",
        lambda: tiny_pipeline("pixart"),
        call=SIZE | SHORT | {"use_resolution_binning": False, "clean_caption": False},
    ),
    Row(
        "PixArtSigmaPipeline",
        "image",
        lambda: of("PixArtSigmaPipeline", **parts_of("pixart")),
        call=SIZE | SHORT | {"use_resolution_binning": False, "clean_caption": False},
    ),
    Row(
        "DiTPipeline",
        "image of a class",
        lambda: tiny_pipeline("dit"),
        [{"class_labels": [1]}, {"class_labels": [5]}],
        {"output_type": "np"},
    ),
    Row(
        "SanaPipeline",
        "image",
        sana,
        embedded(8, MASKED, negative_prompt=None),
        SIZE | {"height": 32, "width": 32, "use_resolution_binning": False},
    ),
    Row("AuraFlowPipeline", "image", aura_flow, embedded(8, MASKED), SIZE),
    Row("ChromaPipeline", "image", chroma, embedded(8, MASKED), SIZE),
    Row(
        "QwenImagePipeline",
        "image",
        qwen_image,
        embedded(8, (*BOTH, "prompt_embeds_mask", "negative_prompt_embeds_mask")),
        SIZE | {"true_cfg_scale": 3.0},
    ),
    Row("Flux2KleinPipeline", "image", klein, embedded(8, BOTH), SIZE),
    Row("BriaPipeline", "image", bria, embedded(8, BOTH), SIZE),
    Row("Lumina2Pipeline", "image", lumina, embedded(8, MASKED), SIZE),
    Row(
        "ZImagePipeline",
        "image",
        z_image,
        [{name: [noise(LENGTH, 16, seed=k + p)] for p, name in enumerate(BOTH)} for k in (0, 5)],
        SIZE,
    ),
    Row(
        "DDIMPipeline",
        "image, unconditional",
        lambda: of("DDIMPipeline", unet=tiny_unet(), scheduler=ddim()),
        None,
        {"output_type": "np"},
        unsaved="makes a scheduler of diffusers of its own when it is loaded",
    ),
    Row(
        "DDPMPipeline",
        "image, unconditional",
        lambda: of("DDPMPipeline", unet=tiny_unet(), scheduler=diffusers.DDPMScheduler(clip_sample=False)),
        None,
        {"output_type": "np"},
        refused="draws fresh noise at its steps",
    ),
    Row(
        "LatentConsistencyModelPipeline",
        "image",
        latent_consistency,
        refused="takes no other, which it would tell origi",
    ),
    Row(
        "StableDiffusionControlNetPipeline",
        "image, ControlNet",
        lambda: sd("StableDiffusionControlNetPipeline", controlnet=controlnet("sd")),
        [{"prompt": text, "image": picture(seed=k)} for k, text in enumerate(TEXT)],
        {"output_type": "latent"},
    ),
    Row(
        "StableDiffusionXLControlNetPipeline",
        "image, ControlNet",
        lambda: of("StableDiffusionXLControlNetPipeline", **parts_of("sdxl"), controlnet=controlnet("sdxl")),
        [{"prompt": text, "image": picture(seed=k)} for k, text in enumerate(TEXT)],
        {"output_type": "latent"},
    ),
    Row(
        "StableVideoDiffusionPipeline",
        "image to video",
        moving_picture,
        [{"image": picture()}, {"image": picture(seed=1)}],
        SIZE | {"num_frames": 2},
    ),
    Row(
        "AudioLDM2Pipeline",
        "audio",
        audio_ldm,
        embedded(
            16,
            (
                *BOTH,
                "generated_prompt_embeds",
                "negative_generated_prompt_embeds",
                "attention_mask",
                "negative_attention_mask",
            ),
        ),
        {"output_type": "np", "audio_length_in_s": 0.032},
    ),
    Row(
        "StableDiffusionImg2ImgPipeline",
        "image to image",
        lambda: sd("StableDiffusionImg2ImgPipeline"),
        [{"prompt": "a cat", "image": picture()}],
        {"output_type": "latent", "strength": 0.5},
        refused="makes 1 of 2 steps as it is called, and solvers are fitted to whole runs: record it with strength=1.0",
    ),
    Row(
        "StableDiffusionImg2ImgPipeline",
        "image to image",
        lambda: sd("StableDiffusionImg2ImgPipeline"),
        [{"prompt": text, "image": picture()} for text in TEXT],
        {"output_type": "latent", "strength": 1.0},
        note="whole",
    ),
    Row(
        "StableDiffusionInpaintPipeline",
        "inpaint",
        lambda: sd("StableDiffusionInpaintPipeline"),
        [{"prompt": "a cat", "image": picture(), "mask_image": picture(channels=1, seed=1)}],
        SIZE,
        refused="changes its state, or its scheduler, between the steps",
        note="4 channels",
    ),
    Row(
        "StableDiffusionInpaintPipeline",
        "inpaint",
        lambda: sd("StableDiffusionInpaintPipeline", unet=unet(9)),
        [{"prompt": text, "image": picture(), "mask_image": picture(channels=1, seed=1)} for text in TEXT],
        SIZE,
        note="9 channels",
    ),
    Row(
        "StableDiffusionControlNetInpaintPipeline",
        "inpaint, ControlNet",
        lambda: sd("StableDiffusionControlNetInpaintPipeline", unet=unet(9), controlnet=controlnet("sd")),
        [
            {
                "prompt": text,
                "image": picture(),
                "mask_image": picture(channels=1, seed=1),
                "control_image": picture(seed=2),
            }
            for text in TEXT
        ],
        SIZE,
    ),
    Row(
        "StableDiffusionXLInpaintPipeline",
        "inpaint",
        lambda: of("StableDiffusionXLInpaintPipeline", **parts_of("sdxl")),
        [{"prompt": "a cat", "image": picture(), "mask_image": picture(channels=1, seed=1)}],
        SIZE | {"strength": 1.0},
        refused="changes its state, or its scheduler, between the steps",
    ),
    Row(
        "StableDiffusionInstructPix2PixPipeline",
        "image to image",
        lambda: sd("StableDiffusionInstructPix2PixPipeline", unet=unet(8)),
        [{"prompt": text, "image": picture()} for text in TEXT],
        {"output_type": "latent"},
    ),
    Row(
        "FluxControlPipeline",
        "image, control",
        lambda: flux("FluxControlPipeline", in_channels=32),
        [{"prompt": text, "control_image": picture()} for text in TEXT],
        SIZE | SHORT,
    ),
    Row(
        "FluxFillPipeline",
        "inpaint",
        lambda: flux("FluxFillPipeline", in_channels=48),
        [{"prompt": text, "image": picture(), "mask_image": picture(channels=1, seed=1)} for text in TEXT],
        SIZE | SHORT,
    ),
    Row(
        "FluxKontextPipeline",
        "image to image",
        lambda: flux("FluxKontextPipeline"),
        [{"prompt": text, "image": picture()} for text in TEXT],
        SIZE | SHORT | {"max_area": 256, "_auto_resize": False},
    ),
    Row("CogView4Pipeline", "image", cogview4, embedded(8, BOTH), SIZE),
    Row(
        "StableDiffusion3ControlNetPipeline",
        "image, ControlNet",
        sd3_controlnet,
        [{"prompt": text, "control_image": picture(seed=k)} for k, text in enumerate(TEXT)],
        SIZE | SHORT,
    ),
    Row(
        "AceStepPipeline",
        "audio",
        ace_step,
        [{"prompt": text, "lyrics": "la la"} for text in TEXT],
        {"output_type": "latent", "audio_duration": 0.4, "max_text_length": LENGTH},
    ),
    Row("WanPipeline", "video", wan, embedded(8, BOTH), SIZE | {"num_frames": 5}),
    Row(
        "WanPipeline",
        "video",
        lambda: wan(boundary_ratio=0.7),
        embedded(8, BOTH),
        SIZE | {"num_frames": 5},
        note="two experts",
    ),
    Row("CogVideoXPipeline", "video", cogvideo, embedded(8, BOTH), SIZE | {"num_frames": 8}),
    Row(
        "CogVideoXPipeline",
        "video",
        lambda: cogvideo(scheduler=diffusers.CogVideoXDPMScheduler(timestep_spacing="trailing")),
        embedded(8, BOTH),
        SIZE | {"num_frames": 8},
        refused="has to tell CogVideoXDPMScheduler its old_pred_original_sample",
        note="DPM",
    ),
    Row(
        "CogVideoXPipeline",
        "video",
        cogvideo,
        embedded(8, BOTH),
        SIZE | {"num_frames": 8, "use_dynamic_cfg": True},
        refused="guidance that changes from step to step",
        note="dynamic guidance",
    ),
    Row("LTXPipeline", "video", ltx, embedded(8, MASKED), SIZE | {"height": 32, "width": 32, "num_frames": 9}),
    Row(
        "LTXPipeline",
        "video",
        lambda: ltx(use_dynamic_shifting=True),
        embedded(8, MASKED),
        SIZE | {"height": 32, "width": 32, "num_frames": 9},
        note="dynamic shift",
    ),
    Row(
        "LTXConditionPipeline",
        "video",
        ltx_condition,
        embedded(8, MASKED),
        SIZE | {"height": 32, "width": 32, "num_frames": 9},
        refused="tells its scheduler per_token_timesteps at each step",
    ),
    Row(
        "SkyReelsV2DiffusionForcingPipeline",
        "video",
        diffusion_forcing,
        embedded(8, BOTH, prompt=None),
        SIZE | {"num_frames": 5, "base_num_frames": 5},
        refused="does not step its scheduler itself: .* a copy of it for each frame",
    ),
    Row("MochiPipeline", "video", mochi, embedded(8, MASKED), SIZE | {"num_frames": 7}),
    Row(
        "HunyuanVideoPipeline",
        "video",
        hunyuan_video,
        embedded(8, ("prompt_embeds", "prompt_attention_mask"), pooled_prompt_embeds=noise(1, 8)),
        SIZE | {"num_frames": 5},
    ),
    Row(
        "HunyuanVideo15Pipeline",
        "video",
        hunyuan_video_15,
        embedded(8, TWO_TEXTS),
        SIZE | {"height": 32, "width": 32, "num_frames": 5},
    ),
    Row(
        "LattePipeline",
        "video",
        latte,
        embedded(8, BOTH, negative_prompt=None),
        SIZE | {"video_length": 16, "clean_caption": False},
    ),
    Row(
        "Kandinsky5T2VPipeline",
        "video",
        kandinsky,
        [
            {
                "prompt_embeds_qwen": noise(1, LENGTH, 8, seed=k),
                "prompt_embeds_clip": noise(1, 8, seed=k + 5),
                "prompt_cu_seqlens": torch.tensor([0, LENGTH], dtype=torch.int32),
                "negative_prompt_embeds_qwen": noise(1, LENGTH, 8, seed=k + 1),
                "negative_prompt_embeds_clip": noise(1, 8, seed=k + 6),
                "negative_prompt_cu_seqlens": torch.tensor([0, LENGTH], dtype=torch.int32),
            }
            for k in range(2)
        ],
        SIZE | {"num_frames": 5},
    ),
    Row("AnimateDiffPipeline", "video", animate, call=SIZE | {"num_frames": 2}),
    Row(
        "HunyuanDiTPipeline",
        "image",
        lambda: hunyuan_dit(diffusers.DDPMScheduler(clip_sample=False)),
        embedded(8, TWICE_MASKED),
        SIZE | {"use_resolution_binning": False},
        refused="draws fresh noise at its steps",
        note="DDPM",
    ),
    Row(
        "HunyuanDiTPipeline",
        "image",
        lambda: hunyuan_dit(ddim()),
        embedded(8, TWICE_MASKED),
        SIZE | {"use_resolution_binning": False},
        note="DDIM",
    ),
)
