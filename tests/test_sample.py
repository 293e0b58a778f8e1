"""The sampler's command line, in-process."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import sample
from denoisers import class_labels, load_denoiser
from denoisers.dit import DiT
from solvers import Bands, NoiseSchedule, identify, load_solver, named_solver, save_solver, start_noise
from solvers import sample as run_table
from solvers.files import claimed
from tests.tiny_models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run(*args: object) -> None:
    sample.main([str(arg) for arg in args])


def images_in(folder) -> np.ndarray:
    return np.load(folder / "samples.npz")["samples"]


def fails(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_generate_writes_the_images_of_its_seeds(model, tmp_path):
    run(
        "generate",
        "--denoiser",
        model,
        "--solver",
        "unipc:4",
        "--num_samples",
        5,
        "--seed",
        7,
        "--batch_size",
        2,
        "--output",
        tmp_path,
    )
    denoiser = load_denoiser(model)
    seeds = range(7, 12)
    noise = start_noise(seeds, denoiser.sample_shape)
    expected = run_table(denoiser, named_solver("unipc:4", denoiser.schedule), noise, class_labels(denoiser, seeds))
    np.testing.assert_allclose(images_in(tmp_path), expected.numpy(), rtol=1e-4, atol=1e-3)  # values of hundreds
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["solver"], manifest["nfe"], manifest["seeds"]) == ("unipc:4", 4, list(seeds))
    assert (tmp_path / "grid.png").stat().st_size > 100


def test_parallel_rounds_give_the_sequential_images(model, tmp_path):
    options = ("generate", "--denoiser", model, "--solver", "ddim:6", "--num_samples", 3)
    run(*options, "--output", tmp_path / "one")
    run(*options, "--output", tmp_path / "two", "--sampler", "parataa", "--preview", "true")
    one, two = images_in(tmp_path / "one"), images_in(tmp_path / "two")
    assert np.sqrt(((one - two) ** 2).mean() / (one**2).mean()) < 1e-2
    rounds = json.loads((tmp_path / "two" / "manifest.json").read_text())["rounds"]
    assert len(list((tmp_path / "two" / "preview").iterdir())) == sum(rounds)


def test_labels_and_guidance_change_the_images(model, tmp_path):
    options = ("generate", "--denoiser", model, "--solver", "ddim:3", "--num_samples", 2)
    run(*options, "--output", tmp_path / "plain")
    run(*options, "--labels", "[3,4]", "--output", tmp_path / "labels")
    run(*options, "--guidance_scale", 3, "--output", tmp_path / "guided")
    plain = images_in(tmp_path / "plain")
    assert np.abs(plain - images_in(tmp_path / "labels")).max() > 1e-4
    assert np.abs(plain - images_in(tmp_path / "guided")).max() > 1e-4


def test_guidance_zero_is_the_unconditional_output(model, tmp_path):
    run("generate", "--denoiser", model, "--solver", "ddim:3", "--guidance_scale", 0, "--output", tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["guidance_scale"] == 0
    denoiser = load_denoiser(model)
    noise, null = start_noise(range(64), denoiser.sample_shape), torch.full((64,), denoiser.num_classes)
    expected = run_table(denoiser, named_solver("ddim:3", denoiser.schedule), noise, null)
    np.testing.assert_allclose(images_in(tmp_path), expected.numpy(), rtol=1e-4, atol=1e-3)


def test_inspect_draws_and_prints(model, tmp_path, capsys):
    run("inspect", "heun:5", "--output", tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000
    assert "evaluations (NFE)      5" in capsys.readouterr().out


def test_inspect_shows_calls_and_operators_of_a_table(model, tmp_path, capsys):
    denoiser, space = load_denoiser(model), Bands((0.2,), 3)
    table = named_solver("unipc:3", denoiser.schedule).guided(2.0, rows=[0])
    weights = {name: space.embed(getattr(table, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    solver = save_solver(replace(table, space=space, **weights), tmp_path / "o.json", identify(denoiser), method="olss")
    run("inspect", solver, "--output", tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "0u:" in printed
    assert "evaluations (NFE)      4   rows 3 " in printed


def test_export_runs_elsewhere(model, tmp_path):
    denoiser = load_denoiser(model)
    table = named_solver("dpmpp:4", denoiser.schedule)
    save_solver(table, tmp_path / "dpmpp-4.json", identify(denoiser), method="tabulate")
    run("export", tmp_path / "dpmpp-4.json", "--to", "diffusers", "--output", tmp_path / "scheduler")
    assert (tmp_path / "scheduler" / "scheduler_config.json").is_file()


def test_export_of_a_folder_holds_every_number_of_steps(model, tmp_path, capsys):
    denoiser, solvers = load_denoiser(model), tmp_path / "solvers"
    solvers.mkdir()
    for steps in (3, 5):
        table = named_solver(f"dpmpp:{steps}", denoiser.schedule)
        save_solver(table, solvers / f"dpmpp-{steps}.json", identify(denoiser), method="tabulate")
    from solvers import TableScheduler

    run("export", solvers, "--output", tmp_path / "scheduler")
    scheduler = TableScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.available_steps == [3, 5]
    with pytest.raises(ValueError, match=r"num_inference_steps is 4: this solver has tables for \[3, 5\] steps only"):
        scheduler.set_timesteps(4)
    assert "holds no solver artifact" in fails(capsys, "export", tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--solver", "magic:5"), "unknown solver 'magic'"),
        (("--solver", "ddim:zero"), "ddim:zero"),
        (("--solver", "nowhere.json"), "nowhere.json"),
        (("--solver", "ddim:5", "--num_samples", 0), "num_samples is 0"),
        (("--solver", "ddim:5", "--labels", "[10]"), "classes 0 to 9"),
        (("--solver", "ddim:5", "--labels", "[]"), "labels is an empty list"),
        (("--solver", "ddim:5", "--preview", "true"), "parataa"),
        (("--solver", "ddim:5", "--colour", "red"), "--colour"),
        (("--solver", "ddim:5", "--precision", "int3"), "precision"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, capsys, options, reason):
    assert reason in fails(capsys, "generate", "--denoiser", model, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_line(tmp_path, capsys):
    assert "does not exist" in fails(capsys, "generate", "--denoiser", tmp_path / "none", "--solver", "ddim:5")


def test_an_artifact_of_another_model_or_guidance_is_refused(model, tmp_path, capsys):
    denoiser = load_denoiser(model)
    table = named_solver("ddim:4", denoiser.schedule)
    save_solver(table, tmp_path / "a.json", identify(denoiser), method="tabulate")
    save_solver(table, tmp_path / "b.json", identify(denoiser, weight_hash="0" * 64), method="tabulate")
    assert load_solver(tmp_path / "a.json", denoiser).nfe == 4
    out = ("--num_samples", 1, "--output", tmp_path / "out")
    assert "weight" in fails(capsys, "generate", "--denoiser", model, "--solver", tmp_path / "b.json", *out)
    guided = ("--guidance_scale", 2, "--solver", tmp_path / "a.json")
    assert "guidance" in fails(capsys, "generate", "--denoiser", model, *guided, *out)
    run("generate", "--denoiser", model, "--solver", tmp_path / "a.json", *out)
    assert torch.from_numpy(images_in(tmp_path / "out")).isfinite().all()


def own_network(**options):
    return DiT(NoiseSchedule.linear(), 8, 2, 1, hidden_size=64, depth=1, num_heads=1, num_classes=3)


@pytest.mark.parametrize("command", ["generate", "compare", "inspect"])
def test_a_file_chooses_code_only_where_it_is_trusted(command, tmp_path, capsys):
    (tmp_path / "denoiser.yaml").write_text("path: tests.test_sample.own_network\n")
    output = tmp_path / ("drawing.png" if command == "inspect" else "out")
    arguments = {
        "generate": ["--solver=ddim:2", "--num_samples=2"],
        "compare": ["--solvers=[ddim:2]", "--num_samples=2", "--metrics=[rmse]", "--bootstrap=0", "--reference=ddim:3"],
        "inspect": ["ddim:2"],
    }[command] + [f"--denoiser={tmp_path}", f"--output={output}"]
    assert "names tests.test_sample.own_network, which is no model on disk" in fails(capsys, command, *arguments)
    assert not output.exists()
    run(command, *arguments, "--trust")
    assert output.exists()


@pytest.mark.parametrize("names", [("model.safetensors", "config.json"), ("model.safetensors",)])
def test_the_student_of_an_artifact_chooses_no_code(names, model, tmp_path, capsys):
    """Not even a trusted one: what comes with an artifact is data."""
    student = tmp_path / "student"
    student.mkdir()
    for name in names:
        (student / name).write_bytes((model / name).read_bytes())
    (student / "denoiser.yaml").write_text("path: tests.test_sample.own_network\n")
    denoiser, path = load_denoiser(model), tmp_path / "s.json"
    table = named_solver("ddim:2", denoiser.schedule)
    save_solver(table, path, identify(denoiser), method="slam", student="student/model.safetensors")
    arguments = [f"--solver={path}", f"--output={tmp_path / 'out'}", "--trust"]
    assert "names tests.test_sample.own_network" in fails(capsys, "generate", *arguments)
    arguments = [f"--denoiser={model}", f"--solvers=[{path}]", f"--output={tmp_path / 'out'}", "--trust"]
    assert "names tests.test_sample.own_network" in fails(capsys, "compare", *arguments)


def test_a_distilled_models_list_is_a_solver_argument(model, tmp_path):
    solver = "euler@[999,749.5,500]"
    run("generate", "--denoiser", model, "--solver", solver, "--num_samples", 1, "--output", tmp_path)
    denoiser = load_denoiser(model)
    noise = start_noise([0], denoiser.sample_shape)
    expected = run_table(denoiser, named_solver(solver, denoiser.schedule), noise, class_labels(denoiser, [0]))
    np.testing.assert_allclose(images_in(tmp_path), expected.numpy(), rtol=1e-4, atol=1e-3)
    options = ["--reference", "ddim:4", "--num_samples", 2, "--metrics", "rmse", "--bootstrap", 0]
    places = ["--output", tmp_path / "report", "--cache", tmp_path / "cache"]
    run("compare", "--denoiser", model, "--solvers", solver, "euler@sigma[157.4,3.4]", *options, *places)
    rows = json.loads((tmp_path / "report" / "report.json").read_text())
    assert solver in json.dumps(rows)
    run("inspect", solver, "--output", tmp_path / "table.png")


def interrupted(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as left:
        run(*args)
    assert left.value.code == 143
    return capsys.readouterr().err.splitlines()[-1]


def asked_in_call(monkeypatch, number: int) -> None:
    """SIGTERM in a call of the network."""
    forward, calls = DiT.forward, []

    def replaced(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args, **kwargs)

    monkeypatch.setattr(DiT, "forward", replaced)


def test_sampling_is_broken_off_by_a_signal(model, tmp_path, monkeypatch, capsys):
    asked_in_call(monkeypatch, 2)
    options = ("--denoiser", model, "--solver", "ddim:3", "--num_samples", 2, "--output", tmp_path)
    assert interrupted(capsys, "generate", *options) == "stopped by SIGTERM: nothing was written"
    assert not list(tmp_path.iterdir())


def test_a_comparison_goes_on_after_a_signal(model, tmp_path, monkeypatch, capsys):
    options = ("--denoiser", model, "--solvers", "ddim:2", "ddim:3", "--reference", "ddim:4", "--num_samples", 3)
    options += ("--metrics", "rmse", "--bootstrap", 0, "--cache", tmp_path / "cache")
    with monkeypatch.context() as patch:
        asked_in_call(patch, 8)  # four of the reference, two of the first solver
        line = interrupted(capsys, "compare", *options, "--output", tmp_path / "a")
    assert line == "stopped by SIGTERM: what was sampled stays; run the same command again to go on"
    assert len(list((tmp_path / "a").glob("rows/*/*"))) == 2
    rows = []
    for name in ("a", "b"):
        run("compare", *options, "--output", tmp_path / name)
        found = json.loads((tmp_path / name / "report.json").read_text())
        rows.append([row.get("rmse") for row in found])
    assert rows[0] == rows[1]
    assert len([value for value in rows[0] if value]) == 2


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_one_run_writes_to_a_folder(command, model, tmp_path, capsys):
    solver = ("--solver", "ddim:2") if command == "generate" else ("--solvers", "ddim:2", "--metrics", "rmse")
    with claimed(tmp_path):
        line = fails(capsys, command, "--denoiser", model, *solver, "--num_samples", 2, "--output", tmp_path)
    assert f"another process writes to {tmp_path}" in line


def test_samples_that_are_no_numbers_are_not_written(model, tmp_path, monkeypatch, capsys):
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * float("nan"))
    options = ("--denoiser", model, "--solver", "ddim:2", "--num_samples", 2, "--output", tmp_path)
    assert "2 of 2 samples hold NaN or infinity, the first has seed 0" in fails(capsys, "generate", *options)
    assert not list(tmp_path.iterdir())


def test_inspect_of_several_is_a_table(model, tmp_path, capsys):
    denoiser, solvers = load_denoiser(model), tmp_path / "solvers"
    for steps, found in ((3, {"median": 0.25, "worst": 1.5}), (5, {})):
        path = solvers / f"dpmpp-{steps}.json"
        save_solver(
            named_solver(f"dpmpp:{steps}", denoiser.schedule), path, identify(denoiser), method="m", validation=found
        )
    run("inspect", solvers)
    listed = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "dpmpp" in line]
    assert [[cell.strip() for cell in row] for row in listed] == [
        ["dpmpp-3", "m", "3", "3", "tiny", "1.0", "", "0.25", "", "1.5"],
        ["dpmpp-5", "m", "5", "5", "tiny", "1.0", "", "", "", ""],
    ]
    run("inspect", solvers / "dpmpp-5.json", "ddim:4", "heun:3")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("dpmpp-5", "ddim:4", "heun:3"))
    assert "a drawing is of one solver, these are 2" in fails(capsys, "inspect", solvers, "--output", "table.png")
    run("export", solvers / "dpmpp-3.json", solvers / "dpmpp-5.json", "--output", tmp_path / "scheduler")
    assert (tmp_path / "scheduler" / "scheduler_config.json").is_file()
