"""`sample.py evaluate`: pictures that are there already."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from evaluation import folder as module
from evaluation.args import EvaluateArgs
from evaluation.extractors import load_extractor
from evaluation.folder import evaluate
from evaluation.metrics import choose_metrics
from evaluation.parts import Parts
from evaluation.sources import find_pictures
from evaluation.statistics import find_statistics
from solvers.files import claimed
from tests.evaluation.helpers import in_processes
from tests.evaluation.test_sources import as_npz

CLASSIFIER = "checkpoints/fashion-classifier"
PIXELS = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 1), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    as_npz(tmp_path / "made" / "samples.npz", arr_0=PIXELS.repeat(3, -1))
    as_npz(tmp_path / "wanted.npz", arr_0=PIXELS.repeat(3, -1) // 2)
    return tmp_path / "made"


def run(pictures, **options):
    given = {"extractor": CLASSIFIER, "bootstrap": 20, "output": str(pictures.parent / "out")} | options
    return evaluate(EvaluateArgs(str(pictures), **given))


def expected(pictures):
    network = load_extractor(CLASSIFIER)
    statistics = find_statistics(None, network, CLASSIFIER)
    measure = choose_metrics(None, [(network, statistics)], 70, (3, 32, 32))
    values = measure.values(find_pictures(pictures).read(range(70)).float() / 127.5 - 1)
    return measure.figures({name: Parts.of(value) for name, value in values.items()}, 20)


def test_figures_are_those_of_the_pictures(pictures, capsys):
    found, wanted = run(pictures), expected(pictures)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert set(wanted) > {"fd", "fd_low", "kid", "precision", "inception_score"}
    assert found["num_images"] == 70
    assert found["spaces"][0]["extractor"] == "fashion-classifier"
    assert json.loads((pictures.parent / "out" / "evaluation.json").read_text()) == found
    assert [path.name for path in (pictures.parent / "out").iterdir()] == ["evaluation.json"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FD ")
    assert lines[-1].startswith("written:")


def test_it_goes_on_where_it_was_broken_off(pictures, monkeypatch):
    whole = run(pictures)
    (pictures.parent / "out" / "evaluation.json").unlink()
    write, left = module.write_tensors, [2]

    def failing(path, values):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, values)

    monkeypatch.setattr(module, "write_tensors", failing)
    with pytest.raises(KeyboardInterrupt):
        run(pictures)
    left[0] = 1  # of three blocks one is missing
    assert run(pictures) == whole
    left[0] = 3
    as_npz(pictures / "samples.npz", arr_0=(255 - PIXELS).repeat(3, -1))
    assert run(pictures)["fd"] != whole["fd"]


def test_processes_share_the_pictures(pictures):
    whole = run(pictures)
    first, second = in_processes(lambda rank: run(pictures), 2, pictures.parent / "work")
    assert second == {}
    assert (first["fd"], first["kid_high"]) == pytest.approx((whole["fd"], whole["kid_high"]), rel=1e-9)


def test_pictures_beside_a_reference_and_prompts(pictures, monkeypatch):
    class Judge(torch.nn.Module):
        identity = {"name": "judge"}

        def forward(self, images, reference, prompts):
            return images.flatten(1).mean(1) - reference.flatten(1).mean(1) + torch.tensor([len(p) for p in prompts])

    monkeypatch.setattr(module, "load_judges", lambda *names: {"lpips": Judge(), "clip_score": Judge()})
    prompts = pictures.parent / "prompts.txt"
    prompts.write_text("\n".join("x" * (index % 7) for index in range(70)))
    options = {"reference": str(pictures.parent / "wanted.npz"), "prompts": str(prompts), "batch_size": 9}
    found = run(pictures, metrics=["rmse", "lpips", "clip_score"], **options)
    first, second = (torch.from_numpy(p).double() / 127.5 - 1 for p in (PIXELS, PIXELS // 2))
    assert found["rmse"] == pytest.approx(float((first - second).square().mean().sqrt()), rel=1e-5)
    assert found["lpips"] == pytest.approx(float((first - second).mean()) + 3, rel=1e-5)
    assert found["lpips_low"] < found["lpips"] < found["lpips_high"]
    assert found["spaces"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["lpips"]}, "lpips was asked for: give --reference"),
        ({"metrics": ["clip_score"]}, "clip_score was asked for: give --prompts"),
        ({"prompts": "short.txt"}, "there are 70 pictures and 2 prompts: give one for each"),
        ({"extractor": [CLASSIFIER, CLASSIFIER]}, "name each once"),
        ({"statistics": ["a", "b"]}, "one source or one each"),
        ({"extractor": "checkpoints/cifar10-classifier", "statistics": CLASSIFIER}, "has no pictures"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_errors(pictures, monkeypatch, options, message):
    monkeypatch.setattr(module, "load_judges", lambda metrics, *names: dict.fromkeys(metrics or (), torch.nn.Module()))
    (pictures.parent / "short.txt").write_text("a\nb\n")
    options = {name: str(pictures.parent / value) if name == "prompts" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        run(pictures, **options)
    assert not (pictures.parent / "out").exists()


def test_one_process_writes_to_a_folder(pictures):
    with claimed(pictures.parent / "out"), pytest.raises(ValueError, match="another process writes to"):
        run(pictures)


def test_the_command_line_measures_what_it_generated(tmp_path, capsys):
    """The model's name chooses the classifier."""
    made, output = tmp_path / "made", tmp_path / "out"
    model = Path("checkpoints/fashion-sit")
    given = ["--denoiser", str(model), "--solver", "unipc:1", "--num_samples", "6", "--format", "png"]
    sample.main(["generate", *given, "--output", str(made)])
    sample.main(["evaluate", "--samples", str(made), "--metrics", "kid", "inception_score", "--output", str(output)])
    found = json.loads((output / "evaluation.json").read_text())
    assert found["num_images"] == 6
    assert found["kid_low"] < found["kid"] < found["kid_high"]
    assert found["spaces"][0]["extractor"] == "fashion-classifier"
    with pytest.raises(SystemExit):
        sample.main(["evaluate", "--samples", str(tmp_path / "nowhere")])
    assert "error: " in capsys.readouterr().err
