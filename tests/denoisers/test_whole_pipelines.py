"""What of a pipeline makes its outputs: what its network is told, and every network in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from peft import LoraConfig
from torch import Tensor, nn

from denoisers import load_denoiser, with_guidance, with_precision
from denoisers.diffusers_models import from_pipeline
from denoisers.pipeline import PipelineDenoiser
from solvers import start_noise
from solvers.identity import weight_hash
from tests.bridge.builders import controlnet, sd, unet, wan
from tests.bridge.parts import embedded, noise, picture, ready
from tests.bridge.rows import BOTH, SHORT, SIZE
from tests.denoisers.test_adapters import condition_of
from tests.tiny_pipelines import tiny_pipeline

PROMPTS = ["a cat", "dog"]


def test_flux_in_bf16_is_told_what_the_pipeline_tells_it() -> None:
    """The pipeline rounds 610.17 to bf16 before it divides by 1000 (diffusers 9405): 612, where 608 is as near."""
    pipe = tiny_pipeline("flux").to(torch.bfloat16)
    told: list[float] = []
    pipe.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: told.append(float(args[0][0])))
    recorded, adapter = PipelineDenoiser(pipe, PROMPTS, **SIZE | SHORT), from_pipeline(pipe, 16, 16)
    x, timestep = start_noise([0], adapter.sample_shape), torch.tensor(610.17)
    expected = recorded(x, timestep, recorded.condition_of([0]))
    found = with_guidance(adapter, 3.5)(x, timestep, condition_of("flux", pipe, PROMPTS[:1]))
    assert told[-2:] == [612.0, 612.0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_final_states_are_decoded_as_the_pipeline_does(output_type: str) -> None:
    pipe, call = tiny_pipeline("sd"), SIZE | {"output_type": output_type}
    recorded = PipelineDenoiser(pipe, PROMPTS, **call)
    condition = recorded.condition_of([0, 1])
    states = torch.cat([recorded.record(3, one)[0][:, -1] for one in condition.split(1)])
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = pipe(PROMPTS, num_inference_steps=3, generator=seeds, **call | {"output_type": "pt"}).images
    found = recorded.pictures(states, condition)
    if output_type == "latent":
        assert torch.equal(found, states)
    else:
        assert found.shape == (2, 3, 16, 16)
        torch.testing.assert_close(found, 2 * expected - 1, rtol=1e-4, atol=1e-4)


def test_a_network_is_told_its_scale_in_a_denoiser_of_its_own() -> None:
    """Guided ones share the network, and the given denoiser stays as it is; also below a wrapper."""
    pipe = tiny_pipeline("flux")
    plain = from_pipeline(pipe, 16, 16)
    three, five = with_guidance(plain, 3.0), with_guidance(plain, 5.0)
    assert [one.guidance_scale for one in (plain, three, five)] == [1.0, 3.0, 5.0]
    assert three.network is five.network is plain.network
    x, condition = start_noise([0], plain.sample_shape), condition_of("flux", pipe, PROMPTS[:1])
    outputs = [one(x, torch.tensor(500.0), condition) for one in (plain, three, five, with_guidance(plain, 3.0))]
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1])
    wrapped = with_precision(plain, "bf16")
    assert (with_guidance(wrapped, 3.0).guidance_scale, wrapped.guidance_scale) == (3.0, 1.0)


def test_a_u_net_that_is_told_its_scale_equals_its_pipeline() -> None:
    """Latent consistency models: Stable Diffusion's pipeline embeds the scale instead of guiding."""
    pipe = ready(lambda: sd("StableDiffusionPipeline", unet=unet(time_cond_proj_dim=8)))
    recorded, adapter = PipelineDenoiser(pipe, PROMPTS, guidance_scale=4.0, **SIZE), from_pipeline(pipe, 16, 16)
    assert recorded.guidance_scale == 4.0
    x, timestep = start_noise([0], adapter.sample_shape), torch.tensor(500.0)
    expected, condition = recorded(x, timestep, recorded.condition_of([0])), condition_of("sd", pipe, PROMPTS[:1])
    torch.testing.assert_close(with_guidance(adapter, 4.0)(x, timestep, condition), expected, rtol=1e-4, atol=1e-5)
    assert float((adapter(x, timestep, condition) - expected).abs().max()) > 1e-3


def test_a_control_network_is_not_dropped(tmp_path: Path) -> None:
    pipe = ready(lambda: sd("StableDiffusionControlNetPipeline", controlnet=controlnet("sd")))
    with pytest.raises(ValueError, match="StableDiffusionControlNetPipeline has a controlnet, without which"):
        from_pipeline(pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a controlnet, without which its outputs are others: use the whole pipe"):
        load_denoiser(tmp_path)
    assert isinstance(pipe, StableDiffusionControlNetPipeline)


def test_the_hash_covers_every_module_of_a_step() -> None:
    """Control networks, and the second expert, which only late steps call (diffusers 12074); no text encoder."""
    plain = tiny_pipeline("sd")
    assert PipelineDenoiser(plain, PROMPTS, **SIZE).weight_hash == weight_hash(plain.unet)
    changed(plain.text_encoder)
    assert PipelineDenoiser(plain, PROMPTS, **SIZE).weight_hash == weight_hash(plain.unet)
    pipe = ready(lambda: sd("StableDiffusionControlNetPipeline", controlnet=controlnet("sd")))
    call = {"output_type": "latent"}
    assert_hashed(pipe, ("unet", "controlnet"), [{"prompt": "a cat", "image": picture()}], call)
    pipe = ready(lambda: wan(boundary_ratio=0.7))
    assert_hashed(pipe, ("transformer", "transformer_2"), embedded(8, BOTH), SIZE | {"num_frames": 5})


def test_the_hash_covers_an_adapter_of_the_second_expert_and_its_strength() -> None:
    """Wan 2.2's distilled LoRAs go onto both experts (diffusers 12074)."""
    pipe = ready(lambda: wan(boundary_ratio=0.7))
    prompts, call = embedded(8, BOTH), SIZE | {"num_frames": 5}
    hashes = [PipelineDenoiser(pipe, prompts, **call).weight_hash]
    pipe.transformer_2.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "fast")
    for strength in (1.0, 0.5):
        pipe.transformer_2.set_adapters(["fast"], [strength])
        hashes.append(PipelineDenoiser(pipe, prompts, **call).weight_hash)
    assert len(set(hashes)) == 3


def assert_hashed(pipe: Any, names: tuple[str, ...], prompts: Any, call: dict[str, Any]) -> None:
    early = PipelineDenoiser(pipe, prompts, **call)
    hashes = [early.weight_hash]
    for name in names:
        changed(getattr(pipe, name))
        hashes.append(PipelineDenoiser(pipe, prompts, **call).weight_hash)
        assert early.weight_hash == hashes[-1]
    assert len(set(hashes)) == len(names) + 1


def changed(module: nn.Module) -> Tensor:
    """Add noise to a module's first weight."""
    weight = next(module.parameters())
    return weight.data.add_(noise(*weight.shape))
