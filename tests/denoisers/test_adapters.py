"""Adapters against the pipelines' own network calls and images."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig

from denoisers import class_labels, load_denoiser, with_guidance
from denoisers.diffusers_base import read_schedule
from denoisers.diffusers_models import from_network, from_pipeline
from denoisers.encoders import load_encoders
from denoisers.prompts import encode_prompts, read_prompts
from solvers import NoiseSchedule, sample, start_noise, tabulate
from tests.tiny_pipelines import FURTHER_KINDS, KINDS, call_arguments, encoding, size, tiny_pipeline, tiny_unet

PROMPTS = ["a cat", "dog"]
STEPS = 4


def condition_of(kind: str, pipe: Any, prompts: list[str] = PROMPTS) -> Any:
    if kind == "dit":
        return torch.tensor(call_arguments(kind, prompts, 1.0, STEPS)["class_labels"])
    negative = " " if kind == "qwen" else None  # others have one of their own
    return encode_prompts(pipe, prompts, negative, denoiser=from_pipeline(pipe, **size(kind)), **encoding(kind))


def table_of(kind: str, pipe: Any, denoiser: Any) -> Any:
    """The pipeline's own scheduler, tabulated with the arguments the pipeline gives it."""
    if kind not in ("flux", "qwen"):
        return tabulate(pipe.scheduler, STEPS)
    sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
    mu = float(np.log(denoiser.schedule.parameters["shift"]))
    return tabulate(pipe.scheduler, None, set_timesteps={"sigmas": sigmas, "mu": mu})


def run_pipeline(kind: str, pipe: Any, noise: torch.Tensor, guidance_scale: float, steps: int = STEPS) -> torch.Tensor:
    """What the pipeline makes of PROMPTS and `noise`; the DiT's, which takes no latents, of the seeds in `noise`."""
    arguments = call_arguments(kind, PROMPTS, guidance_scale, steps)
    if kind == "dit":
        return pipe(**arguments, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)]).images
    return pipe(**arguments, latents=noise)[0]


