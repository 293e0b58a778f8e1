"""The script behind docs/results.md: what it compares, the tables it writes, and what it leaves alone."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import results
from denoisers import load_denoiser
from denoisers.checkpoint import save_denoiser
from denoisers.dit import DiT
from solvers import DenoiserIdentity, NoiseSchedule, save_solver
from solvers.named import named_solver

START, END = "<!-- table tiny 1 -->", "<!-- end -->"


def row(solver, nfe, fd, **values):
    given = {"model": "tiny", "guidance": 1.0, "solver": solver, "method": "baseline", "nfe": nfe, "num_images": 9}
    return given | {"is_reference": False, "fd": fd, "kid": None, "rmse": fd / 10} | values


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with a tiny model and an artifact for guidance 1."""
    torch.manual_seed(0)
    network = DiT(NoiseSchedule.linear(), 8, 4, 1, 32, 1, 2)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    weights = save_denoiser(network, tmp_path / "checkpoints" / "tiny")
    own = DenoiserIdentity(network.schedule, weight_hash=weights)
    solvers = tmp_path / "checkpoints" / "solvers" / "tiny"
    save_solver(named_solver("unipc:3", network.schedule), solvers / "olss-3.json", own, method="olss")
    guided = replace(own, guidance_scale=1.5)
    save_solver(named_solver("unipc:2", network.schedule), solvers / "b" / "olss-2.json", guided, method="olss")
    (tmp_path / "results.md").write_text(f"Before.\n\n{START}\nold\n{END}\n\nAfter.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "BASELINES", {"discrete_vp": ("ddim",)})
    monkeypatch.setattr(results, "CASES", {("tiny", s): results.Case("ddim:100", (2, 3, 4)) for s in (1.0, 1.5)})
    monkeypatch.setattr(results, "MODELS", ["tiny"])
    return tmp_path


def found(scale, calls):
    return results.artifacts("tiny", scale, calls, load_denoiser("checkpoints/tiny", scale))


def test_compares_what_fits_and_writes_all_files(folder):
    known = [row("x:1", 1, 2.0, model="other", is_reference=True), row("gone:1", 1, 1.0)]
    (folder / "results.json").write_text(json.dumps(known))
    with (folder / "results.md").open("a") as file:
        file.write(f"<!-- table other 1 -->\n{END}\n")
    outside = folder / "run" / "mine-3.json"
    outside.parent.mkdir()
    shutil.copy("checkpoints/solvers/tiny/olss-3.json", outside)
    arguments = ["--guidance", "1", "--num_samples", "4", "--solvers", str(outside)]
    results.main([*arguments, "--json", "results.json", "--markdown", "results.md"])
    rows = json.loads((folder / "results.json").read_text())
    path = "checkpoints/solvers/tiny/olss-3.json"
    assert [one["solver"] for one in rows] == ["x:1", "ddim:100", "ddim:2", "ddim:3", "ddim:4", path, str(outside)]
    assert all(one["num_images"] == 4 for one in rows[1:])
    assert rows[-1]["rmse"] == rows[-2]["rmse"] > 0
    assert rows[-1]["worst"] >= rows[-1]["p99"] >= rows[-1]["median"] > 0
    assert rows[-1]["seconds"] > 0
    text = (folder / "results.md").read_text()
    assert text.startswith("Before.\n\n<!-- table tiny 1 -->\n4 images per row; the teacher is ddim:100.")
    assert f"| olss |  | **{rows[-1]['rmse']:.4f}** ({rows[-1]['rmse_low']:.4f} to " in text
    assert "old" not in text
    assert "\n\nAfter.\n" in text
    assert (folder / "results.png").exists()


def test_only_some_beside_the_figures_that_stand(folder):
    path = "checkpoints/solvers/tiny/olss-3.json"
    there = [row("ddim:100", 100, 7.0, is_reference=True), row("ddim:2", 2, 8.0), row(path, 3, 9.0), row("x:4", 4, 6.0)]
    (folder / "results.json").write_text(json.dumps(there))
    arguments = ["--json", "results.json", "--markdown", "results.md", "--guidance", "1", "--only", path, "ddim:3"]
    with pytest.raises(ValueError, match="has figures of 9 images, and --num_samples is 4"):
        results.main([*arguments, "--num_samples", "4"])
    assert not (folder / "runs").exists()
    results.main([*arguments, "--num_samples", "9"])
    written = json.loads((folder / "results.json").read_text())
    rows = {one["solver"]: one for one in written}
    assert sorted(one["solver"] for one in written) == [path, "ddim:100", "ddim:2", "ddim:3", "x:4"]
    assert [rows[name]["fd"] for name in ("ddim:100", "ddim:2", "x:4")] == [7.0, 8.0, 6.0]
    assert rows[path]["rmse"] != 0.9
    assert rows["ddim:3"]["num_images"] == 9
    assert f"{rows[path]['rmse']:.4f}" in (folder / "results.md").read_text()
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match="has none of them"):
        results.main([*arguments, "--num_samples", "9"])


