"""Tuning with Lightning: both strategies, resume, two processes, artifacts, and what is refused."""

import json
from dataclasses import replace

import lightning
import pytest
import torch

from data.teacher_data import TeacherData
from data.trajectories import FIRST_SEED, TrajectoryCache
from denoisers import with_guidance
from evaluation.evaluate import evaluate_table
from solvers import DenoiserIdentity, TableScheduler, load_solver, named_solver, sample, save_solver
from tests.solver_search.toys import Labelled, TwoPoints
from tests.timestep_tuner.runs import COUNT, SCHEDULE, data, fit, learn, make, make_cache, opened
from timestep_tuner.method import OPTIMIZERS, solver_name
from training.testing import Evaluation


def test_test_measures_the_tuned_tables(cache, tmp_path):
    options = Evaluation(8, metrics=["rmse"], reference="ddim:16")
    tuner = make(solvers=["ddim:4", "unipc:3"], steps=2, evaluation=options)
    trainer = fit(tuner, data(cache))
    found = trainer.test(tuner, datamodule=data(cache), verbose=False)[0]
    for index, name in enumerate(("ddim-4", "unipc-3")):
        same = evaluate_table(
            tuner.denoiser, tuner.fitting.table(index), named_solver("ddim:16", SCHEDULE), num_images=8
        )
        assert found[f"test/tuned-{name}/rmse"] == pytest.approx(same["rmse"], rel=1e-6)


def test_an_artifact_fits_a_denoiser_that_thresholds(cache, tmp_path):
    denoiser = TwoPoints(SCHEDULE)
    denoiser.thresholding = {"ratio": 0.9}
    fit(make(denoiser, output=tmp_path, steps=1), data(cache))
    assert load_solver(tmp_path / "tuned-ddim-4.json", denoiser).info["thresholding"] == {"ratio": 0.9}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
@pytest.mark.parametrize("objective", ["noise", "trajectory"])
def test_every_solver_of_the_list_gets_better(cache, tmp_path, objective, strategy, optimizer):
    options = {"objective": objective, "strategy": strategy, "optimizer": optimizer, "steps": 12}
    tuner = make(solvers=["ddim:4", "unipc:3"], output=tmp_path, **options)
    fit(tuner, data(cache))
    for index, (name, nfe) in enumerate((("ddim", 4), ("unipc", 3))):
        table = load_solver(tmp_path / f"tuned-{name}-{nfe}.json", TwoPoints(SCHEDULE))
        base = named_solver(f"{name}:{nfe}", SCHEDULE)
        assert torch.equal(table.timesteps, tuner.fitting.table(index).timesteps)
        assert torch.equal(table.output_coef, base.output_coef)
        assert table.timesteps[-1] == base.timesteps[-1]
        assert (table.timesteps != base.timesteps)[:-1].any()
        info = table.info
        found = info["validation"]
        assert found["after"] < 0.9 * found["before"]
        for when in ("before", "after"):
            assert found[when] == pytest.approx(sum(found[f"rows_{when}"]))
            assert found[f"{when}_median"] <= found[f"{when}_p99"] <= found[f"{when}_worst"]
            assert found[when] <= found[f"{when}_worst"]
        assert ("rmse" in found) == (objective == "trajectory")
        assert info["fitted_on"]["original_timesteps"] == base.timesteps.tolist()
        assert info["fitted_on"]["seeds"][0] == [FIRST_SEED, FIRST_SEED + COUNT]
        assert "sampled from the model with" in info["fitted_on"]["data"]
        assert info["config"]["strategy"] == strategy


def test_strategies_agree_and_parallel_costs_less(cache):
    tuners = {strategy: make(strategy=strategy, steps=60) for strategy in ("parallel", "sequential")}
    for tuner in tuners.values():
        fit(tuner, data(cache))
    one, other = (tuner.fitting.table(0).timesteps for tuner in tuners.values())
    torch.testing.assert_close(one, other, rtol=0.05, atol=0)
    assert (
        tuners["parallel"].fitting.objectives[0].evaluations.calls
        < tuners["sequential"].fitting.objectives[0].evaluations.calls
    )


@pytest.mark.parametrize(
    ("optimizer", "solver", "forward", "backward"),
    [("adam", "ddim:4", 3, 2), ("gauss_newton", "ddim:4", 5, 0), ("gauss_newton", "dpmpp:4", 6, 0)],
)
def test_evaluations_are_those_of_the_steps_and_two_checks(cache, optimizer, solver, forward, backward):
    tuner = make(solvers=solver, steps=5, optimizer=optimizer)
    fit(tuner, data(cache))
    assert (tuner.fitting.table(0).timesteps != named_solver(solver, SCHEDULE).timesteps)[:3].all()  # no third check
    spent = tuner.fitting.objectives[0].evaluations
    assert (spent.forward, spent.backward) == (5 * 8 * forward * 3 + 2 * 8 * 3 * 3, 5 * 8 * backward * 3)


