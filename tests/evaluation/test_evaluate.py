"""evaluate_table gives the figures of a comparison, in any number of processes."""

from types import SimpleNamespace

import pytest

from denoisers import with_guidance
from evaluation.compare import compare_groups
from evaluation.evaluate import evaluate_table, reference_images, shipped_measure
from evaluation.metrics import choose_metrics
from solvers.named import named_solver
from tests.evaluation.helpers import Mixture, compare_args, group, in_processes, spaces

ERRORS = ("rmse", "median", "p99", "worst", "psnr")
MEASURE = choose_metrics(None, spaces(), 18, (3, 8, 8))
LIGHT = choose_metrics(["rmse"], [], 18, (3, 8, 8))


def evaluated(**options):
    denoiser = Mixture()
    table, reference = (named_solver(name, denoiser.schedule) for name in ("unipc:4", "ddim:12"))
    settings = {"num_images": 18, "batch_size": 5, "measure": MEASURE} | options
    return evaluate_table(denoiser, table, reference, **settings)


def test_it_gives_the_figures_of_a_comparison(tmp_path):
    args = compare_args(tmp_path, num_samples=18, bootstrap=0)
    rows = compare_groups([group(Mixture(), ["unipc:4"])], args, spaces())
    found = evaluated()
    assert set(found) == {"nfe", "num_images", *ERRORS, "fd", "kid", "precision", "recall", "inception_score"}
    assert found == pytest.approx({name: rows[1][name] for name in found}, rel=1e-4)


def test_processes_share_the_work(tmp_path):
    expected = evaluated()
    for found in in_processes(lambda rank: evaluated(), 2, tmp_path / "work"):
        assert found == pytest.approx(expected, rel=1e-5)


def test_what_few_or_latent_images_leave():
    latent, picture, clothes = (
        SimpleNamespace(sample_shape=shape, name=name)
        for shape, name in (((4, 16, 16), "dit"), ((3, 32, 32), "dit"), ((1, 32, 32), "fashion-dit"))
    )
    assert shipped_measure(latent, 16).spaces == ()
    assert shipped_measure(picture, 16).spaces[0].metrics == ("kid", "precision_recall", "inception_score")
    assert "fd" in shipped_measure(picture, 129).spaces[0].metrics
    assert "fd" in shipped_measure(clothes, 129).spaces[0].metrics
    light = evaluated(measure=LIGHT)
    assert set(light) == {"nfe", "num_images", *ERRORS}


def test_a_guided_row_is_two_calls_in_every_report(tmp_path):
    """Guidance inside the denoiser and as weights of the table make the same images at the same cost."""

    class Guided(Mixture):
        def null_condition(self, condition):
            return condition

    denoiser = with_guidance(Guided(), 2.0)
    table, reference = (named_solver(name, denoiser.schedule) for name in ("unipc:4", "ddim:12"))
    settings = {"num_images": 8, "measure": LIGHT}
    inside, split = (evaluate_table(denoiser, t, reference, **settings) for t in (table, table.guided(2.0)))
    assert inside["nfe"] == split["nfe"] == 8
    assert evaluate_table(denoiser, table.guided(2.0, [0, 2]), reference, **settings)["nfe"] == 6
    assert split["rmse"] == pytest.approx(inside["rmse"], rel=1e-3)
    rows = compare_groups([group(denoiser, ["unipc:4"])], compare_args(tmp_path, num_samples=4, bootstrap=0))
    assert [(row["nfe"], row["rows"], row["evaluations"]) for row in rows] == [(24, 12, 24), (8, 4, 8)]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="overlap the evaluation seeds 0 to 17"):
        evaluated(fitted_seeds=[[10, 12]])
    assert evaluated(fitted_seeds=[[18, 20]])["nfe"] == 4

    def too_few(rank):
        try:
            return evaluated(num_images=1)
        except ValueError as error:
            return str(error)

    assert "at least one per process" in in_processes(too_few, 2, tmp_path / "work")[0]


def test_the_reference_may_have_a_network_of_its_own():
    denoiser, teacher = Mixture(), Mixture(19)
    table, reference = (named_solver(name, denoiser.schedule) for name in ("unipc:4", "ddim:12"))
    settings = {"num_images": 6, "measure": LIGHT}
    found = evaluate_table(denoiser, table, reference, reference_denoiser=teacher, **settings)
    images = reference_images(teacher, reference, 6, 0)
    assert found == evaluate_table(denoiser, table, images, **settings)
    assert found["rmse"] != evaluate_table(denoiser, table, reference, **settings)["rmse"]


class Negatives(Mixture):
    def decode(self, states):
        return -states


def test_features_are_of_decoded_images():
    plain = evaluated()
    denoiser = Negatives()
    table, reference = (named_solver(name, denoiser.schedule) for name in ("unipc:4", "ddim:12"))
    found = evaluate_table(denoiser, table, reference, num_images=18, batch_size=5, measure=MEASURE)
    assert found["rmse"] == pytest.approx(plain["rmse"])
    assert found["fd"] != pytest.approx(plain["fd"], rel=1e-3)
