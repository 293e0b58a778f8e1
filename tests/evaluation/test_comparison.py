"""Comparisons: right figures, resumed after a kill, the reference computed once, nothing overwritten."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from denoisers import class_labels
from evaluation import blocks
from evaluation.compare import compare_groups
from evaluation.contenders import Contender, Group, check_seeds, display_names
from evaluation.distances import Gaussian
from evaluation.metrics import choose_metrics
from evaluation.rows import trajectory_error
from parataa import parallel_sample
from solvers import Call, sample, sample_trace, start_noise
from solvers.named import named_solver
from tests.evaluation.helpers import (
    Mixture,
    compare_args,
    extractor,
    frechet_distance,
    group,
    in_processes,
    kernel_distance,
    spaces,
    statistics,
)

NAMES = ["ddim:3", "unipc:4"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8)


def run(folder, denoiser=None, names=NAMES, num_samples=20, output="out", **options):
    denoiser = denoiser or Mixture()
    measured = options.pop("spaces", None) or spaces()
    settings = {"batch_size": 4, "bootstrap": 20, "num_samples": num_samples} | options
    args = compare_args(folder, output=str(folder / output), **settings)
    return compare_groups([group(denoiser, names)], args, measured)


def figures(rows):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def same(found, expected):
    for one, other in zip(figures(found), figures(expected), strict=True):
        numbers = {name: value for name, value in one.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-5, abs=1e-7)
        assert {n: v for n, v in one.items() if n not in numbers} == {
            n: v for n, v in other.items() if n not in numbers
        }


def test_a_parallel_sampler_has_the_images_of_the_sequential_one_and_counts_its_rounds(tmp_path):
    denoiser = Mixture()
    table = named_solver("ddim:12", denoiser.schedule)
    parallel = Contender("ddim:12+parataa", table, denoiser, 1.0, partial(parallel_sample, tolerance=1e-5), "parataa")
    both = replace(group(denoiser, ["ddim:3"]), contenders=(group(denoiser, ["ddim:3"]).contenders[0], parallel))

    def compared():
        return compare_groups([both], compare_args(tmp_path, num_samples=20, batch_size=4))

    rows = compared()
    assert [row["rounds"] for row in rows[:2]] == [row["evaluations"] for row in rows[:2]] == [12, 3]
    assert rows[2]["rmse"] < 1e-4
    expected = [parallel_sample(denoiser, table, *noises(denoiser, k), tolerance=1e-5)[1] for k in range(20)]
    assert rows[2]["rounds"] == pytest.approx(sum(stats.rounds for stats in expected) / 20)
    assert rows[2]["evaluations"] == pytest.approx(sum(stats.evaluations for stats in expected) / 20)
    assert rows[2]["rounds"] < 12 < rows[2]["evaluations"]
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "| rounds | evaluations |" in shown
    same(compared(), rows)


def noises(denoiser, seed):
    return start_noise([seed], denoiser.sample_shape), class_labels(denoiser, [seed])


def test_figures_are_those_of_plain_sampling(tmp_path):
    rows = run(tmp_path)
    denoiser, seeds = Mixture(), range(20)
    noise, condition = start_noise(seeds, denoiser.sample_shape), class_labels(denoiser, seeds)
    images = {
        name: sample(denoiser, named_solver(name, denoiser.schedule), noise, condition) for name in ("ddim:12", *NAMES)
    }
    assert [row["solver"] for row in rows] == ["ddim:12", "ddim:3", "unipc:4"]
    assert [row["nfe"] for row in rows] == [12, 3, 4]
    for row in rows:
        error = (images[row["solver"]].double() - images["ddim:12"].double()).square().mean().sqrt()
        assert row["rmse"] == pytest.approx(float(error), rel=1e-5, abs=1e-12)
        features, _ = extractor()(images[row["solver"]])
        expected = frechet_distance(Gaussian.of(features), statistics().gaussian)
        assert row["fd"] == pytest.approx(expected, rel=1e-5)
        assert row["kid"] == pytest.approx(kernel_distance(features, statistics().features), rel=1e-4)
        assert row["fd_low"] < row["fd"] < row["fd_high"]
        assert row["kid_low"] < row["kid"] < row["kid_high"]
        assert row["num_images"] == 20
        assert row["seconds"] > 0
    assert rows[0]["psnr"] is None
    assert rows[0]["is_reference"]
    assert rows[1]["rmse_low"] < rows[1]["rmse"] < rows[1]["rmse_high"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == rows


def test_batch_size_does_not_matter(tmp_path):
    same(run(tmp_path / "a", batch_size=3), run(tmp_path / "b", batch_size=64))


def test_a_killed_comparison_goes_on(tmp_path):
    complete = run(tmp_path / "a")
    killed = Mixture(fail_after=40)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", killed)
    again = Mixture()
    same(run(tmp_path / "b", again), complete)
    # 20 images in 2 + 2 + 1 batches of each of 12, 3 and 4 evaluations make 95 calls; finished blocks are kept.
    assert again.calls < 95 - 20
    rerun = Mixture()
    same(run(tmp_path / "b", rerun), complete)
    assert rerun.calls == 0


def test_the_reference_is_computed_once(tmp_path):
    run(tmp_path, num_samples=20, output="first")
    denoiser = Mixture()
    run(tmp_path, denoiser, ["ddim:4"], num_samples=12, output="second")
    assert denoiser.calls == 3 * 4
    denoiser = Mixture()
    longer = run(tmp_path, denoiser, ["ddim:4"], num_samples=24, output="third")
    assert denoiser.calls == 12 + 6 * 4
    same(longer, run(tmp_path / "fresh", names=["ddim:4"], num_samples=24))


def test_the_reference_of_another_network_is_not_reused(tmp_path):
    run(tmp_path, Mixture(20), output="first")
    other = Mixture(19)
    run(tmp_path, other, output="second")
    assert other.calls == 95


def test_two_processes_give_the_same_report(tmp_path):
    expected = run(tmp_path / "one")
    found = in_processes(lambda rank: run(tmp_path / "two"), 2, tmp_path / "work")
    assert found[1] == []
    same(found[0], expected)


def test_solvers_may_be_added_but_not_dropped(tmp_path):
    first = run(tmp_path)
    denoiser = Mixture()
    grown = run(tmp_path, denoiser, [*NAMES, "ddim:2"])
    assert denoiser.calls == 5 * 2
    same(grown[:3], first)
    with pytest.raises(ValueError, match=r"includes unipc:4, ddim:2.*nothing was changed"):
        run(tmp_path, names=["ddim:3"])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == grown


def test_more_images_may_be_added(tmp_path):
    run(tmp_path, num_samples=20)
    denoiser = Mixture()
    grown = run(tmp_path, denoiser, num_samples=28)
    missing_calls, block_calls = (1 + 1) * 12, (2 + 1) * (3 + 4)  # the reference lacks 4 images of two blocks each
    assert denoiser.calls == missing_calls + block_calls
    same(grown, run(tmp_path / "fresh", num_samples=28))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 12}, "num_samples was 20, now 12"),
        ({"seed": 5}, "seed was 0, now 5"),
        ({"precision": "bf16"}, "precision was float32, now bf16"),
        ({"spaces": spaces(1)}, "spaces was"),
        ({"denoiser": Mixture(7)}, "references was"),
    ],
)
def test_another_comparison_is_not_overwritten(tmp_path, options, message):
    run(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds report\.md of something else: choose another"):
        run(tmp_path)


def test_images_that_are_not_finite_are_refused(tmp_path):
    reference = group(Mixture(), [])
    broken = replace(reference.reference, name="broken", denoiser=Mixture(19, gives_nan=True))
    with pytest.raises(ValueError, match="4 of 4 images of broken hold NaN or infinity"):
        compare_groups([Group(reference.reference, (broken,))], compare_args(tmp_path, num_samples=4))


def test_a_damaged_block_is_named(tmp_path):
    run(tmp_path)
    next((tmp_path / "out" / "rows").rglob("*.safetensors")).write_bytes(b"oops")
    with pytest.raises(ValueError, match=r"cannot be read .*: delete it"):
        run(tmp_path)


def test_seeds_that_the_solver_was_fitted_on_are_refused():
    one = group(Mixture(), ["ddim:3"])
    table = replace(one.contenders[0].table, info={"fitted_on": {"seeds": [[100, 200]]}})
    fitted = Group(one.reference, (Contender("fitted", table, one.reference.denoiser),))
    chosen = replace(table, info={"fitted_on": {}, "validation": {"seeds": [[300, 400]]}})
    for other in (
        Group(Contender("teacher", table, one.reference.denoiser), ()),
        Group(one.reference, (Contender("chosen", chosen, one.reference.denoiser),)),
    ):
        with pytest.raises(ValueError, match="was fitted on the seeds"):
            check_seeds([other], range(150, 350))
    check_seeds([fitted], range(0, 100))
    check_seeds([fitted], range(200, 300))
    with pytest.raises(ValueError, match="fitted was fitted on the seeds 100 to 199"):
        check_seeds([fitted], range(199, 210))


def test_what_cannot_be_measured_is_left_out_or_refused():
    (everything,) = choose_metrics(None, spaces(), 13, (3, 8, 8)).spaces
    assert everything.metrics == ("fd", "kid", "precision_recall", "inception_score")
    few = choose_metrics(None, spaces(), 12, (3, 8, 8))
    assert "fd" not in few.spaces[0].metrics
    assert "12 images are too few for a Frechet distance in 12 feature dimensions" in few.notes[0]
    assert choose_metrics(["rmse"], spaces(), 12, (3, 8, 8)).spaces == ()
    assert choose_metrics(None, spaces(), 50, (4, 32, 32)).spaces == ()
    assert choose_metrics(None, spaces(), 3, (3, 8, 8)).spaces
    with pytest.raises(ValueError, match="12 images of the data are too few for a Frechet distance"):
        choose_metrics(["fd"], spaces(count=12), 13, (3, 8, 8))
    for wanted, data, message in (
        (["fd"], statistics(), "fd was asked for: 12 images are too few"),
        (["kid"], None, "no data statistics"),
        (["kid"], statistics(count=3), "12 images, compared with 3 of the data, are too few"),
        (["fid"], None, "unknown metrics fid: use some of rmse, fd"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_metrics(wanted, [(extractor(), data)], 12, (3, 8, 8))


def test_trajectory_error_at_the_nodes_of_the_reference():
    denoiser = Mixture()
    noise = start_noise(range(3), denoiser.sample_shape)
    reference = named_solver("ddim:12", denoiser.schedule)
    target = torch.stack(sample_trace(denoiser, reference, noise).states)
    assert float(trajectory_error(reference, target, reference, target).max()) < 1e-12
    shifted = target + 0.25 * (reference.alpha**2 + reference.sigma**2).sqrt().float().view(-1, 1, 1, 1, 1)
    assert trajectory_error(reference, shifted, reference, target[:, :2]).tolist() == pytest.approx(
        [0.25] * 13, rel=1e-5
    )
    # A coarser solver's last node is the image: its error there is the images' own.
    coarse = named_solver("ddim:3", denoiser.schedule)
    states = torch.stack(sample_trace(denoiser, coarse, noise).states)
    found = trajectory_error(coarse, states, reference, target)
    expected = (states[-1] - target[-1]).double().square().mean().sqrt()
    assert float(found[-1]) == pytest.approx(float(expected), rel=1e-3)


def test_display_names_stay_different():
    assert display_names(["a/olss-8.json", "ddim:8"]) == {"a/olss-8.json": "olss-8", "ddim:8": "ddim:8"}
    assert display_names(["a/x.json", "b/x.json"]) == {"a/x.json": "a/x", "b/x.json": "b/x"}
    nested = ["s/x.json", "s/t/x.json", "s/t/y.json", "s/t/y.json+parataa"]
    assert list(display_names(nested).values()) == ["s/x", "t/x", "y", "y+parataa"]


class Pictures(Mixture):
    """A latent model: its pictures are the negatives of its states."""

    def decode(self, states):
        return -states


def test_features_are_of_decoded_images(tmp_path):
    rows = run(tmp_path, Pictures(), names=["ddim:3"])
    denoiser = Mixture()
    noise, condition = start_noise(range(20), denoiser.sample_shape), class_labels(denoiser, range(20))
    features, _ = extractor()(-sample(denoiser, named_solver("ddim:3", denoiser.schedule), noise, condition))
    assert rows[1]["fd"] == pytest.approx(frechet_distance(Gaussian.of(features), statistics().gaussian), rel=1e-5)


class Enlarging(Mixture):
    def decode(self, states):
        return states.repeat_interleave(2, -1)


def test_rounds_are_rows_and_evaluations_are_calls(tmp_path):
    denoiser = Mixture()
    denoiser.null_condition = lambda condition: condition
    one = group(denoiser, [])
    split = Contender("split", named_solver("ddim:3", denoiser.schedule).guided(2.0, rows=[0]), denoiser)
    row = compare_groups([replace(one, contenders=(split,))], compare_args(tmp_path, num_samples=4))[1]
    assert (row["nfe"], row["rounds"], row["evaluations"]) == (4, 3, 4)


def test_what_can_be_measured_depends_on_the_decoded_images(tmp_path):
    rows = run(tmp_path, Enlarging(), names=["ddim:3"])
    assert rows[1]["fd"] is None
    assert "the model makes (3, 8, 16)" in (tmp_path / "out" / "report.md").read_text()


def test_references_are_told_apart(tmp_path):
    one = group(Mixture(), []).reference
    folders = [
        blocks.ReferenceImages(one, tmp_path, seed, precision).folder
        for seed, precision in ((0, "float32"), (8, "float32"), (0, "bf16"))
    ]
    assert len(set(folders)) == 3


def keyed(sampler=None, table=None, **attributes):
    denoiser = Mixture()
    for name, value in attributes.items():
        setattr(denoiser, name, value)
    return Contender("a", table or named_solver("ddim:3", denoiser.schedule), denoiser, sampler=sampler).key


def calling(branch):
    table = named_solver("ddim:3", Mixture.schedule)
    return replace(table, calls=tuple(Call(call.row, branch) for call in table.calls))


def test_everything_that_images_depend_on_is_in_the_key():
    prompts = {"text": torch.zeros(2, 3), "pooled": torch.ones(2, 1)}
    keys = [
        keyed(),
        keyed(conditions=prompts),
        keyed(conditions=prompts | {"text": torch.ones(2, 3)}),
        keyed(sample_shape=(3, 8, 16)),
        keyed(thresholding={"ratio": 0.99}),
        keyed(settings={"negative_prompt": "blurry"}),
        keyed(num_classes=None),
        keyed(partial(parallel_sample, tolerance=1e-2)),
        keyed(partial(parallel_sample, tolerance=1e-4)),
        keyed(table=calling("unconditional")),
        keyed(table=calling("negative")),
    ]
    assert len(set(keys)) == len(keys)
    assert keyed(conditions=dict(prompts)) == keys[1]
    assert keyed(partial(parallel_sample, tolerance=1e-2)) == keys[7]


def test_a_plain_function_must_say_what_it_is():
    denoiser = Mixture()

    def function(x, timestep, condition=None):
        return denoiser(x, timestep)

    function.sample_shape = denoiser.sample_shape
    contender = Contender("a", named_solver("ddim:3", denoiser.schedule), function)
    with pytest.raises(ValueError, match="function has neither weights nor a weight_hash"):
        _ = contender.key
    function.weight_hash = "mixture"
    assert contender.key


def test_few_images_may_become_many(tmp_path):
    assert run(tmp_path, num_samples=3)[1]["fd"] is None
    same(run(tmp_path, num_samples=20), run(tmp_path / "fresh"))


def test_a_killed_extension_can_be_given_up(tmp_path):
    first = run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Mixture(fail_after=15), num_samples=40)
    same(run(tmp_path), first)


def test_all_processes_hear_of_a_refusal(tmp_path):
    run(tmp_path)

    def refused(rank):
        with pytest.raises(ValueError, match="seed was 0, now 5") as error:
            run(tmp_path, seed=5)
        return str(error.value)

    first, second = in_processes(refused, 2, tmp_path / "work")
    assert first == second


def test_a_block_is_whole_or_not_there(tmp_path, monkeypatch):
    def stopped(values, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(blocks, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        blocks.write_tensors(tmp_path / "block.safetensors", {"images": torch.zeros(1)})
    assert blocks.read_count(tmp_path / "block.safetensors", "images") == 0