def test_worse_timesteps_are_not_kept(cache):
    """A rate that jumps from bound to bound ends badly, and the base table is what remains."""
    tuner = make(optimizer="adam", learning_rate=3.0, steps=1, decay=0.0)
    fit(tuner, data(cache))
    assert torch.equal(tuner.fitting.table(0).timesteps, named_solver("ddim:4", SCHEDULE).timesteps)


@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
def test_a_row_that_got_worse_keeps_its_timestep(cache, strategy):
    """Others stay tuned."""
    tuning, base = opened(cache, strategy=strategy), named_solver("ddim:4", SCHEDULE)
    keep = tuning.judge.keep

    def keep_spoilt(objective, stage, ratio):
        ratio[1] = 0.3
        return keep(objective, stage, ratio)

    tuning.judge.keep = keep_spoilt
    told = learn(tuning).table(0).timesteps
    assert told[1] == base.timesteps[1]
    assert told[2] != base.timesteps[2]


def test_nothing_is_kept_where_no_row_alone_makes_it_better(cache):
    tuning = opened(cache, steps=1, learning_rate=0.5)
    before, keep = [], tuning.judge.keep

    def keep_by_script(objective, stage, ratio):
        before.extend(stage.before)
        tuning.judge.losses = lambda objective, ratio: [value + 1 + float((ratio == 1).sum()) for value in before]
        return keep(objective, stage, ratio)

    tuning.judge.keep = keep_by_script
    assert learn(tuning).finished == [[1.0] * tuning.objectives[0].ratios.size]


def test_gauss_newton_finds_the_minimum_of_every_row(cache):
    """That of the losses over a grid."""
    tuning = learn(opened(cache, steps=12))
    ratios, grid = tuning.objectives[0].ratios, torch.linspace(0.5, 1.5, 201, dtype=torch.float64)
    losses = torch.tensor(
        [tuning.judge.losses(tuning.objectives[0], ratios.project(ratio * ratios.initial())) for ratio in grid]
    )
    found = tuning.judge.losses(tuning.objectives[0], torch.tensor(tuning.finished[0], dtype=torch.float64))
    before, best = losses[100], losses.min(0).values
    assert ((torch.tensor(found) - best) < 0.1 * (before - best)).all()


