"""The command: from paths and names to a report."""

import json
from dataclasses import replace

import pytest
import torch

import sample
from denoisers import load_denoiser
from denoisers.checkpoint import save_denoiser
from denoisers.dit import DiT
from evaluation.args import CompareArgs
from evaluation.compare import compare
from evaluation.contenders import load_groups
from solvers import DenoiserIdentity, NoiseSchedule, save_solver
from solvers.named import named_solver


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny network, artifacts for guidance 1 and 1 to 2, and a student."""
    folder = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    network = DiT(NoiseSchedule.linear(), 8, 4, 1, 32, 1, 2)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    weight_hash = save_denoiser(network, folder / "model")
    torch.nn.init.normal_(network.final_layer.linear.bias, std=0.5)
    save_denoiser(network, folder / "student")
    table = named_solver("unipc:3", network.schedule)
    own = DenoiserIdentity(network.schedule, weight_hash=weight_hash)
    fitted_on = {"seeds": [[2**31, 2**31 + 64]], "seconds": 12.5}
    save_solver(table, folder / "one.json", own, method="olss", fitted_on=fitted_on)
    save_solver(table, folder / "range.json", replace(own, guidance_scale=(1.0, 2.0)), method="olss")
    save_solver(
        table,
        folder / "student.json",
        DenoiserIdentity(network.schedule),
        method="slam",
        fitted_on={"guidance_scale": 1.5},
        student="student/model.safetensors",
    )
    return folder


def run(folder, output, *solvers, **options):
    settings = {"reference": "ddim:6", "num_samples": 6, "cache": str(output / "cache"), **options}
    return compare(CompareArgs(str(folder / "model"), list(solvers), output=str(output / "out"), **settings))


@pytest.mark.parametrize(("teachers", "expected"), [(["unipc:5"], "unipc:5"), (["own:5"], "ddim:100")])
def test_the_reference_defaults_to_the_teacher_of_the_fit(folder, tmp_path, teachers, expected):
    table = named_solver("unipc:3", NoiseSchedule.linear())
    for teacher in teachers:
        own = DenoiserIdentity(NoiseSchedule.linear())
        save_solver(table, tmp_path / f"{teacher[:3]}.json", own, method="olss", fitted_on={"teacher": teacher})
    paths = [f"{path}{run}" for path in tmp_path.glob("*.json") for run in ("", "+parataa")]
    (group,) = load_groups(CompareArgs(str(folder / "model"), paths), samplers={"parataa": sample.compare})
    assert group.reference.name == expected


def test_artifacts_and_names_side_by_side(folder, tmp_path):
    rows = run(folder, tmp_path, str(folder / "one.json"), "unipc:3", "ddim:3")
    assert [row["method"] for row in rows] == ["baseline", "olss", "baseline", "baseline"]
    assert rows[1]["rmse"] == rows[2]["rmse"] > 0
    assert rows[1]["rmse"] != rows[3]["rmse"]
    assert rows[1]["fitting_seconds"] == 12.5
    assert rows[0]["fd"] is None
    settings = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert settings["metrics"] is None
    assert settings["spaces"] == []
    assert "takes images (3, 32, 32), the model makes (1, 8, 8)" in (tmp_path / "out" / "report.md").read_text()


def test_a_models_name_chooses_the_features(tmp_path):
    save_denoiser(DiT(NoiseSchedule.flow(), 32, 16, 1, 16, 1, 1), tmp_path / "model" / "fashion-tiny")
    options = {"reference": "euler:3", "num_samples": 65, "bootstrap": 0, "cache": str(tmp_path / "cache")}
    model = str(tmp_path / "model" / "fashion-tiny")
    rows = compare(CompareArgs(model, ["euler:2"], output=str(tmp_path / "out"), **options))
    assert (
        json.loads((tmp_path / "out" / "comparison.json").read_text())["spaces"][0]["extractor"] == "fashion-classifier"
    )
    assert all(row["fd"] > 0 for row in rows)


def test_the_command_line_runs_solvers_in_parallel_rounds(folder, tmp_path):
    one = str(folder / "one.json")
    options = ["--reference", "ddim:6", "--num_samples", "4", "--cache", str(tmp_path / "cache")]
    solvers = [one, one + "+parataa", "ddim:6+parataa"]
    output = tmp_path / "out"
    sample.main(
        ["compare", "--denoiser", str(folder / "model"), "--solvers", *solvers, *options, "--output", str(output)]
    )
    rows = json.loads((output / "report.json").read_text())
    assert [row["solver"] for row in rows] == ["ddim:6", *solvers]
    assert rows[2]["rmse"] == pytest.approx(rows[1]["rmse"], rel=0.05)
    assert rows[3]["rmse"] < 0.05
    assert rows[3]["rounds"] <= 6 < rows[3]["evaluations"]
    with pytest.raises(SystemExit):
        sample.main(["compare", "--denoiser", str(folder / "model"), "--solvers", "ddim:6+newton", *options])


@pytest.mark.parametrize(
    ("schedule", "expected"), [(NoiseSchedule.linear(), "ddim:100"), (NoiseSchedule.flow(), "euler:100")]
)
def test_the_reference_defaults_to_the_teacher_of_the_schedule(tmp_path, schedule, expected):
    save_denoiser(DiT(schedule, 8, 4, 1, 32, 1, 2), tmp_path / "model")
    arguments = ["compare", "--denoiser", str(tmp_path / "model"), "--solvers", "dpmpp:3", "--num_samples", "2"]
    sample.main([*arguments, "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["solver"], row["is_reference"]) for row in rows] == [(expected, True), ("dpmpp:3", False)]


def test_guidance_zero_is_a_scale_of_its_own(folder):
    (group,) = load_groups(CompareArgs(str(folder / "model"), ["ddim:3"], guidance_scale=0))
    assert group.reference.guidance_scale == group.reference.denoiser.guidance_scale == 0


def test_each_artifact_runs_at_its_scales(folder):
    paths = [str(folder / name) for name in ("one.json", "range.json", "student.json")]
    groups = load_groups(CompareArgs(str(folder / "model"), [*paths, "ddim:3"], guidance_scale=[1.0, 1.5]))
    assert [[c.name.split("/")[-1] for c in group.contenders] for group in groups] == [
        ["one.json", "range.json", "ddim:3"],
        ["range.json", "student.json", "ddim:3"],
    ]
    strong, student = groups[1].contenders[0].denoiser, groups[1].contenders[1].denoiser
    assert getattr(strong, "guidance_scale", 1.0) == 1.5
    assert getattr(student, "guidance_scale", 1.0) == 1.0
    x = torch.randn(2, 1, 8, 8)
    call = (x, torch.tensor(500.0), torch.tensor([1, 2]))
    assert torch.equal(student(*call), load_denoiser(folder / "student")(*call))
    # At scale 1 the two artifacts are the same solver on the same network.
    assert len({contender.key for group in groups for contender in group.contenders}) == 5


def test_scales_default_to_the_artifacts(folder):
    def scales(*names):
        paths = [str(folder / name) if name.endswith("json") else name for name in names]
        groups = load_groups(CompareArgs(str(folder / "model"), paths))
        return [group.reference.guidance_scale for group in groups]

    assert scales("ddim:3") == [1.0]
    assert scales("student.json", "ddim:3") == [1.5]
    assert scales("range.json") == [1.0]
    with pytest.raises(ValueError, match=r"guidance scales \[1.0, 1.5\]: choose with --guidance_scale"):
        scales("one.json", "student.json")


def test_the_command_line_writes_reports_and_errors_in_a_line(folder, tmp_path, capsys):
    arguments = ["compare", f"--denoiser={folder / 'model'}", "--reference=ddim:6", "--num_samples=4"]
    arguments += [f"--output={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}", "--metrics=[rmse]"]
    sample.main([*arguments, '--solvers=["ddim:2", "ddim:3"]'])
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["solver"] for row in rows] == ["ddim:6", "ddim:2", "ddim:3"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.json",
        "comparison.png",
        "report.html",
        "report.json",
        "report.md",
        "rows",
    }
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sample.main([*arguments, '--solvers=["ddim:2"]'])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "ddim:3" in lines[0]


@pytest.mark.parametrize(
    ("solvers", "options", "message"),
    [
        (["ddim:3", "ddim:3"], {}, "named twice"),
        ([], {}, "no solvers to compare"),
        (["nothing:3"], {}, "nothing"),
        (["one.json"], {"guidance_scale": [2.0]}, "was made for guidance scale 1.0, not for"),
        (["one.json"], {"seed": 2**31 + 60}, "overlap the evaluation seeds"),
        (["ddim:3"], {"metrics": ["fd"]}, "fd was asked for: the extractor cifar10-classifier takes images"),
        (["ddim:3"], {"num_samples": 0}, "num_samples is 0: give at least 1"),
        (["ddim:3"], {"batch_size": 0}, "batch_size is 0: give at least 1"),
        (["ddim:3"], {"bootstrap": -1}, "bootstrap is -1: give at least 0"),
        (["ddim:3"], {"guidance_scale": []}, "guidance_scale is an empty list"),
        (["ddim:3"], {"seed": -3}, "seed -3 is outside 0 to"),
        (["ddim:3"], {"seed": 2**32 - 2}, "seed 4294967299 is outside 0 to"),
        (["ddim:3"], {"statistics": "checkpoints/solvers"}, "has no pictures"),
        (["ddim:3"], {"extractor": "nowhere", "metrics": ["kid"]}, "the extractor nowhere cannot be loaded"),
    ],
)
def test_errors_leave_no_folder_behind(folder, tmp_path, solvers, options, message):
    paths = [str(folder / name) if name.endswith("json") else name for name in solvers]
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path, *paths, **options)
    assert not (tmp_path / "out").exists()


def test_the_precision_reaches_the_networks(folder, tmp_path):
    exact = run(folder, tmp_path / "a", "unipc:3")
    rounded = run(folder, tmp_path / "b", "unipc:3", precision="bf16")
    assert rounded[1]["rmse"] != exact[1]["rmse"]
    assert rounded[1]["rmse"] == pytest.approx(exact[1]["rmse"], rel=0.1)


def test_a_refitted_artifact_takes_the_place_of_the_old_one(folder, tmp_path):
    path = tmp_path / "mine.json"
    schedule = load_denoiser(folder / "model").schedule

    def fitted(name):
        save_solver(named_solver(name, schedule), path, DenoiserIdentity(schedule), method="olss")
        return run(folder, tmp_path, str(path), "ddim:2")

    first, second = fitted("ddim:3"), fitted("unipc:3")
    assert [row["solver"] for row in second] == [row["solver"] for row in first]
    assert second[1]["rmse"] != first[1]["rmse"]
    assert second[2]["rmse"] == first[2]["rmse"]


def test_a_solver_that_fails_can_be_left_out(folder, tmp_path):
    schedule = load_denoiser(folder / "model").schedule
    table = named_solver("ddim:3", schedule)
    huge = replace(table, output_coef=table.output_coef * 1e30)
    save_solver(huge, tmp_path / "broken.json", DenoiserIdentity(schedule), method="olss")
    expected = run(folder, tmp_path, "ddim:2")
    with pytest.raises(ValueError, match="NaN or infinity"):
        run(folder, tmp_path, "ddim:2", str(tmp_path / "broken.json"))
    assert run(folder, tmp_path, "ddim:2")[1]["rmse"] == expected[1]["rmse"]


def test_one_path_at_the_end_of_another(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    rows = run(folder, tmp_path, "one.json", str(folder / "one.json"))
    assert rows[1]["rmse"] == rows[2]["rmse"]


def test_the_command_line_says_where_the_report_is_and_what_was_left_out(folder, tmp_path, capsys):
    run(folder, tmp_path, "ddim:2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert lines[-2].startswith("left out: fd")
