"""Pictures are those of the pipelines, to 1e-3 and better, whatever an autoencoder asks for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from denoisers import load_denoiser
from denoisers.decoding import decode, from_latents, to_latents
from denoisers.diffusers_models import from_pipeline
from solvers import start_noise
from tests.solvers.test_scheduler import Recorder, pipeline_table
from tests.tiny_pipelines import KINDS, call_arguments, tiny_pipeline

STATISTICS = {"latents_mean": [0.2, -0.1, 0.4, 0.0], "latents_std": [1.5, 0.7, 1.1, 2.0]}


def pictures(kind: str, pipe: Any, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, the pipeline's images, the denoiser's) of one run, images in [0, 1]."""
    denoiser = from_pipeline(pipe, side, side)
    denoiser.set_decoder(pipe.vae)
    pipe.scheduler = Recorder.from_solver(pipeline_table(pipe, kind, 1), allow_mismatch="shift")
    arguments = call_arguments(kind, ["a cat", "dogs"], 1.0, 1) | {"output_type": "pt"}
    arguments |= {} if kind == "dit" else {"height": side, "width": side}
    images = torch.as_tensor(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images)
    states = pipe.scheduler.calls[-1][3][:2]
    return states, images.float(), (denoiser.decode(states).float() / 2 + 0.5).clamp(0, 1)


CASES = [(kind, case) for kind in KINDS for case in ("plain", "tiles")] + [("sdxl", "statistics")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "case"), CASES)  # SDXL's pipeline alone looks at the statistics
def test_pictures_are_the_pipelines_own(kind: str, case: str, dtype: torch.dtype) -> None:
    pipe, side = tiny_pipeline(kind), 16 if kind == "dit" else 64
    if case == "statistics":
        pipe.vae.register_to_config(**STATISTICS)
    if case == "tiles":
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
    pipe.to(dtype)
    _, expected, found = pictures(kind, pipe, side)
    assert expected.std() > 1e-3
    assert pipe.vae.dtype == dtype
    bound = 1e-3 if dtype == torch.float32 else 2e-3  # float16 rounds other batches otherwise, by 1e-3 at most
    assert (found - expected).abs().max() < bound


def test_an_autoencoder_that_leaves_float16_is_run_in_float32() -> None:
    """As SDXL's does (huggingface/diffusers #4325)."""
    pipe = tiny_pipeline("sdxl")
    pipe.vae.decoder.conv_in.weight.data *= 3e4
    pipe.to(torch.float16)
    states, expected, found = pictures("sdxl", pipe, 16)
    assert expected.isfinite().all()
    assert (found - expected).abs().max() < 1e-3
    assert pipe.vae.dtype == torch.float16
    assert not decode(pipe.vae, states).isfinite().all()


def test_tiles_are_an_option(tmp_path) -> None:
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path)
    whole = load_denoiser(tmp_path, height=64, width=64, decoder=True)
    states = start_noise([0], whole.sample_shape)
    tiles = load_denoiser(tmp_path, height=64, width=64, decoder=True, tiling=True)
    pipe.vae.enable_tiling()
    expected = pipe.vae.decode(states / pipe.vae.config.scaling_factor).sample
    assert torch.allclose(tiles.decode(states), expected, atol=1e-5)
    assert not torch.allclose(whole.decode(states), expected, atol=1e-2)


@pytest.mark.parametrize("config", [{"shift_factor": 0.3}, STATISTICS])
def test_latents_and_back(config: dict[str, Any]) -> None:
    vae = tiny_pipeline("sd").vae
    vae.register_to_config(**config)
    encoded = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    latents = to_latents(encoded, vae.config)
    assert not torch.allclose(latents, encoded * vae.config.scaling_factor)
    assert torch.allclose(from_latents(latents, vae.config), encoded)