def same(first, second, tolerance=0.0):
    torch.testing.assert_close(first.timesteps, second.timesteps, rtol=tolerance, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
def test_resumed_run_equals_an_uninterrupted_one(cache, tmp_path, strategy, optimizer):
    def new():
        return make(solvers=["ddim:3", "dpmpp:3"], strategy=strategy, optimizer=optimizer, steps=4)

    whole, first, second, last = (new() for _ in range(4))
    fit(whole, data(cache))
    stop = 5 if strategy == "parallel" else 6
    fit(first, data(cache), tmp_path, max_steps=stop)
    path = next(tmp_path.glob(f"*step={stop}.ckpt"))
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == ["anchor"]
    fit(second, data(cache), tmp_path / "more", ckpt_path=path)
    for index in range(2):
        same(second.fitting.table(index), whole.fitting.table(index))
    assert [o.evaluations for o in second.fitting.objectives] == [o.evaluations for o in whole.fitting.objectives]
    final = max((tmp_path / "more").glob("*.ckpt"), key=lambda found: int(found.stem.rpartition("=")[2]))
    fit(last, data(cache), ckpt_path=final)
    same(last.fitting.table(1), whole.fitting.table(1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
def test_two_processes_equal_one(cache, tmp_path, strategy, optimizer):
    """7 samples a step and 9 held out: nothing divides."""

    def run(name, **options):
        tuner = make(output=tmp_path / name, strategy=strategy, optimizer=optimizer, steps=3)
        fit(tuner, data(cache, batch_size=7, holdout=9), **options)
        return load_solver(tmp_path / name / "tuned-ddim-4.json")

    pair, one = run("pair", strategy="ddp_fork", devices=2), run("one")
    same(pair, one, 1e-9)
    assert pair.info["validation"]["after"] == pytest.approx(one.info["validation"]["after"], rel=1e-9)
    assert pair.info["fitted_on"]["evaluations"] == one.info["fitted_on"]["evaluations"]


def test_guided_artifact_base(tmp_path):
    """Tuning an artifact keeps the seeds it was fitted on, and its guidance."""
    cache = make_cache(tmp_path / "cache", Labelled(SCHEDULE), 16)
    guided = {"denoiser": Labelled(SCHEDULE), "guidance_scale": 2.0}
    first_path = tmp_path / "tuned-unipc-3.json"
    fit(make(solvers="unipc:3", output=tmp_path, steps=2, **guided), data(cache))
    again = make(solvers=str(first_path), output=tmp_path, **guided)
    fit(again, data(cache, first_seed=FIRST_SEED + 2**22))
    table = load_solver(tmp_path / "tuned-tuned-unipc-3.json", with_guidance(Labelled(SCHEDULE), 2.0))
    first = load_solver(first_path)
    assert table.info["fitted_on"]["seeds"][: len(first.info["fitted_on"]["seeds"])] == first.info["fitted_on"]["seeds"]
    assert table.info["fitted_on"]["base"] == "tuned-unipc-3.json"
    assert table.info["fitted_on"]["original_timesteps"] == first.timesteps.tolist()
    with pytest.raises(ValueError, match="guidance scale"):
        opened(cache, Labelled(SCHEDULE), str(first_path))


def test_what_reports_chooses_nothing(cache, tmp_path, monkeypatch):
    """Other samples in its place: the same timesteps, other figures."""
    reporting, found = TeacherData.reporting_batches, []
    for replaced in (reporting, TeacherData.choosing_batches):
        monkeypatch.setattr(TeacherData, "reporting_batches", replaced)
        tuner = make(objective="trajectory", output=tmp_path / str(len(found)), steps=3)
        fit(tuner, data(cache))
        found.append(load_solver(tmp_path / str(len(found)) / "tuned-ddim-4.json"))
    same(*found)
    one, other = (table.info["validation"] for table in found)
    assert one["chosen_from"] == other["chosen_from"]
    assert one["after"] != other["after"] == pytest.approx(other["chosen_from"]["after"])
    assert one["rmse"] != other["rmse"]


@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
def test_images_are_never_further_from_the_teachers(cache, tmp_path, strategy):
    """A base whose rows do not follow the teacher's states, but whose image is the teacher's: row 0 stays behind."""
    denoiser, base = TwoPoints(SCHEDULE), named_solver("ddim:16", SCHEDULE)
    state_coef, output_coef = base.state_coef.clone(), base.output_coef.clone()
    state_coef[0] = 0.5 * state_coef[0]
    output_coef[0] = 0.5 * output_coef[0]
    state_coef[1, 1], output_coef[1, 1] = 2 * state_coef[1, 1], output_coef[1, 1]
    path = tmp_path / "odd.json"
    odd = replace(base, state_coef=state_coef, output_coef=output_coef)
    save_solver(odd, path, DenoiserIdentity(SCHEDULE), method="tabulate")
    tuner = make(solvers=str(path), objective="trajectory", strategy=strategy, output=tmp_path)
    fit(tuner, data(cache))
    found = load_solver(tmp_path / "tuned-odd.json").info["validation"]
    chosen = found["chosen_from"]
    assert chosen["end_after"] <= chosen["end_before"]
    assert chosen["after"] <= chosen["before"]
    held = TrajectoryCache(cache).load()[COUNT - 4 :]  # the half that reports
    for prefix, table in (("start_", odd), ("", tuner.fitting.table(0))):
        error = (sample(denoiser, table, held.noise) - held.end).square().flatten(1).mean(1)
        assert found[f"{prefix}rmse"] == pytest.approx(float(error.mean().sqrt()), rel=1e-6)
        assert found[f"{prefix}worst"] == pytest.approx(float(error.max().sqrt()), rel=1e-6)
    reference = named_solver("ddim:16", SCHEDULE)
    errors = [evaluate_table(denoiser, t, reference, num_images=64)["rmse"] for t in (odd, tuner.fitting.table(0))]
    assert errors[1] <= 1.01 * errors[0]


def test_ratios_go_back_until_the_images_are_no_worse(cache):
    tuning = opened(cache, objective="trajectory")
    objective = tuning.objectives[0]
    ratio = torch.tensor([1.0, 0.8, 1.0], dtype=torch.float64)
    assert objective.base.timesteps[1] == 749
    objective.end_loss = lambda timesteps, examples: torch.tensor([float(timesteps[1]) < 700], dtype=torch.float64)
    kept, ends = tuning.judge.shortened(objective, ratio)
    assert kept.tolist() == pytest.approx([1.0, 0.95, 1.0])
    assert ends == [0.0, 0.0]
    objective.end_loss = lambda timesteps, examples: torch.tensor([float(timesteps[1]) < 749], dtype=torch.float64)
    assert tuning.judge.shortened(objective, ratio)[0].tolist() == [1, 1, 1]


def test_a_learned_base_is_warned_about(cache, tmp_path):
    path = tmp_path / "olss-4.json"
    save_solver(named_solver("ddim:4", SCHEDULE), path, DenoiserIdentity(SCHEDULE), method="olss")
    with pytest.warns(UserWarning, match=r"olss-4.json was learned for the timesteps it has"):
        opened(cache, solvers=str(path))


def test_exported_scheduler_passes_fractional_timesteps(cache, tmp_path):
    tuner = make(output=tmp_path)
    fit(tuner, data(cache))
    scheduler = TableScheduler.from_solver(tmp_path / "tuned-ddim-4.json")
    scheduler.set_timesteps(4)
    told = tuner.fitting.table(0).timesteps
    assert (told != told.round())[:-1].all()
    torch.testing.assert_close(scheduler.timesteps.double(), told, rtol=1e-6, atol=0)


def test_refusals(cache, tmp_path):
    with pytest.raises(ValueError, match="no image shards"):
        fit(make(), TeacherData(images=str(tmp_path)))
    with pytest.raises(ValueError, match="needs the teacher's states"):
        fit(make(objective="trajectory"), TeacherData(images=str(tmp_path)))
    with pytest.raises(ValueError, match="made for weights"):
        fit(make(TwoPoints(SCHEDULE, 0.9), objective="trajectory"), data(cache))
    with pytest.raises(ValueError, match="made afresh: give trajectories"):
        fit(make(), TeacherData(limit=8))
    for holdout in (0, 1):
        with pytest.raises(
            ValueError, match=f"other reports, {holdout} are too few for that: set holdout to at least 2$"
        ):
            fit(make(), data(cache, holdout=holdout))
    with pytest.raises(ValueError, match=r"ddim:1 cannot be tuned: .*set free_last"):
        fit(make(solvers="ddim:1"), data(cache))
    for options, message in (
        ({"solvers": []}, "give one or more"),
        ({"solvers": ["ddim:4", "ddim:4"]}, "no two of the same name"),
        ({"objective": "x"}, "use one of noise, trajectory"),
        ({"strategy": "x"}, "use one of parallel, sequential"),
        ({"optimizer": "x"}, "use one of gauss_newton, adam"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"steps": 0}, "must be positive"),
        ({"decay": 2.0}, r"decay 2.0 in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)


class Breaks(TwoPoints):
    """Says nothing but NaN at timesteps between the trained ones."""

    def forward(self, x, timestep, condition=None):
        fractional = bool((timestep % 1).any())
        return super().forward(x, timestep) * (float("nan") if fractional else 1.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_not_a_number_stops_the_run(cache, optimizer):
    with pytest.raises(ValueError, match=r"the ratios of ddim:4 are .*nan"):
        fit(make(Breaks(SCHEDULE), optimizer=optimizer), data(cache))


class Pictures(lightning.pytorch.loggers.CSVLogger):
    """Takes pictures."""

    def __init__(self, folder):
        super().__init__(folder)
        self.images = {}

    def log_image(self, key, images):
        self.images[key] = images


def test_pictures_and_losses_are_logged(cache, tmp_path):
    logger = Pictures(tmp_path)
    fit(make(steps=3), data(cache), logger=logger, log_every_n_steps=1)
    assert set(logger.images) == {"tables/tuned-ddim-4", "tables/tuned-ddim-4-ratios"}
    lines = logger.images["tables/tuned-ddim-4-ratios"][0].axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [3, 3, 3]
    metrics = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    for name in ("train/tuned-ddim-4/loss_0", "train/tuned-ddim-4/loss_2", "train/tuned-ddim-4/learning_rate"):
        assert name in metrics
    assert "validation/tuned-ddim-4/before" in metrics
    assert "validation/tuned-ddim-4/after" in metrics


def test_names():
    assert solver_name("ddim:10") == "ddim-10"
    assert solver_name("unipc@linspace:8") == "unipc-linspace-8"
    assert solver_name("a/b/olss-8.json") == "olss-8"


def test_artifact_is_readable(cache, tmp_path):
    fit(make(output=tmp_path, steps=2), data(cache))
    config = json.loads((tmp_path / "tuned-ddim-4.json").read_text())["config"]
    assert {"steps": 2, "objective": "noise", "batch_size": 8, "processes": 1}.items() <= config.items()
