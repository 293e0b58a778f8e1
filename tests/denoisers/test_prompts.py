"""Prompts as the pipelines' own networks get them."""

from typing import Any

import pytest
import torch

from denoisers.prompts import MASK, encode_prompts
from tests.tiny_pipelines import tiny_pipeline

PROMPTS = ["a cat", "a very small dog"]
CALL = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}


def told(pipe: Any, **call: Any) -> list[dict[str, Any]]:
    """What the transformer is called with, first of the prompts, then of the negative one."""
    found: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs), with_kwargs=True
    )
    pipe(PROMPTS, **CALL | call)
    hook.remove()
    return found


@pytest.mark.parametrize(("negative", "wanted"), [(None, ""), ("bad", "bad")])
def test_wan(negative: str | None, wanted: str) -> None:
    pipe = tiny_pipeline("wan")
    condition = encode_prompts(pipe, PROMPTS, negative, denoiser=object(), max_sequence_length=20)  # type: ignore
    calls = told(pipe, negative_prompt=wanted, guidance_scale=3.0, num_frames=1, max_sequence_length=20)
    for found, call in zip((condition, condition["null"]), calls, strict=True):
        assert torch.equal(found["encoder_hidden_states"], call["encoder_hidden_states"])
    assert condition["encoder_hidden_states"].shape == (2, 20, 16)
    assert not torch.equal(*(one["encoder_hidden_states"] for one in calls))


def test_qwen_is_padded_to_one_length() -> None:
    pipe = tiny_pipeline("qwen")
    calls = told(pipe, negative_prompt=["bad", "bad"], true_cfg_scale=3.0)
    longest = calls[0]["encoder_hidden_states"].shape[1]
    for batch in (1, 2):  # alone no prompt needs a mask, and each is as long as it is
        condition = encode_prompts(
            pipe,
            PROMPTS,
            "bad",
            denoiser=object(),
            batch_size=batch,
            max_sequence_length=longest + 9,  # type: ignore
        )
        for found, call in zip((condition, condition["null"]), calls, strict=True):
            length = call["encoder_hidden_states"].shape[1]
            assert found["encoder_hidden_states"].shape == (2, longest + 9, 16)
            assert (found["encoder_hidden_states"][:, :length] - call["encoder_hidden_states"]).abs().max() < 1e-5
            assert not found["encoder_hidden_states"][:, length:].any()
            mask = call["encoder_hidden_states_mask"]
            assert torch.equal(found[MASK][:, :length], torch.ones(2, length).long() if mask is None else mask)
            assert not found[MASK][:, length:].any()


@torch.no_grad()
def test_qwen_s_network_does_not_mind_the_padding() -> None:
    pipe = tiny_pipeline("qwen")
    call = told(pipe)[0]
    longer = call["encoder_hidden_states"].shape[1] + 9
    condition = encode_prompts(pipe, PROMPTS, denoiser=object(), max_sequence_length=longer)  # type: ignore[arg-type]
    assert condition.keys() == {"encoder_hidden_states", MASK}
    padded, plain = (pipe.transformer(**arguments)[0] for arguments in (call | condition, call))
    assert (padded - plain).abs().max() < 1e-5 * plain.abs().max()


@pytest.mark.parametrize("is_installed", [True, False])
def test_captions_are_cleaned_where_the_pipeline_cleans_them(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline("pixart")
    for module in ("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha", "denoisers.prompts"):
        for name in ("is_bs4_available", "is_ftfy_available"):
            monkeypatch.setattr(f"{module}.{name}", lambda: is_installed)
    monkeypatch.setattr(type(pipe), "_clean_caption", lambda self, caption: caption.replace("small", "dog"))
    (call,) = told(pipe, guidance_scale=1.0, use_resolution_binning=False)
    condition = encode_prompts(pipe, PROMPTS)
    assert torch.equal(condition["encoder_hidden_states"], call["encoder_hidden_states"])
    plain = encode_prompts(pipe, PROMPTS, clean_caption=False)
    assert torch.equal(condition["encoder_hidden_states"], plain["encoder_hidden_states"]) != is_installed


@pytest.mark.parametrize("kind", ["wan", "qwen"])
def test_prompts_are_as_long_as_a_call_of_the_pipeline_allows(kind: str) -> None:
    condition = encode_prompts(tiny_pipeline(kind), PROMPTS, denoiser=object())  # type: ignore[arg-type]
    assert condition["encoder_hidden_states"].shape[1] == 512