def as_pipeline_output(kind: str, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents, for the DiT decoded."""
    if kind != "dit":
        return latents
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", [*KINDS, *FURTHER_KINDS])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sample_equals_the_pipeline(kind: str, guidance_scale: float) -> None:
    """The whole run: conditions, guidance, timesteps and the learned variance as the pipeline handles them."""
    pipe = tiny_pipeline(kind)
    denoiser = with_guidance(from_pipeline(pipe, **size(kind)), guidance_scale)
    noise = start_noise([3, 4], denoiser.sample_shape)
    expected = run_pipeline(kind, pipe, noise, guidance_scale)
    result = sample(denoiser, table_of(kind, pipe, denoiser), noise, condition_of(kind, pipe))
    assert relative_error(as_pipeline_output(kind, pipe, result), expected) < 1e-5
    assert getattr(denoiser, "guidance_scale", 1.0) == guidance_scale


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", [*KINDS, *FURTHER_KINDS])
def test_loaded_folder_equals_the_pipeline_s_network(kind: str, tmp_path: Path) -> None:
    """A saved pipeline, loaded by its folder with prompts, is the denoiser of the pipeline in memory."""
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path / kind)
    options: dict[str, Any] = size(kind)
    if kind != "dit":
        options |= {"prompts": PROMPTS, "negative_prompt": "bad", "encode": encoding(kind)}
    loaded = load_denoiser(tmp_path / kind, 2.0, **options)
    expected = from_pipeline(pipe, **size(kind))
    assert (loaded.sample_shape, loaded.schedule) == (expected.sample_shape, expected.schedule)
    assert loaded.name == kind
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    seeds = [2, 3, 4]
    condition = class_labels(loaded, seeds)
    chosen = [PROMPTS[seed % 2] for seed in seeds]
    by_hand = torch.tensor(seeds) if kind == "dit" else encode_prompts(pipe, chosen, "bad", expected, **encoding(kind))
    x, timestep = start_noise(seeds, loaded.sample_shape), torch.tensor(500.25)
    found, wanted = loaded(x, timestep, condition), with_guidance(expected, 2.0)(x, timestep, by_hand)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert float((found - loaded(x, torch.tensor(500.0), condition)).abs().max()) > 0


def test_a_compiled_or_fused_network_is_known_by_its_weights() -> None:
    pipe = tiny_pipeline("sd")
    early = from_pipeline(pipe, 16, 16)
    plain = early.weight_hash
    pipe.unet = torch.compile(pipe.unet)
    assert from_pipeline(pipe, 16, 16).weight_hash == plain
    pipe.unet = pipe.unet._orig_mod
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    unfused = from_pipeline(pipe, 16, 16).weight_hash
    pipe.fuse_lora()
    assert from_pipeline(pipe, 16, 16).weight_hash == early.weight_hash == unfused != plain


@pytest.mark.parametrize("num_classes", [None, 5])
def test_pixel_unet(num_classes: int | None, tmp_path: Path) -> None:
    """A folder of a U-Net without an autoencoder, with or without labels."""
    unet, scheduler = tiny_unet(num_class_embeds=num_classes), DDIMScheduler(clip_sample=False)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "unet"):
        denoiser = load_denoiser(folder)
        assert denoiser.sample_shape == (3, 8, 8)
        assert denoiser.schedule == NoiseSchedule.linear()
        labels = class_labels(denoiser, [3, 9])
        assert (labels is None) if num_classes is None else (labels.tolist() == [3, 4])
        x = start_noise([0, 1], (3, 8, 8))
        expected = unet(x, torch.tensor([7.5, 7.5]), class_labels=labels).sample
        assert torch.equal(denoiser(x, torch.tensor(7.5), labels), expected)
    with pytest.raises(ValueError, match="no null condition"):
        load_denoiser(tmp_path, guidance_scale=2.0)


def test_old_repositories_keep_everything_in_one_folder(tmp_path: Path) -> None:
    unet, scheduler = tiny_unet(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    unet.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIM"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load_denoiser(tmp_path).schedule == NoiseSchedule.cosine()


def test_learned_variance_is_dropped_before_guidance() -> None:
    """The DiT has 8 output channels for 4 input ones; the second half never enters."""
    pipe = tiny_pipeline("dit")
    denoiser, x = with_guidance(from_pipeline(pipe), 3.0), torch.randn(2, 4, 8, 8)
    labels, null, timestep = torch.tensor([1, 2]), torch.tensor([1000, 1000]), torch.tensor([9.0, 9.0])
    calls = [pipe.transformer(x, timestep=timestep, class_labels=c).sample[:, :4] for c in (labels, null)]
    expected = calls[1] + 3 * (calls[0] - calls[1])
    assert torch.allclose(denoiser(x, torch.tensor(9.0), labels), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDIMScheduler(), NoiseSchedule.linear()),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), NoiseSchedule.cosine()),
        (
            DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            NoiseSchedule.scaled_linear(),
        ),
        (
            DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        ),
        (DDIMScheduler(trained_betas=[0.1, 0.2]), NoiseSchedule.from_betas([0.1, 0.2])),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), NoiseSchedule.flow(3.0)),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
            NoiseSchedule.flow(2.0),
        ),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), NoiseSchedule.flow(math.exp(1.15))),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear", max_shift=2.0),
            NoiseSchedule.flow(2.0),
        ),
    ],
)
def test_schedules_are_read_from_the_scheduler(scheduler: Any, expected: NoiseSchedule) -> None:
    """4096 tokens, where dynamic shift reaches its maximum."""
    for described in (scheduler, json.loads(scheduler.to_json_string())):
        found = read_schedule(described, image_tokens=4096)
        assert found.prediction_type == expected.prediction_type
        grid = torch.linspace(found.t_min, found.t_max, 7)
        assert torch.equal(found.alpha_sigma(grid)[0], expected.alpha_sigma(grid)[0])
        assert found.parameters.get("shift", 0) == pytest.approx(expected.parameters.get("shift", 0), rel=1e-12)


def test_states_of_another_precision_come_back_in_theirs() -> None:
    denoiser = from_network(tiny_unet().to(torch.bfloat16), DDIMScheduler())
    assert denoiser(torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.tensor(3.0)).dtype == torch.float64


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  dog \n")
    assert read_prompts(file) == PROMPTS
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(file)
    with pytest.raises(ValueError, match=r"missing\.txt does not exist"):
        read_prompts(tmp_path / "missing.txt")


def test_adapter_errors() -> None:
    pipe = tiny_pipeline("sd")
    denoiser = from_pipeline(pipe)
    with pytest.raises(ValueError, match="needs prompt embeddings, found NoneType"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.tensor(1.0))
    with pytest.raises(ValueError, match="no null prompt"):
        with_guidance(denoiser, 2.0)(
            torch.zeros(1, 4, 8, 8), torch.tensor(1.0), {"encoder_hidden_states": torch.zeros(1, 8, 16)}
        )
    with pytest.raises(ValueError, match="AutoencoderKL is of no known family"):
        from_network(pipe.vae, pipe.scheduler)
    with pytest.raises(ValueError, match="at least one prompt"):
        encode_prompts(pipe, [])
    with pytest.raises(ValueError, match="prompts of DDPMPipeline cannot be encoded"):
        encode_prompts(DDPMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler()), PROMPTS)
    inpainting = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    with pytest.raises(ValueError, match="9 input and 4 output channels"):
        from_network(inpainting, pipe.scheduler)


def test_loading_errors(tmp_path: Path) -> None:
    for name in ("missing", "tests/missing", "./missing/folder", "far/too/deep"):
        with pytest.raises(ValueError, match="does not exist"):
            load_denoiser(name)
    with pytest.raises(ValueError, match="neither a folder here nor a pipeline on the hub that can be reached"):
        load_denoiser("nobody/nothing")
    with pytest.raises(ValueError, match="is not a model"):
        load_denoiser(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="a file of unknown kind"):
        load_denoiser(tmp_path / "notes.txt")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        load_denoiser(tmp_path / "weights.pt")
    tiny_unet().save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"has no scheduler_config\.json"):
        load_denoiser(tmp_path / "alone")
    pipe: StableDiffusionPipeline = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        load_denoiser(tmp_path / "sd", dtype="float8")
    with pytest.raises(ValueError, match=r"cannot be loaded with promts: .* the options are prompts, "):
        load_denoiser(tmp_path / "sd", promts=PROMPTS)
    with pytest.raises(ValueError, match="holds a AutoencoderKL"):
        load_denoiser(tmp_path / "sd" / "vae")


def test_description_file(tmp_path: Path) -> None:
    """A YAML file, or the folder it is in, stands for a model and its options wherever a path is taken."""
    tiny_pipeline("sd").save_pretrained(tmp_path / "models" / "sd")
    (tmp_path / "models" / "prompts.txt").write_text("a cat\ndog\n")
    file = tmp_path / "models" / "denoiser.yaml"
    file.write_text("path: sd\nprompts: prompts.txt\nnegative_prompt: bad\n")
    inside = tmp_path / "models" / "sd" / "denoiser.yaml"
    inside.write_text(f"prompts: {tmp_path}/models/prompts.txt\n")
    for path in (file, file.parent, inside.parent):
        denoiser = load_denoiser(path, guidance_scale=2.0)
        assert denoiser.guidance_scale == 2.0
        assert len(denoiser.conditions["null"]["encoder_hidden_states"]) == 2
    for text, message in (
        ("- a", "describes no model"),
        ("path: [", "is not valid YAML"),
        ("guidance_scale: 2", "sets guidance_scale, which belong to the run"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_denoiser(file)
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        load_denoiser(tmp_path / "none.yaml")


def test_dotted_names() -> None:
    """A class or function of the user's own stands for a path."""
    assert load_denoiser("tests.denoisers.test_adapters.pixels").sample_shape == (3, 8, 8)
    for name in ("tests.denoisers.test_adapters.none", "nowhere.Missing", "weights.pt"):
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            load_denoiser(name)
    with pytest.raises(ValueError, match="is no denoiser"):
        load_denoiser("torch.nn.Identity")


def test_a_file_chooses_no_code(tmp_path: Path) -> None:
    """Nothing is imported or called for a description that is not trusted; a trusted one gives arguments."""
    ran = tmp_path / "ran"
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "denoiser.yaml"
    file.write_text(f"path: os.system\ncommand: touch {ran}\n")
    for path in (file, file.parent):
        with pytest.raises(ValueError, match=r"names os\.system, which is no model on disk: .* trust_remote_code=True"):
            load_denoiser(path)
    with pytest.raises(ValueError, match="neither a folder here nor a pipeline on the hub"):
        load_encoders(file.parent)
    assert not ran.exists()
    with pytest.raises(ValueError, match="is no denoiser"):
        load_denoiser(file, trust_remote_code=True)
    assert ran.exists()
    file.write_text("path: tests.denoisers.test_adapters.pixels\nheight: 12\nwidth: 16\n")
    assert load_denoiser(file.parent, trust_remote_code=True).sample_shape == (3, 12, 16)
    file.write_text("path: tests.denoisers.test_adapters.pixels\ntrust_remote_code: true\n")
    with pytest.raises(ValueError, match="sets trust_remote_code, which belong to the run"):
        load_denoiser(file.parent)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("path", ["os.system", "tests.denoisers.test_adapters.pixels", "../other"])
def test_a_description_does_not_win_over_the_model_beside_it(tmp_path: Path, trust: bool, path: str) -> None:
    for name in ("mine", "other"):
        tiny_pipeline("sd").save_pretrained(tmp_path / name)
    for folder in (tmp_path / "mine", tmp_path / "mine" / "unet"):
        (folder / "denoiser.yaml").write_text(f"path: {path}\n")
        with pytest.raises(ValueError, match=r"beside it is a model itself: remove that line or that file"):
            load_denoiser(folder, trust_remote_code=trust)
    (tmp_path / "mine" / "unet" / "denoiser.yaml").write_text("path: ..\n")
    assert load_denoiser(tmp_path / "mine" / "unet").sample_shape == (4, 8, 8)


NESTED = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 41))  # a text of 2^40 letters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: [1]", r"says path: \[1\]: write path: str"),
        ("path: null", "says path: None: write path: str"),
        ("path: 7", "says path: 7: write path: str"),
        ("1: sd", "says 1: sd: write names of options, which are text"),
        ("null: sd", "says None: sd: write names of options, which are text"),
        ("height: '32'", "says height: 32: write height: int"),
        ("decoder: 1", "says decoder: 1: write decoder: bool"),
        ("prompts: 3", "says prompts: 3: write prompts: str or list"),
        ("dtype: {a: 1}", "says dtype: .*: write dtype: str"),
        ("device: gpux", "device 'gpux' is none that torch knows"),
        ("path: 2020-13-45", "is not valid YAML|says path"),
        ("path: " + "[" * 5000, "is not valid YAML"),
        ("path: " + "a" * 5000, "is no model on disk"),
        ("path: \x00", "is not valid YAML"),
        (f"a0: &a0 [x]\n{NESTED}path: *a40", "says path: .*: write path: str"),
    ],
)
def test_descriptions_of_wrong_types_get_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "denoiser.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_denoiser(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def pixels(**options: int) -> torch.nn.Module:
    return from_network(tiny_unet(), DDIMScheduler(), **options, vae_scale=1)


