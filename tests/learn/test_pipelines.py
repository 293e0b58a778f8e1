"""Pipelines whole: by adapters and by recording, in Python and from a folder, and saved again."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from learn import learn
from learn.cli import main
from learn.models import open_subject
from learn.options import LearnOptions
from learn.pipelines import RecordedSubject
from tests.tiny_pipelines import call_arguments, tiny_pipeline

PROMPTS = ["a cat", "a dog"]
PASSED = ("guidance_scale", "num_inference_steps", "prompt", "class_labels", "output_type")


def arguments(kind):
    """Of a call, those that learning is told as `call`."""
    return {k: v for k, v in call_arguments(kind, PROMPTS, 3.0, 4).items() if k not in PASSED}


def learned(kind, folder, pipe=None, **options):
    given = {"trajectories": 2, "teacher": "unipc:6", "method": "olss", "device": "cpu", "guidance_scale": 3.0}
    prompts = None if kind == "dit" else PROMPTS
    pipe = tiny_pipeline(kind) if pipe is None else pipe
    return learn(pipe, prompts, calls=[4], output=folder, call=arguments(kind), **given | options)


def pictures(pipe, kind, steps):
    args = call_arguments(kind, PROMPTS, 3.0, steps)
    return pipe(**args, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("learn.fits.ROUNDS", 0)


def test_guidance_is_split_where_the_pipeline_can_run_it(tmp_path):
    pipe = tiny_pipeline("sd")
    result = learned("sd", tmp_path, pipe)
    own, faster = pipe.scheduler, result.pipeline
    assert result.table(4).has_branches
    assert torch.as_tensor(pictures(faster, "sd", result.table(4).num_rows)).isfinite().all()
    assert faster.unet.network_calls == 2 * 4
    assert pipe.scheduler is own
    assert "accelerate_pipeline" in "\n".join(result.usage)


def test_a_saved_pipeline_brings_the_scheduler_along(tmp_path, capsys):
    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--calls", "4", "8", "--guidance_scale", "3", "--prompts", tmp_path / "prompts.txt", "--call", "height=16"]
    words += ["width=16", "--trajectories", "2", "--teacher", "unipc:6", "--method", "olss", "--device", "cpu"]
    words += ["--output", tmp_path / "out", "--save_pipeline", tmp_path / "saved"]
    main([str(tmp_path / "model"), *map(str, words)])
    printed = capsys.readouterr().out
    assert "TableScheduler.from_pretrained" in printed
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    for steps in (2, 4):
        assert torch.as_tensor(pictures(again, "sd", steps)).isfinite().all()
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert len(config["tables"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "dit", "sd3", "flux"])
def test_every_family_with_an_adapter(kind, tmp_path):
    result = learned(kind, tmp_path)
    assert not isinstance(result.subject, RecordedSubject)
    images = pictures(result.pipeline, kind, result.table(4).num_rows)
    assert torch.as_tensor(images).isfinite().all()


def test_what_an_adapter_does_not_know_is_recorded(tmp_path):
    """PixArt's call here asks for more than its adapter knows."""
    result = learned("pixart", tmp_path, teacher="own:6")
    assert isinstance(result.subject, RecordedSubject)
    assert result.table(4).num_rows == 4
    assert torch.as_tensor(pictures(result.pipeline, "pixart", 4)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompts": None}, "takes prompts: give a text file"),
        ({"call": {"colour": "red"}}, "takes no colour"),
        ({"prompts": []}, "at least one"),
        ({"teacher": "magic:3"}, "unknown solver 'magic'"),
        ({"call": {"eta": 0.0}, "teacher": "unipc:6"}, "recorded with its own scheduler"),
    ],
)
def test_bad_input(options, reason):
    with pytest.raises(ValueError, match=reason):
        open_subject(tiny_pipeline("sd"), LearnOptions(**{"prompts": PROMPTS, "device": "cpu"} | options))


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="are for diffusers pipelines"):
        learn(tmp_path, PROMPTS, calls=[2])
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="neither a folder here nor a pipeline"):
        learn(tmp_path, PROMPTS, calls=[2])