def test_some_calls_and_some_rows_are_measured_after_all_of_them(folder):
    arguments = ["--json", "results.json", "--markdown", "results.md", "--guidance", "1", "--num_samples", "4"]
    results.main(arguments)
    first = json.loads((folder / "results.json").read_text())
    for chosen in (["--only", "ddim:4", "ddim:5"], ["--calls", "2"]):
        results.main([*arguments, *chosen])
    results.main([*arguments, "--only", "ddim:4", "ddim:3"])
    rows = json.loads((folder / "results.json").read_text())
    assert sorted(one["solver"] for one in rows) == sorted([*(one["solver"] for one in first), "ddim:5"])


def test_figures_of_other_calls_stay(folder):
    """Those of the calls that are asked for are measured anew, also where a solver is no longer there."""
    there = [row("ddim:100", 100, 7.0, is_reference=True)]
    there += [row("ddim:2", 2, 8.0), row("gone:2", 2, 5.0), row("x:4", 4, 6.0)]
    (folder / "results.json").write_text(json.dumps(there))
    arguments = ["--json", "results.json", "--markdown", "results.md", "--guidance", "1", "--calls", "2"]
    with pytest.raises(ValueError, match=r"--calls adds to .* has figures of 9 images, and --num_samples is 4"):
        results.main([*arguments, "--num_samples", "4"])
    results.main([*arguments, "--num_samples", "9"])
    rows = {one["solver"]: one for one in json.loads((folder / "results.json").read_text())}
    assert sorted(rows) == ["ddim:100", "ddim:2", "x:4"]
    assert (rows["ddim:100"]["fd"], rows["x:4"]["fd"]) == (7.0, 6.0)
    assert rows["ddim:2"]["rmse"] != 0.9


def test_a_document_without_the_marker_is_refused_before_any_work(folder):
    with pytest.raises(ValueError, match=r"there is no <!-- table tiny 1\.5 -->"):
        results.main(["--json", "results.json", "--markdown", "results.md"])
    assert not (folder / "runs").exists()


def test_artifacts_by_guidance_scale_and_network_calls(folder):
    """A guided evaluation is two calls."""
    assert found(1.0, (2, 3)) == ["checkpoints/solvers/tiny/olss-3.json"]
    assert found(1.0, (2,)) == []
    assert found(1.5, (4,)) == ["checkpoints/solvers/tiny/b/olss-2.json"]
    assert found(1.5, (2, 3)) == []


def test_baselines_by_network_calls():
    schedule = NoiseSchedule.flow()
    plain, guided = results.baselines(schedule, (3, 4)), results.baselines(schedule, (3, 4, 24), 2)
    assert {"unipc:3", "unipc:4", "ipndm@karras:3"} <= set(plain)
    assert {"unipc:2", "unipc:12"} <= set(guided)
    assert "unipc:1" not in guided
    assert "unipc@dmn:12" not in guided


def test_published_tables_and_students_are_compared_too(folder):
    schedule = NoiseSchedule.linear()
    common = {"method": "slam", "denoiser": DenoiserIdentity(schedule)}
    published, student = "checkpoints/solvers/published/vp-3.json", "checkpoints/tiny-student/slam-1.json"
    save_solver(named_solver("ddim:3", schedule), published, **common)
    save_denoiser(DiT(schedule, 8, 4, 1, 32, 1, 2), "checkpoints/tiny-student/student")
    weights = {"student": "student/model.safetensors", "fitted_on": {"guidance_scale": 1.5}}
    save_solver(named_solver("ddim:1", schedule), student, **common, **weights)
    assert published in found(1.0, (3,))
    assert student not in found(1.0, (3,))
    assert student in found(1.5, (1, 6))


def test_tables_mark_the_best_of_each_column_and_the_floor():
    rows = [row("ddim:6", 6, 1.0, is_reference=True), row("ddim:2", 2, 5.0), row("ddim:3", 3, 0.4)]
    rows.append(row("a/b/olss-2.json", 2, 3.0, fd_low=2.5, fd_high=3.5))
    text = results.tables(rows)
    assert "| Frechet distance | 2 calls | 3 calls |" in text
    assert "| ddim | 5.00 | 0.400 |" in text
    assert "| b/olss | **3.00** (2.50 to 3.50) |  |" in text
    assert "| teacher, 6 calls | 1.00 | |" in text
    assert "KID" not in text


def test_the_tail_stands_beside_the_mean():
    rows = [
        row("ddim:6", 6, 1.0, is_reference=True, median=0.0),
        row("ddim:2", 2, 5.0, median=0.1, p99=0.25, worst=0.5),
    ]
    text = results.tables(rows)
    assert "| Median, 99th percentile, worst image | 2 calls |" in text
    assert "| ddim | 0.100 / 0.250 / 0.500 |" in text