@pytest.mark.parametrize("kind", [*KINDS, *FURTHER_KINDS])
def test_decoder(kind: str, tmp_path: Path) -> None:
    """`decode` gives the pipeline's images; the autoencoder is no part of the denoiser's weights."""
    pipe, wide = tiny_pipeline(kind), size(kind) | {"width": 32}
    pipe.save_pretrained(tmp_path)
    denoiser = load_denoiser(tmp_path, **wide, decoder=True)
    states = start_noise([0, 1], denoiser.sample_shape)
    latents = pipe._unpack_latents(states, 16, 32, 2) if kind in ("flux", "qwen") else states
    if kind in FURTHER_KINDS:
        mean, deviation = (
            torch.tensor(pipe.vae.config[f"latents_{name}"])[:, None, None, None] for name in ("mean", "std")
        )
        latents = latents * deviation + mean
    else:
        latents = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0)
    expected = pipe.vae.decode(latents).sample
    assert torch.allclose(denoiser.decode(states), expected[:, :, 0] if kind == "qwen" else expected, atol=1e-5)
    assert denoiser.state_dict().keys() == from_pipeline(pipe, **wide).state_dict().keys()
    assert not hasattr(load_denoiser(tmp_path, **wide), "decode")


def test_pictures_have_no_frames() -> None:
    with pytest.raises(ValueError, match="SD3Transformer2DModel makes pictures: leave num_frames 5 out"):
        from_pipeline(tiny_pipeline("sd3"), num_frames=5)
