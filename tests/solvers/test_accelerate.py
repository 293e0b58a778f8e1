"""accelerate_pipeline: what a pipeline computes with a solver's own calls, and which calls it makes."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.modeling_utils import ModelMixin

from denoisers import with_guidance
from denoisers.diffusers_models import from_pipeline
from solvers import Bands, Call, SolverError, SolverTable, TableScheduler, accelerate_pipeline, sample, start_noise
from solvers.table_json import table_to_dict
from tests.denoisers.test_adapters import PROMPTS, as_pipeline_output, condition_of, run_pipeline
from tests.solvers.test_scheduler import pipeline_table, table_artifact
from tests.tiny_pipelines import call_arguments, tiny_pipeline

KINDS = ("sd", "sdxl", "dit", "pixart", "sd3")
STEPS, SCALE = 4, 3.0


def solver(kind: str, pipe: Any) -> SolverTable:
    """Of the pipeline's own schedule, made for SCALE."""
    return table_artifact(pipeline_table(pipe, kind, STEPS), pipe)


def without_first_call(table: SolverTable) -> SolverTable:
    """The first state is then the start noise times a weight."""
    kept = [column for column, call in enumerate(table.calls) if call.row > 0]
    coef = {"output_coef": table.output_coef[:, kept], "output_support": table.output_support[:, kept]}
    return replace(table, calls=tuple(table.calls[column] for column in kept), **coef)


