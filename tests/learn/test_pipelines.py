"""Pipelines whole: by adapters and by recording, in Python and from a folder, and saved again."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline

from learn import learn
from learn.cli import main
from learn.models import open_subject
from learn.options import LearnOptions
from learn.pipelines import RecordedSubject
from learn.report import _pictures, small
from solvers import accelerate_pipeline
from tests.tiny_pipelines import call_arguments, tiny_pipeline, tiny_unet

PROMPTS = ["a cat", "a dog"]
PASSED = ("guidance_scale", "num_inference_steps", "prompt", "class_labels", "output_type")


def arguments(kind):
    """Of a call, those that learning is told as `call`."""
    return {k: v for k, v in call_arguments(kind, PROMPTS, 3.0, 4).items() if k not in PASSED}


def learned(kind, folder, pipe=None, **options):
    given = {
        "calls": [4],
        "trajectories": 2,
        "teacher": "unipc:6",
        "method": "olss",
        "device": "cpu",
        "guidance_scale": 3.0,
    }
    prompts = None if kind == "dit" else PROMPTS
    pipe = tiny_pipeline(kind) if pipe is None else pipe
    return learn(pipe, prompts, output=folder, call=arguments(kind), **given | options)


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
    values = {"pipe": tiny_pipeline("sd")}
    assert result.usage[-1].endswith(f"# steps: {result.table(4).num_rows} for 4 calls")
    exec("\n".join(result.usage), values)
    assert len(values["result"].images) == 1


def test_solvers_that_leave_calls_out_are_all_in_one_pipeline_and_one_folder(tmp_path):
    result = learned("sd", tmp_path, calls=[4, 6])
    tables = {count: result.table(count) for count in (4, 6)}
    assert tables[4].num_rows != tables[6].num_rows
    assert all(table.nfe < 2 * table.num_rows for table in tables.values())
    other = tiny_pipeline("sd")
    accelerate_pipeline(other, tmp_path / "scheduler", guidance_scale=3.0)
    for faster in (result.pipeline, other):
        for count, table in tables.items():
            before = faster.unet.network_calls
            assert torch.as_tensor(pictures(faster, "sd", table.num_rows)).isfinite().all()
            assert faster.unet.network_calls - before == 2 * count


@pytest.mark.slow
def test_the_printed_lines_load_a_saved_pipeline_in_a_fresh_process(tmp_path):
    """Without this project: isolated, in another folder."""
    result = learned("sd", tmp_path / "out", save_pipeline=str(tmp_path / "saved"))
    lines = [*result.usage, "import numpy; numpy.save('found.npy', numpy.asarray(result.images[0]))"]
    (tmp_path / "use.py").write_text("\n".join(["import torch; torch.manual_seed(0)", *lines]))
    done = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    call = {"num_inference_steps": result.table(4).num_rows, "guidance_scale": 3.0, "height": 16, "width": 16}
    expected = np.asarray(result.pipeline(PROMPTS[0], **call).images[0], dtype=float)
    assert np.abs(np.load(tmp_path / "found.npy") - expected).max() <= 1


def test_a_saved_pipeline_brings_the_scheduler_along(tmp_path, capsys):
    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "denoiser.yaml").write_text("prompts: [other]\n")  # what is asked for counts
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--calls", "4", "8", "--guidance_scale", "3", "--prompts", tmp_path / "prompts.txt", "--call", "height=16"]
    words += ["width=16", "--trajectories", "2", "--teacher", "unipc:6", "--method", "olss", "--device", "cpu"]
    words += ["--output", tmp_path / "out", "--save_pipeline", tmp_path / "saved"]
    capsys.readouterr()
    main([str(tmp_path / "model"), *map(str, words)])
    printed, log = capsys.readouterr()
    assert "%|" not in log
    assert "every row is guided, two calls" in printed
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert lines[1].endswith('saved", trust_remote_code=True)')
    assert lines[2].endswith("# steps: 2 for 4 calls, 4 for 8 calls")
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


def test_a_pipeline_that_would_not_load_its_solver_is_refused_before_anything_is_made(tmp_path):
    pipe = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="a saved DDIMPipeline makes a scheduler of diffusers"):
        learn(pipe, calls=[4], device="cpu", output=tmp_path / "out", save_pipeline=str(tmp_path / "saved"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="are for diffusers pipelines"):
        learn(tmp_path, PROMPTS, calls=[2])
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="neither a folder here nor a pipeline"):
        learn(tmp_path, PROMPTS, calls=[2])


def recorded():
    call = {"eta": 0.0, "height": 16, "width": 16}
    return open_subject(tiny_pipeline("sd"), LearnOptions(prompts=PROMPTS, teacher="own:4", device="cpu", call=call))


def test_pictures_of_a_recorded_pipeline_are_decoded():
    subject = recorded()
    run = subject.run(range(2))
    assert _pictures(subject, run, [run.end])[0].shape == (2, 3, 16, 16)


def test_a_decoder_that_fails_does_not_cost_the_report(capsys):
    subject = recorded()
    run = subject.run(range(2))
    subject.pipe.vae = None
    assert torch.equal(_pictures(subject, run, [run.end])[0], run.end)
    assert "the report shows latents: StableDiffusionPipeline could not decode them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3, 600, 300), (200, 100)),
        ((1, 3, 5, 512, 512), (256, 256)),
        ((2, 3, 8, 8), (8, 8)),
        ((2, 1, 900), (1, 900)),
    ],
)
def test_large_pictures_are_made_small(shape, expected):
    found = small(torch.ones(shape))
    assert found.shape == (*shape[:-2], *expected)
    assert torch.allclose(found, torch.ones(()))