def of_targets(scale, learned, classical, tail=(0.1, 0.1)):
    """Rows of 5 learned and 8 classical evaluations, and worst images of learned solvers and UniPC with 10."""
    each = 1 if scale == 1 else 2
    mine, other = {"method": "olss", "rmse": 0.01}, "checkpoints/solvers/other/calls/olss-1.json"
    rows = [
        row("unipc:30", 30 * each, 1.0, is_reference=True, worst=0.0),
        row("unipc:8", 8 * each, 0.01, is_reference=True),  # the teacher is no rival
        row("checkpoints/solvers/tiny/calls/olss-5.json", 5 * each, learned, **mine, worst=tail[0]),
        row("checkpoints/solvers/tiny/calls/olss-10.json", 10, learned, **mine, worst=tail[0]),
        row(other, 5 * each, 0.01, method="olss"),  # not of this model
        row("checkpoints/solvers/tiny/peers/gits-unipc-8.json", 8 * each, classical, method="gits"),
        row("euler:8", 8 * each, classical + 1),
        row(f"unipc:{10 // each}", 10, 9.0, worst=tail[1]),
    ]
    return [one | {"guidance": scale} for one in rows]


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_targets_are_bold_where_they_are_reached(scale):
    """5 and 8 evaluations are 10 and 16 calls with guidance."""
    start = f"| tiny, {scale:g} |"
    reached = results.targets(of_targets(scale, 1.03, 1.03)).splitlines()[-1]
    assert reached == f"{start} **1.03** | 1.03, peers/gits-unipc | **+3.0 %** | **nearer with 10** |"
    missed = results.targets(of_targets(scale, 1.04, 1.03, (0.2, 0.1))).splitlines()[-1]
    tail = "nearer with none, not with 10 (0.200 against 0.100)"
    assert missed == f"{start} 1.04 | 1.03, peers/gits-unipc | +4.0 % | {tail} |"


def test_a_target_that_was_not_measured_is_empty():
    rows = [one for one in of_targets(1.0, 2.0, 2.0) if one["nfe"] not in (5, 10)]
    assert results.targets(rows).splitlines()[-1] == "| tiny, 1 |  | 2.00, peers/gits-unipc |  |  |"


def test_targets_stand_in_the_document_that_has_their_marker(tmp_path):
    path = tmp_path / "results.md"
    path.write_text(f"{START}\n{END}\nBetween.\n{results.TARGETS}\nold\n{END}\nAfter.\n")
    rows = of_targets(1.0, 2.0, 3.0)
    results.rewrite(path, rows)
    text = path.read_text()
    assert text.endswith(f"Between.\n{results.TARGETS}\n{results.targets(rows)}\n{END}\nAfter.\n")
    assert "| euler |" in text


def test_picture(tmp_path):
    rows = [
        row("ddim:6", 6, 1.0, is_reference=True),
        row("ddim:2", 2, 5.0),
        row("a/olss-2.json", 2, 3.0, method="olss"),
    ]
    results.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_nothing_is_cut_off_below_and_a_family_keeps_its_color(tmp_path, monkeypatch):
    rows = [
        row("ddim:6", 6, 4.0, is_reference=True),
        row("ddim:2", 2, 2.5),
        row("b/olss-2.json", 2, 4.5, method="olss"),
        row("ddim:6", 6, 4.0, is_reference=True, model="other"),
        row("b/olss-2.json", 2, 4.5, method="olss", model="other"),
    ]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (drawn.append(figure), file.touch()))
    results.draw(rows, tmp_path / "picture.png")
    first, second = drawn[0].axes
    assert first.get_ylim()[0] < 2.5
    colors = [{line.get_label(): line.get_color() for line in axes.lines} for axes in (first, second)]
    assert colors[0]["b/olss"] == colors[1]["b/olss"]
    assert colors[0]["b/olss"] != colors[0]["ddim"]


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("unipc:8", "unipc"),
        ("unipc@linspace:8", "unipc@linspace"),
        ("checkpoints/solvers/cifar10-dit/tuned-ddim-10.json", "tuned-ddim"),
        ("checkpoints/solvers/cifar10-dit/teacher-basis/olss-5.json", "teacher-basis/olss"),
        ("checkpoints/solvers/cifar10-dit/guidance-1.5/olss-5.json", "olss"),
        ("checkpoints/solvers/cifar10-dit/guidance-1.5/teacher-basis/olss-5.json", "teacher-basis/olss"),
        ("checkpoints/solvers/fashion-sit/peers/gits-unipc-5.json", "peers/gits-unipc"),
    ],
)
def test_families(solver, name):
    assert results.family(solver) == name