def with_bands(table: SolverTable, edges: tuple[float, ...] = (0.1, 0.3), channels: int = 4) -> SolverTable:
    """The same solver with outputs mixed over channels, each band in its own way."""
    space, generator = Bands(edges, channels), torch.Generator().manual_seed(0)
    coef = {name: space.embed(getattr(table, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    mixed = torch.eye(channels) + 0.1 * torch.randn(space.ops, generator=generator, dtype=torch.float64)
    coef["output_coef"] = torch.einsum("ikbcd,bde->ikbce", coef["output_coef"], mixed)
    return replace(table, space=space, **coef, state_support=None, output_support=None)


def counted(network: Any) -> list[int]:
    """Batch sizes of the calls that really reach a network from now on."""
    sizes: list[int] = []
    network.register_forward_hook(lambda module, args, output: sizes.append(len(output[0])))
    return sizes


def network_of(pipe: Any) -> Any:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def start(kind: str, pipe: Any, seeds: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    """The start noise that `run_pipeline` takes; the DiT draws it from the same seeds."""
    shape = from_pipeline(pipe, 16, 16).sample_shape
    if kind != "dit":
        return start_noise(seeds, shape)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_as_weights_equals_the_pipeline_s_own_guidance(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    table, noise = solver(kind, pipe), start(kind, pipe)
    own = pipe.scheduler
    pipe.scheduler = TableScheduler.for_pipeline(table, pipe)
    expected = run_pipeline(kind, pipe, noise, SCALE)
    pipe.scheduler = own
    network, sizes = network_of(pipe), counted(network_of(pipe))
    with accelerate_pipeline(pipe, table.guided(SCALE), guidance_scale=SCALE):
        assert_close(run_pipeline(kind, pipe, noise, SCALE), expected)
        assert network_of(pipe).network_calls == 2 * STEPS * len(PROMPTS)
    assert sizes == [2 * len(PROMPTS)] * STEPS
    assert network_of(pipe) is network
    assert pipe.scheduler is own


@pytest.mark.parametrize("operators", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_left_out_equal_the_sampler(kind: str, operators: bool) -> None:
    """Guidance at rows 0 and 2 alone, no call at all at row 1."""
    pipe = tiny_pipeline(kind)
    denoiser, noise, condition = from_pipeline(pipe, 16, 16), start(kind, pipe), condition_of(kind, pipe)
    table = solver(kind, pipe).guided(SCALE, rows=[0, 2])
    kept = [column for column, call in enumerate(table.calls) if call.row != 1]
    coef = {"output_coef": table.output_coef[:, kept], "output_support": table.output_support[:, kept]}
    table = replace(table, calls=tuple(table.calls[column] for column in kept), **coef)
    table = with_bands(table) if operators else table
    expected = as_pipeline_output(kind, pipe, sample(denoiser, table, noise, condition))
    sizes = counted(network_of(pipe))
    accelerate_pipeline(pipe, table)
    assert_close(run_pipeline(kind, pipe, noise, SCALE), expected)
    assert sizes == [4, 4, 2]
    assert network_of(pipe).network_calls == sum(sizes) == table.nfe * len(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_unconditional_calls_alone_and_no_first_call(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    denoiser, noise, condition = from_pipeline(pipe, 16, 16), start(kind, pipe), condition_of(kind, pipe)
    table = without_first_call(solver(kind, pipe).guided(SCALE, rows=[0]))
    table = replace(table, calls=(Call(1, "unconditional"), *table.calls[1:]))
    expected = as_pipeline_output(kind, pipe, sample(denoiser, table, noise, condition))
    accelerate_pipeline(pipe, table)
    for _ in range(2):  # a run leaves nothing behind
        assert_close(run_pipeline(kind, pipe, noise, SCALE), expected)
    assert network_of(pipe).network_calls == 2 * 3 * len(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_conditional_calls_alone_need_no_guidance(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    denoiser, noise, condition = from_pipeline(pipe, 16, 16), start(kind, pipe), condition_of(kind, pipe)
    table = without_first_call(solver(kind, pipe))
    table = replace(table, info={**table.info, "guidance_scale": 1.0})
    expected = as_pipeline_output(kind, pipe, sample(denoiser, table, noise, condition))
    accelerate_pipeline(pipe, table, guidance_scale=0.5)  # a pipeline guides above 1 only
    for scale in (1.0, 0.5):
        assert_close(run_pipeline(kind, pipe, noise, scale), expected)
    assert network_of(pipe).network_calls == 2 * 3 * len(PROMPTS)
    if kind == "pixart":
        with pytest.raises(ValueError, match=r"called at guidance scale 3\.0, this solver was made for 1\.0"):
            run_pipeline(kind, pipe, noise, SCALE)


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_guided_outputs_left_out_become_calls(kind: str) -> None:
    """A solver of guided outputs without the first one: the pipeline's own guidance, one row less."""
    pipe = tiny_pipeline(kind)
    denoiser, noise, condition = from_pipeline(pipe, 16, 16), start(kind, pipe), condition_of(kind, pipe)
    table = without_first_call(solver(kind, pipe))
    guided = with_guidance(denoiser, SCALE)
    expected = as_pipeline_output(kind, pipe, sample(guided, table, noise, condition))
    with accelerate_pipeline(pipe, table):
        assert_close(run_pipeline(kind, pipe, noise, SCALE), expected)
        assert network_of(pipe).network_calls == 2 * 3 * len(PROMPTS)
    ranged = replace(table, info={**table.info, "guidance_scale": [2.0, 4.0]})
    with accelerate_pipeline(pipe, ranged, guidance_scale=SCALE):
        assert_close(run_pipeline(kind, pipe, noise, SCALE), expected)
        assert pipe.scheduler.config["guidance_scale"] == SCALE
    with pytest.raises(SolverError, match=r"for guidance scales \[2.0, 4.0\]: pass the one as guidance_scale"):
        accelerate_pipeline(pipe, ranged)
    with pytest.raises(SolverError, match=r"made for guidance scale 3.0, found 7.5"):
        accelerate_pipeline(pipe, table, guidance_scale=7.5)


@pytest.mark.parametrize("saved", [False, True])
def test_several_solvers_are_chosen_from_by_their_rows(saved: bool, tmp_path: Path) -> None:
    """One with calls left out, one of the pipeline's own guidance, as a list or from a saved scheduler's folder."""
    pipe = tiny_pipeline("sd")
    denoiser, noise, condition = from_pipeline(pipe, 16, 16), start("sd", pipe), condition_of("sd", pipe)
    fewer = solver("sd", pipe).guided(SCALE, rows=[0, 2])
    plain = table_artifact(pipeline_table(pipe, "sd", STEPS - 1), pipe)
    chosen: Any = [fewer, plain]
    if saved:
        TableScheduler.for_pipeline(chosen, pipe).save_pretrained(tmp_path)
        chosen = tmp_path
    accelerate_pipeline(pipe, chosen, guidance_scale=SCALE)
    expected = sample(denoiser, fewer, noise, condition)
    assert_close(run_pipeline("sd", pipe, noise, SCALE), as_pipeline_output("sd", pipe, expected))
    assert pipe.unet.network_calls == fewer.nfe * len(PROMPTS)
    expected = sample(with_guidance(denoiser, SCALE), plain, noise, condition)
    assert_close(run_pipeline("sd", pipe, noise, SCALE, STEPS - 1), as_pipeline_output("sd", pipe, expected))
    assert pipe.unet.network_calls == (fewer.nfe + 2 * plain.num_rows) * len(PROMPTS)


def test_solvers_of_equally_many_rows_are_refused() -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(ValueError, match="each with another number of steps"):
        accelerate_pipeline(pipe, [solver("sd", pipe), solver("sd", pipe).guided(SCALE, rows=[0])])


def tiny_wan() -> WanPipeline:
    """Without text encoder and autoencoder; prompts are embeddings, videos latents."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_wan(pipe: WanPipeline, noise: torch.Tensor, guidance_scale: float = SCALE) -> torch.Tensor:
    prompts, negative = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(1))
    sizes = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": STEPS, "output_type": "latent"}
    embeddings = {"prompt_embeds": prompts, "negative_prompt_embeds": negative}
    return pipe(**embeddings, **sizes, guidance_scale=guidance_scale, latents=noise).frames


def test_a_pipeline_that_calls_its_network_twice_in_turn() -> None:
    pipe, noise = tiny_wan(), start_noise([0, 1], (4, 2, 8, 8))
    own, table = pipe.scheduler, solver("sd3", pipe)
    network, sizes = pipe.transformer, counted(pipe.transformer)
    prompts, negative = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def denoiser(x, timestep, condition):
        told = timestep.expand(len(x))
        return network(hidden_states=x, timestep=told, encoder_hidden_states=condition, return_dict=False)[0]

    denoiser.null_condition = lambda condition: negative
    pipe.scheduler = TableScheduler.for_pipeline(table, pipe)
    expected = run_wan(pipe, noise)
    pipe.scheduler = own
    with accelerate_pipeline(pipe, table.guided(SCALE)):
        assert_close(run_wan(pipe, noise), expected)
    fewer = with_bands(without_first_call(table.guided(SCALE, rows=[0, 2])))
    expected = sample(denoiser, fewer, noise, prompts)
    sizes.clear()
    accelerate_pipeline(pipe, fewer)
    assert_close(run_wan(pipe, noise), expected)
    assert sizes == [2, 2, 2, 2]
    assert pipe.transformer.network_calls == fewer.nfe * 2


def test_a_plain_solver_takes_the_scheduler_alone() -> None:
    pipe = tiny_pipeline("sd")
    unet, own, table = pipe.unet, pipe.scheduler, solver("sd", pipe)
    for plain in (table, with_bands(table)):
        acceleration = accelerate_pipeline(pipe, plain, guidance_scale=SCALE)
        assert pipe.unet is unet
        assert pipe.scheduler.config == TableScheduler.for_pipeline(plain, acceleration.replaced["scheduler"]).config
        acceleration.restore()
        assert pipe.scheduler is own
    with pytest.raises(SolverError, match=r"made for guidance scale 3.0, found 7.5"):
        accelerate_pipeline(pipe, table, guidance_scale=7.5)
    assert pipe.scheduler is own


def test_the_stand_in_is_the_network_for_other_code() -> None:
    pipe = tiny_pipeline("sd")
    unet, own, entry = pipe.unet, pipe.scheduler, pipe.config["unet"]
    acceleration = accelerate_pipeline(pipe, solver("sd", pipe).guided(SCALE))
    stand_in = pipe.unet
    assert isinstance(stand_in, UNet2DConditionModel)
    assert isinstance(stand_in, ModelMixin)
    assert (stand_in.dtype, stand_in.device, stand_in.config) == (unet.dtype, unet.device, unet.config)
    assert pipe.components["unet"] is stand_in
    assert pipe.config["unet"] == entry
    assert pipe.to(torch.float64).unet.dtype == unet.dtype == torch.float64
    stand_in.training = True
    assert unet.training
    assert type(copy.deepcopy(stand_in)) is UNet2DConditionModel
    pipe.to(torch.float32).scheduler = own  # another scheduler, another solver: the network answers as it is
    x, prompt = torch.randn(3, 4, 8, 8), torch.randn(3, 8, 16)
    assert torch.equal(stand_in(x, 3.0, prompt).sample, unet(x, 3.0, prompt).sample)
    assert stand_in.network_calls == 0
    acceleration.restore()
    assert pipe.unet is unet


def test_a_saved_pipeline_holds_the_network_and_says_what_it_needs(tmp_path) -> None:
    pipe = tiny_pipeline("sd")
    own, table, noise = pipe.scheduler, solver("sd", pipe).guided(SCALE), start("sd", pipe)
    accelerate_pipeline(pipe, table)
    expected = run_pipeline("sd", pipe, noise, SCALE)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert table_to_dict(table) == loaded.scheduler.config["tables"][0]
    with pytest.raises(ValueError, match=r"takes the conditional output .* use solvers.accelerate_pipeline"):
        run_pipeline("sd", loaded, noise, SCALE)
    with pytest.raises(SolverError, match="runs a solver already"):
        accelerate_pipeline(loaded, table)
    loaded.scheduler = own
    accelerate_pipeline(loaded, table)
    assert_close(run_pipeline("sd", loaded, noise, SCALE), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 5.0}, "called at guidance scale 5.0, this solver was made for 3.0"),
        ({"guidance_scale": 1.0}, "called at guidance scale 1.0, this solver was made for 3.0"),
        ({"num_inference_steps": 5}, r"num_inference_steps is 5: this solver has tables for \[4\] steps only"),
        ({"guidance_rescale": 0.7}, r"called with guidance_rescale 0\.7, this solver was made without"),
    ],
)
def test_calls_of_a_pipeline_that_the_solver_was_not_made_for(arguments: dict[str, Any], message: str) -> None:
    pipe = tiny_pipeline("sd")
    accelerate_pipeline(pipe, solver("sd", pipe).guided(SCALE))
    good = call_arguments("sd", PROMPTS, SCALE, STEPS)
    with pytest.raises(ValueError, match=message):
        pipe(**good | arguments)
    assert pipe(**good).images.isfinite().all()  # a run that was refused leaves nothing behind


@pytest.mark.parametrize("kind", ["dit", "pixart"])
@pytest.mark.parametrize("prompts", [["a cat"], PROMPTS])
def test_a_pipeline_without_guidance_that_hides_its_scale(kind: str, prompts: list[str]) -> None:
    pipe = tiny_pipeline(kind)
    accelerate_pipeline(pipe, solver(kind, pipe).guided(SCALE))
    with pytest.raises(ValueError, match=r"called at guidance scale 1\.0, this solver was made for 3\.0"):
        pipe(**call_arguments(kind, prompts, 1.0, STEPS))


def test_equal_samples_are_no_guidance() -> None:
    """Two samples of the same noise look like a doubled batch, until the scheduler gets both."""
    pipe = tiny_pipeline("pixart")
    table = solver("pixart", pipe).guided(SCALE)
    accelerate_pipeline(pipe, replace(table, info={**table.info, "guidance_scale": [1.0, SCALE]}))
    noise = start_noise([3], (4, 8, 8)).repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="call the pipeline with guidance"):
        pipe(**call_arguments("pixart", PROMPTS, 1.0, STEPS), latents=noise)


def test_guidance_beyond_the_two_branches() -> None:
    """Skip-layer guidance of Stable Diffusion 3 calls the network a second time."""
    pipe = tiny_pipeline("sd3")
    accelerate_pipeline(pipe, solver("sd3", pipe).guided(SCALE))
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with pytest.raises(ValueError, match="called with skip_guidance_layers \\[0\\], this solver was made without"):
        pipe(**call_arguments("sd3", PROMPTS, SCALE, STEPS), **skipping)


def test_an_alternating_pipeline_without_guidance_or_with_other_names() -> None:
    pipe = tiny_wan()
    accelerate_pipeline(pipe, solver("sd3", pipe).guided(SCALE))
    noise = start_noise([0, 1], (4, 2, 8, 8))
    with pytest.raises(ValueError, match=r"called at guidance scale 1\.0"):
        run_wan(pipe, noise, 1.0)
    x = {"hidden_states": noise, "timestep": torch.ones(2), "encoder_hidden_states": torch.randn(2, 8, 16)}
    pipe._guidance_scale = SCALE
    with pytest.raises(SolverError, match="calls its network as None"), torch.no_grad():
        pipe.transformer(**x)


def test_pipelines_whose_calls_cannot_be_told_apart() -> None:
    flux, sd, wan = tiny_pipeline("flux"), tiny_pipeline("sd"), tiny_wan()
    table = pipeline_table(flux, "flux", STEPS)
    with pytest.raises(SolverError, match="those of FluxPipeline cannot be told apart: use it in StableDiffusionPipe"):
        accelerate_pipeline(flux, table_artifact(table, flux).guided(SCALE))
    wan.transformer_2 = wan.transformer
    with pytest.raises(SolverError, match="those of WanPipeline with two networks"):
        accelerate_pipeline(wan, solver("sd3", wan).guided(SCALE))
    table = solver("sd", sd).guided(SCALE)
    calls = tuple(Call(call.row, "weak" if call.branch == "unconditional" else call.branch) for call in table.calls)
    with pytest.raises(SolverError, match="calls the branch 'weak': pipelines have unconditional, conditional"):
        accelerate_pipeline(sd, replace(table, calls=calls))
    assert isinstance(sd.scheduler, DDIMScheduler)
