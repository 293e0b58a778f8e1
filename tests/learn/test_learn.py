"""The command whole, on a tiny model: what it writes, says, refuses, and does when it is run again."""

import errno
import json
import shutil
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from torch import nn

from data.trajectories import TrajectoryCache
from data.trajectory_writer import TrajectoryWriter
from denoisers import load_denoiser
from learn import learn
from learn.cli import main
from solvers import NoiseSchedule, load_solver
from tests.test_sample import asked_in_call
from tests.tiny_models import tiny_checkpoint

SMALL = ["--trajectories", "4", "--teacher", "unipc:6", "--guidance_scale", "1.5", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), NoiseSchedule.flow())


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A finished run and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        for name in ("ROUNDS", "STEPS"):
            patch.setattr(f"learn.fits.{name}", 1)
        main([str(model), "--calls", "2", "3", "--output", str(folder / "out"), *SMALL])
    return folder / "out", printed.getvalue()


def fails(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, args)))
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(("has_units", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_dtype_auto_is_bfloat16_where_there_are_units_for_it(model, tmp_path, monkeypatch, has_units, dtype):
    asked = []
    monkeypatch.setattr("learn.run.has_bf16_units", lambda device: asked.append(device.type) or has_units)
    learn(
        model, calls=[2], trajectories=2, teacher="unipc:4", method="olss", dtype="auto", device="cpu", output=tmp_path
    )
    assert asked == ["cpu"]
    assert json.loads((tmp_path / "learn.json").read_text())["dtype"] == dtype


def test_each_count_has_a_solver_no_worse_than_the_usual_ones(run, model):
    folder, _ = run
    denoiser, rows = load_denoiser(model, 1.5), json.loads((folder / "report.json").read_text())
    assert rows[-1]["is_learned"]
    for row in rows:
        table = load_solver(folder / f"solver-{row['calls']}.json", denoiser)
        assert table.nfe == row["network_calls"] <= row["calls"]
        assert 0 < row["standard_error"] < row["error"]
        if row["is_learned"]:
            assert row["error"] <= min(row["errors"][name] for name in ("unipc", "dpmpp", "euler"))
        else:
            assert row["solver"] in ("unipc", "dpmpp", "euler")
            assert "the learned solver has error" in row["reason"]


def test_the_error_that_is_reported_is_that_of_the_solver(run, model):
    """On the last quarter of the trajectories alone."""
    from solvers import sample

    folder, _ = run
    denoiser, cache = load_denoiser(model, 1.5), TrajectoryCache(folder / "trajectories")
    part = cache.take(range(6, 8))
    for row in json.loads((folder / "report.json").read_text()):
        images = sample(denoiser, load_solver(folder / f"solver-{row['calls']}.json"), part.noise, part.condition)
        error = (images - part.end).double().flatten(1).square().mean(1).sqrt().mean()
        assert float(error) == pytest.approx(row["error"], rel=1e-4)


def test_what_is_printed_says_the_cost_and_the_gain_and_runs(run, model):
    _, printed = run
    assert "cost: 96 network calls to record" in printed
    assert "3 calls of the learned solver are as near to the teacher as" in printed
    assert "network calls a second: at most" in printed
    values = {}
    exec("\n".join(line.strip() for line in printed.splitlines() if line.startswith("    ")), values)
    assert values["images"].shape == (16, 3, 8, 8)
    assert values["images"].isfinite().all()


def test_the_report_holds_pictures_sentences_and_the_curve(run):
    page = (run[0] / "report.html").read_text()
    assert page.count("data:image/png") == 5
    assert "as near to the teacher as" in page
    assert "<svg" in page
    assert "UniPC" in page


def test_nothing_of_the_work_is_left_but_what_a_rerun_needs(run):
    folder, _ = run
    assert {path.name for path in folder.iterdir()} >= {"learn.json", "trajectories", "candidates", "report.html"}
    assert not (folder / "candidates" / "solver-outputs").exists()
    assert not list(folder.rglob(".*"))


def test_a_rerun_learns_only_what_is_missing(run, model, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(run[0], folder)
    monkeypatch.setattr("learn.record.in_pieces", None)
    monkeypatch.setattr("learn.fits._run", None)
    result = learn(
        model, calls=[3, 2], guidance_scale=1.5, trajectories=4, teacher="unipc:6", output=folder, device="cpu"
    )
    before = json.loads((run[0] / "report.json").read_text())
    assert [row["errors"] for row in result.rows] == [row["errors"] for row in before]
    assert result.table(3).nfe == 3
    assert result.report.is_file()
    with pytest.raises(ValueError, match="no solver of 4 calls, only of 2, 3"):
        result.table(4)


def test_another_run_does_not_touch_the_folder(run, model, capsys):
    folder, _ = run
    before = (folder / "report.json").read_bytes()
    error = fails(capsys, model, "--calls", 3, "--output", folder, *SMALL[:-4], "--guidance_scale", 2)
    assert "guidance_scale was 1.5, now 2" in error
    assert (folder / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--calls", 0], "each at least 1"),
        (["--calls", 1], "at least 2 (a guided row makes two)"),
        (["--calls", 12], "fewer than the teacher's 12"),
        (["--trajectories", 1], "trajectories is 1: give at least 2"),
        (["--teacher", "magic:3"], "unknown solver 'magic'"),
        (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--call", "height"], "no key=value"),
        (["--dtype", "float16"], "float16 is for pipelines"),
        (["--device", "tpu9"], "none that torch knows"),
        (["--device", "meta:x"], "none that torch knows"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, capsys, options, reason):
    out = tmp_path / "out"
    assert reason in fails(capsys, model, "--output", out, *SMALL, *options)
    assert not out.exists()


def test_a_missing_model_is_one_line(tmp_path, capsys):
    assert "does not exist" in fails(capsys, tmp_path / "none", "--output", tmp_path / "out")


def test_empty_prompts_are_one_line(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n")
    assert "has no prompts" in fails(capsys, model, "--output", tmp_path / "out", "--prompts", tmp_path / "prompts.txt")


def test_a_full_disk_loses_nothing_recorded(model, tmp_path, capsys, monkeypatch):
    store = TrajectoryWriter.store

    def full(self, shard, value):
        if shard:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path(shard)))
        store(self, shard, value)

    monkeypatch.setattr("learn.subject.SHARD", 4)
    monkeypatch.setattr(TrajectoryWriter, "store", full)
    assert "the disk is full" in fails(capsys, model, "--calls", 3, "--output", tmp_path, *SMALL)
    assert [path.name for path in (tmp_path / "trajectories").glob("*.tar")] == ["shard-00000.tar"]


@pytest.mark.parametrize(("number", "shards"), [(9, 1), (60, 2)])
def test_a_signal_loses_nothing_recorded_and_the_same_command_goes_on(
    number, shards, run, model, tmp_path, capsys, monkeypatch
):
    """While the second shard is recorded, and in the fit."""
    words = [str(model), "--calls", "3", "--output", str(tmp_path), *SMALL]
    for name in ("ROUNDS", "STEPS"):
        monkeypatch.setattr(f"learn.fits.{name}", 1)
    monkeypatch.setattr("learn.subject.SHARD", 4)
    with monkeypatch.context() as patch:
        asked_in_call(patch, number)
        with pytest.raises(SystemExit) as left:
            main(words)
    assert left.value.code == 143
    line = capsys.readouterr().err.splitlines()[-1]
    kept = f"what was recorded and learned stays in {tmp_path}; run the same command to go on"
    assert line == f"stopped by SIGTERM: {kept}"
    assert len(list((tmp_path / "trajectories").glob("*.tar"))) == shards
    assert not (tmp_path / "report.html").exists()
    main(words)
    rows = [json.loads((folder / "report.json").read_text())[-1] for folder in (run[0], tmp_path)]
    assert rows[1]["errors"] == pytest.approx(rows[0]["errors"], rel=1e-3)


class OwnNetwork(torch.nn.Module):
    """A user's own: unconditional, of vectors."""

    schedule, sample_shape = NoiseSchedule.flow(), (6,)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(7, 6)

    def forward(self, x, timestep, condition=None):
        told = timestep.to(x).expand(len(x))[:, None] / 1000
        return torch.tanh(self.layer(torch.cat([x, told], 1)))


@pytest.mark.parametrize("shell", [True, False])
def test_a_network_of_ones_own(tmp_path, capsys, shell):
    options = {"calls": [2], "trajectories": 4, "teacher": "euler:8", "output": tmp_path / "out", "device": "cpu"}
    if shell:
        main(
            [
                f"{__name__}:OwnNetwork",
                *(word for key, value in options.items() for word in (f"--{key}", str(value).strip("[]"))),
            ]
        )
    else:
        learn(OwnNetwork(), **options)
    assert load_solver(tmp_path / "out" / "solver-2.json", OwnNetwork()).nfe == 2
    assert "solver-2.json" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 3


class WithoutForwardDerivatives(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.tanh()


class EDM(nn.Module):
    """As EDM's own networks, whose attention is a function of their own."""

    schedule, sample_shape = NoiseSchedule.edm(), (1, 4, 4)

    def forward(self, x, timestep, condition=None):
        return WithoutForwardDerivatives.apply(x + timestep)


def test_where_no_derivatives_go_through_least_squares_are_left(tmp_path, capsys):
    result = learn(EDM(), calls=[3], trajectories=2, device="cpu", output=tmp_path)
    printed = capsys.readouterr().out
    assert "no search by derivatives, they do not go through EDM: In order to use an autograd.Function" in printed
    assert "teacher dpmpp:30, 30 calls" in printed
    assert set(result.rows[0]["errors"]) >= {"olss", "euler", "dpmpp"}
    assert "solver_search" not in result.rows[0]["errors"]


def test_what_is_no_denoiser_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a Linear, no denoiser"):
        learn(torch.nn.Linear(2, 2), calls=[2], output=tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be found"):
        learn("tests.learn.test_learn:Nothing", calls=[2], output=tmp_path / "out")


def test_help_fits_one_screen(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 36


@pytest.mark.skipif(torch.cuda.is_available(), reason="is there")
def test_a_device_that_is_not_here_is_one_line(model, tmp_path, capsys):
    assert "device cuda is not here" in fails(capsys, model, *SMALL, "--output", tmp_path / "out", "--device", "cuda")
