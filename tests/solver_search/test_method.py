import json
import math
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data.teacher_data import TeacherData
from data.trajectories import TrajectoryCache, generate_trajectories
from denoisers import with_guidance
from evaluation.distances import KernelTo
from evaluation.evaluate import evaluate_table
from solver_search.descent import Descent
from solver_search.losses import SearchLoss
from solver_search.method import SolverSearch
from solver_search.objective import Compute
from solver_search.parameters import PaperParameters
from solver_search.starts import Start
from solver_search.whitened import whitened
from solvers import NoiseSchedule, identify, load_solver, named_solver, sample, sample_trace, save_solver, start_noise
from tests.solver_search.toys import SHAPE, Labelled, TwoPoints
from training.solver_training import SolverTraining
from training.testing import Evaluation

FIRST = 2**31
SCHEDULE = NoiseSchedule.linear()


@pytest.fixture
def cache(tmp_path):
    return _cache(tmp_path / "cache", TwoPoints(SCHEDULE))


def _cache(folder, denoiser, count=16, steps=12):
    table = named_solver(f"{'euler' if denoiser.schedule.kind == 'flow' else 'ddim'}:{steps}", denoiser.schedule)
    seeds = range(FIRST, FIRST + count)
    generate_trajectories(denoiser, table, seeds, folder, shard_size=8, dtype=torch.float64, progress=False)
    return str(folder)


def _search(denoiser, folder=None, guidance_scale=1.0, evaluation=None, **options):
    """Flat options of a search, each put into its group."""
    groups = {"start": Start, "descent": Descent}
    for name, group in groups.items():
        own = {key: options.pop(key) for key in list(options) if key in group.__dataclass_fields__}
        options[name] = group(**own)
    folder, evaluation = folder and str(folder), evaluation or Evaluation()
    return SolverTraining(denoiser, SolverSearch(**options), folder, guidance_scale, evaluation=evaluation)


def _table(search, nfe):
    return search.current_tables()[f"solver-search-{nfe}"]


def _fit(search, data, max_steps=-1, ckpt_path=None, folder=None, **options):
    callbacks = [ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)] if folder else []
    trainer = lightning.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **{"devices": 1} | options,
    )
    trainer.fit(search, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def _rmse(table, denoiser, seeds=range(64)):
    noise = start_noise(seeds, SHAPE, torch.float64)
    end = sample_trace(denoiser, named_solver("ddim:12", SCHEDULE), noise).states[-1]
    return float((sample(denoiser, table, noise) - end).square().mean().sqrt())


def _same(first, second, tolerance=0.0):
    for name in ("timesteps", "state_coef", "output_coef"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=tolerance, atol=tolerance)


def test_sweep_writes_artifacts_that_are_better_than_their_start_on_unseen_seeds(cache, tmp_path):
    denoiser = TwoPoints(SCHEDULE)
    search = _search(denoiser, tmp_path, nfe=[3, 4], warm=True, steps=5, tolerance=0.0)
    _fit(search, TeacherData(cache, holdout=4))
    for nfe in (3, 4):
        table = load_solver(tmp_path / f"solver-search-{nfe}.json", denoiser)
        start = _rmse(named_solver(f"dpmpp:{nfe}", SCHEDULE), denoiser)
        assert _rmse(table, denoiser) < 0.75 * start
        _same(table, _table(search, nfe))
        info = table.info
        assert info["fitted_on"]["seeds"] == [[FIRST, FIRST + 16]]
        assert info["fitted_on"]["evaluations"]["tangent"] > 0
        found = info["validation"]
        assert 0 < found["median"] <= found["rmse"] * 2**0.5
        assert found["rmse"] < min(found["worst"], start)
        assert found["median"] <= found["p99"] <= found["worst"]
    assert _rmse(_table(search, 4), denoiser) < _rmse(_table(search, 3), denoiser)


def test_what_reports_chooses_nothing(cache, tmp_path, monkeypatch):
    """Other trajectories in its place: the same numbers, other figures; they are those of the artifact."""
    denoiser, reporting, found = TwoPoints(SCHEDULE), TeacherData.reporting_batches, []
    for replaced in (reporting, TeacherData.choosing_batches):
        monkeypatch.setattr(TeacherData, "reporting_batches", replaced)
        folder = tmp_path / str(len(found))
        _fit(_search(denoiser, folder, nfe=3, steps=2, tolerance=0.0), TeacherData(cache, holdout=6))
        found.append(load_solver(folder / "solver-search-3.json"))
    _same(*found)
    held = TrajectoryCache(cache).load()[16 - 3 :]
    start = named_solver("dpmpp:3", SCHEDULE)
    figures, others = (table.info["validation"] for table in found)
    for prefix, table in (("", found[0]), ("start_", start)):
        squared = (sample(denoiser, table, held.noise) - held.end).square().flatten(1).mean(1)
        assert figures[f"{prefix}rmse"] == pytest.approx(float(squared.mean().sqrt()), rel=1e-6)
        assert figures[f"{prefix}worst"] == pytest.approx(float(squared.max().sqrt()), rel=1e-6)
    assert (figures["seeds"], figures["chosen_on"]) == ([[FIRST + 13, FIRST + 16]], [[FIRST + 10, FIRST + 13]])
    assert others["rmse"] != figures["rmse"]


def test_an_artifact_fits_a_denoiser_that_thresholds(cache, tmp_path):
    denoiser = TwoPoints(SCHEDULE)
    denoiser.thresholding = {"ratio": 0.9}
    _fit(_search(denoiser, tmp_path, nfe=3, steps=1), TeacherData(cache, holdout=4))
    assert load_solver(tmp_path / "solver-search-3.json", denoiser).info["thresholding"] == {"ratio": 0.9}


def test_an_artifact_counts_the_evaluations_of_its_own_stage(cache, tmp_path):
    found = []
    for name, nfe in (("sweep", [3, 4]), ("alone", [4])):
        search = _search(TwoPoints(SCHEDULE), tmp_path / name, nfe=nfe, steps=2, tolerance=0.0)
        _fit(search, TeacherData(cache, holdout=4))
        found.append(load_solver(tmp_path / name / "solver-search-4.json").info["fitted_on"]["evaluations"])
    assert found[0] == found[1]


def test_test_measures_the_tables_of_a_checkpoint(cache, tmp_path):
    denoiser, data = TwoPoints(SCHEDULE), TeacherData(cache, holdout=4)
    options = {"nfe": [3, 4], "steps": 2, "evaluation": Evaluation(8, metrics=["rmse"], reference="ddim:12")}
    search = _search(denoiser, **options)
    _fit(search, data, folder=tmp_path)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    found = trainer.test(
        _search(denoiser, **options), datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )[0]
    for nfe in (3, 4):
        same = evaluate_table(denoiser, _table(search, nfe), named_solver("ddim:12", SCHEDULE), num_images=8)
        assert found[f"test/solver-search-{nfe}/rmse"] == pytest.approx(same["rmse"], rel=1e-6)


def test_start_with_the_lowest_loss_goes_on(cache, tmp_path):
    folder = tmp_path / "out"
    search = _search(TwoPoints(SCHEDULE), folder, nfe=4, solver=["ddim", "unipc", "paper"], steps=1, screening=1)
    _fit(search, TeacherData(cache, holdout=0))
    losses = {}
    for start in ("ddim", "unipc", "paper"):
        single = _search(TwoPoints(SCHEDULE), nfe=4, solver=start, steps=1)
        losses[start] = _fit(single, TeacherData(cache, holdout=0)).callback_metrics["train/solver-search-4/loss"]
    assert load_solver(folder / "solver-search-4.json").info["config"]["start"] == min(losses, key=losses.get)


@pytest.mark.parametrize("optimizer", ["lm", "lbfgs", "lion", "adam"])
def test_resumed_run_equals_an_uninterrupted_one(cache, tmp_path, optimizer):
    def make():
        options = {"steps": 3, "tolerance": 0.0, "loss": SearchLoss(path=1.0), "warm": True}
        return _search(TwoPoints(SCHEDULE), nfe=[2, 3], optimizer=optimizer, **options)

    def data():
        return TeacherData(cache, holdout=4, batch_size=4)

    whole, first, second = make(), make(), make()
    _fit(whole, data())
    _fit(first, data(), max_steps=2 if optimizer == "lm" else 4, folder=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == ["anchor"]
    _fit(second, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert sorted(second.fitting.finished) == [2, 3]
    for nfe in (2, 3):
        _same(_table(second, nfe), _table(whole, nfe))
    assert second.fitting.objective.evaluations == whole.fitting.objective.evaluations


@pytest.mark.parametrize("optimizer", ["lbfgs", "lion", "adam"])
def test_first_order_searches_go_down(cache, optimizer):
    for start in ("paper", "ddim"):
        options = {"optimizer": optimizer, "steps": 30, "learning_rate": 0.02}
        search = _search(TwoPoints(SCHEDULE), nfe=4, solver=start, **options)
        before = PaperParameters(SCHEDULE, 4)
        _fit(search, TeacherData(cache, holdout=0))
        assert _rmse(_table(search, 4), search.denoiser) < 0.8 * _rmse(before.table(before.initial()), search.denoiser)


def test_resuming_a_finished_run_ends_at_once(cache, tmp_path):
    search, again = (_search(TwoPoints(SCHEDULE), nfe=2, steps=1) for _ in range(2))
    _fit(search, TeacherData(cache, holdout=0), folder=tmp_path)
    _fit(again, TeacherData(cache, holdout=0), ckpt_path=str(tmp_path / "last.ckpt"))
    _same(_table(again, 2), _table(search, 2))


@pytest.mark.parametrize("batch_size", [5, None])
@pytest.mark.parametrize("optimizer", ["lm", "lbfgs", "lion"])
def test_two_processes_equal_one(cache, tmp_path, optimizer, batch_size):
    """11 trajectories to learn from, 5 held out, 5 or 11 of them a step: nothing divides."""

    def run(name, **options):
        compute = Compute(curvature_samples=None if batch_size else 3)
        search = _search(
            TwoPoints(SCHEDULE),
            tmp_path / name,
            nfe=3,
            optimizer=optimizer,
            steps=3,
            tolerance=0.0,
            compute=compute,
        )
        _fit(search, TeacherData(cache, holdout=5, batch_size=batch_size), **options)
        return load_solver(tmp_path / name / "solver-search-3.json")

    pair = run("pair", strategy="ddp_fork", devices=2)
    one = run("one")
    _same(pair, one, 1e-6)
    assert pair.info["fitted_on"]["evaluations"] == one.info["fitted_on"]["evaluations"]
    assert all(pair.info["validation"].pop(name) == one.info["validation"].pop(name) for name in ("seeds", "chosen_on"))
    assert pair.info["validation"] == pytest.approx(one.info["validation"], rel=1e-6)


def test_fresh_trajectories_are_the_teachers(tmp_path):
    denoiser = TwoPoints(SCHEDULE)
    search = _search(denoiser, nfe=3, steps=2, tolerance=0.0)
    data = TeacherData(teacher="ddim:12", limit=8, holdout=4, first_seed=FIRST + 100)
    _fit(search, data)
    assert search.fitting.objective.evaluations.forward >= (2 * 8 + 2 * 4) * 12
    assert data.seed_ranges() == [[FIRST + 96, FIRST + 116]]
    assert _rmse(_table(search, 3), denoiser) < 0.7 * _rmse(named_solver("dpmpp:3", SCHEDULE), denoiser)


def test_range_of_guidance_scales_from_several_caches(tmp_path):
    scales = (1.0, 2.0)
    folders = [_cache(tmp_path / f"g{g}", with_guidance(Labelled(SCHEDULE), g), count=8) for g in scales]
    path = tmp_path / "solver-search-3.json"
    search = _search(Labelled(SCHEDULE), tmp_path, nfe=3, guidance_scale=[1.0, 2.0], steps=2)
    _fit(search, TeacherData(folders, holdout=2))
    table = load_solver(path, Labelled(SCHEDULE), guidance_scale=1.5)
    seeds = range(12)
    noise, labels = start_noise(seeds, SHAPE, torch.float64), torch.tensor(seeds) % 3
    errors = []
    for solver in (table, named_solver("dpmpp:3", SCHEDULE)):
        ends = []
        for scale in scales:
            denoiser = with_guidance(Labelled(SCHEDULE), scale)
            end = sample(denoiser, named_solver("ddim:12", SCHEDULE), noise, labels)
            ends.append((sample(denoiser, solver, noise, labels) - end).square().mean())
        errors.append(float(sum(ends)))
    assert errors[0] < 0.7 * errors[1]
    with pytest.raises(ValueError, match=r"made for guidance scale 2\.0, found \(1\.0, 1\.5\)"):
        _fit(_search(Labelled(SCHEDULE), nfe=3, guidance_scale=[1.0, 1.5]), TeacherData(folders, holdout=2))


def test_fresh_guidance_is_drawn_per_seed_within_the_range():
    search = _search(Labelled(SCHEDULE), nfe=2, guidance_scale=[1.0, 3.0], steps=1)
    seen = []
    data = TeacherData(teacher="ddim:5", limit=6, holdout=0)
    data.run_teacher = partial(_spy, seen, data.run_teacher)
    _fit(search, data)
    scales = seen[0].condition["guidance_scale"]
    assert len(scales.unique()) == 6
    assert float(scales.min()) >= 1
    assert float(scales.max()) <= 3


def _spy(seen, function, *arguments):
    seen.append(function(*arguments))
    return seen[-1]


class Breaks(TwoPoints):
    """Turns to NaN after some evaluations."""

    left = 10**9

    def forward(self, x, timestep, condition=None):
        self.left -= 1
        return super().forward(x, timestep) * (1.0 if self.left > 0 else math.nan)


def test_not_a_number_stops_with_the_last_good_artifact_kept(cache, tmp_path):
    path = tmp_path / "solver-search-3.json"
    denoiser = Breaks(SCHEDULE)
    search = _search(denoiser, tmp_path, nfe=3, optimizer="adam", steps=50)
    denoiser.left = 2 + 3 * 5 + 1  # two for the memory estimate; the sixth step breaks
    with pytest.raises(ValueError, match=r"nan at step 5 of 3 evaluations, numbers .*table is .*search-3.json"):
        _fit(search, TeacherData(cache, holdout=0))
    table = load_solver(path)
    assert _rmse(table, TwoPoints(SCHEDULE)) < _rmse(named_solver("dpmpp:3", SCHEDULE), TwoPoints(SCHEDULE))
    assert json.loads(path.read_text())["config"]["steps"] == 5


@pytest.mark.parametrize(("feature", "named"), [(1.0, "tiny-classifier"), (0.0, None)])
def test_an_artifact_names_the_features_of_its_loss(cache, tmp_path, monkeypatch, feature, named):
    monkeypatch.setattr("solver_search.method.Features", lambda name, statistics: torch.nn.Flatten())
    loss = SearchLoss(endpoint=1.0 - feature, feature=feature)
    search = _search(TwoPoints(SCHEDULE), tmp_path, nfe=3, steps=1, loss=loss, extractor="tiny-classifier")
    _fit(search, TeacherData(cache, holdout=0))
    assert json.loads((tmp_path / "solver-search-3.json").read_text())["config"]["extractor"] == named


class ToData(torch.nn.Flatten):
    """Squashed pixels as features; the data are farther apart than those of the teacher."""

    def __init__(self, name, statistics):
        super().__init__()
        self.kernel = KernelTo(self(3 * start_noise(range(200), SHAPE, torch.float64).sign()))

    def forward(self, images):
        return super().forward(images).tanh()

    def distance(self, images):
        return self.kernel.differentiable(self(images))


def test_a_kernel_distance_leads_to_the_data_and_past_the_teacher(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("solver_search.method.Features", ToData)
    loss, denoiser = SearchLoss(endpoint=0.0, kernel=1.0), TwoPoints(SCHEDULE)
    search = _search(
        denoiser, tmp_path, nfe=3, optimizer="lbfgs", steps=30, loss=loss, extractor="pixels", statistics="data"
    )
    _fit(search, TeacherData(cache, holdout=0))
    noise, distance = start_noise(range(64), SHAPE, torch.float64), ToData("", "").distance
    path = tmp_path / "solver-search-3.json"
    tables = [named_solver("dpmpp:3", SCHEDULE), TrajectoryCache(cache).table, load_solver(path)]
    start, teacher, found = (float(distance(sample(denoiser, table, noise))) for table in tables)
    assert found < 0.5 * min(start, teacher)
    assert json.loads(path.read_text())["config"]["statistics"] == "data"


def test_a_learning_rate_that_decays(cache):
    """Linearly: the last of four steps has a quarter of the first, after a resume as well."""
    search = _search(TwoPoints(SCHEDULE), nfe=3, optimizer="adam", steps=4, learning_rate=0.02, decay=True)
    rates = []
    search.log_dict = lambda values, **_: rates.extend(v for k, v in values.items() if k.endswith("/learning_rate"))
    _fit(search, TeacherData(cache, holdout=0))
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])


@pytest.mark.parametrize(
    ("optimizer", "whiten", "expected"), [("lbfgs", False, True), ("adam", True, True), ("adam", False, False)]
)
def test_coordinates_of_first_order(cache, monkeypatch, optimizer, whiten, expected):
    seen = []
    monkeypatch.setattr("solver_search.method.whitened", lambda *given: seen.append(given) or whitened(*given))
    _fit(
        _search(TwoPoints(SCHEDULE), nfe=3, optimizer=optimizer, steps=1, whiten=whiten), TeacherData(cache, holdout=0)
    )
    assert bool(seen) == expected


def test_refusals(cache, tmp_path):
    data = partial(TeacherData, cache, holdout=4)
    with pytest.raises(ValueError, match="made for weights"):
        _fit(_search(TwoPoints(SCHEDULE, 0.9), nfe=3), data())
    with pytest.raises(ValueError, match=r"made for guidance scale 1\.0, found 2\.0"):
        _fit(_search(Labelled(SCHEDULE), nfe=3, guidance_scale=2.0), data())
    with pytest.raises(ValueError, match="13 evaluations are more than the teacher's 12 steps"):
        _fit(_search(TwoPoints(SCHEDULE), nfe=[3, 13]), data())
    with pytest.raises(ValueError, match="1 are too few for that: set holdout to at least 2, or to 0"):
        _fit(_search(TwoPoints(SCHEDULE), nfe=3), TeacherData(cache, holdout=1))
    with pytest.raises(ValueError, match="16 samples: 13 to learn from and 4 to hold out do not fit"):
        _fit(_search(TwoPoints(SCHEDULE), nfe=3), data(limit=13))
    for option, message in (
        (("nfe", 0), "each at least 1"),
        (("optimizer", "sgd"), "use one of lm, lbfgs, lion, adam"),
        (("steps", 0), "must be positive"),
        (("whiten", True), "for lion and adam: leave them out with lm"),
        (("decay", True), "for lion and adam: leave them out with lm"),
        (("guidance_scale", [1.0, 2.0]), "null condition"),
        (("loss", SearchLoss(feature=1.0)), "no extractor"),
        (("loss", SearchLoss(kernel=1.0)), "no extractor"),
        (("statistics", "some.safetensors"), "set both of them, or none"),
    ):
        denoiser = TwoPoints(SCHEDULE)
        denoiser.null_condition = None
        with pytest.raises(ValueError, match=message):
            _search(denoiser, **dict([option]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": None}, "set both of them"),
        ({"optimizer": "lm"}, "no residuals for Levenberg-Marquardt"),
        ({"screening": 2}, "no residuals for Levenberg-Marquardt"),
        ({"compute": Compute(micro_batch=2)}, "give it 3 or more"),
    ],
)
def test_refusals_of_the_kernel_part(options, message):
    common = {"optimizer": "lbfgs", "extractor": "pixels", "statistics": "data", "loss": SearchLoss(kernel=1.0)}
    with pytest.raises(ValueError, match=message):
        _search(TwoPoints(SCHEDULE), **common | options)


def test_a_search_never_ends_worse_than_its_start(cache, tmp_path):
    """A learning rate that throws the numbers far off: the start is kept, and says so."""
    search = _search(TwoPoints(SCHEDULE), tmp_path, nfe=3, optimizer="adam", learning_rate=30.0, steps=3)
    _fit(search, TeacherData(cache, holdout=4))
    _same(load_solver(tmp_path / "solver-search-3.json"), named_solver("dpmpp:3", SCHEDULE))


@pytest.mark.parametrize("optimizer", ["lm", "lbfgs", "adam"])
def test_a_search_of_a_solver_that_makes_its_own_calls(tmp_path, optimizer):
    denoiser = with_guidance(Labelled(SCHEDULE), 2.0)
    folder = _cache(tmp_path / "cache", denoiser)
    start = named_solver("dpmpp:3", SCHEDULE).guided(2.0, rows=[0, 1])
    save_solver(start, tmp_path / "start-5.json", identify(denoiser), method="test")
    options = {"solver": str(tmp_path / "start-{nfe}.json"), "optimizer": optimizer, "steps": 4, "learning_rate": 0.003}
    search = _search(Labelled(SCHEDULE), tmp_path, guidance_scale=2.0, nfe=5, **options)
    _fit(search, TeacherData(folder, holdout=4))
    table = load_solver(tmp_path / "solver-search-5.json", denoiser)
    assert table.calls == start.calls
    noise, labels = start_noise(range(32), SHAPE, torch.float64), torch.arange(32) % 2
    wanted = sample(denoiser, named_solver("ddim:12", SCHEDULE), noise, labels)
    errors = [float((sample(denoiser, solver, noise, labels) - wanted).square().mean()) for solver in (start, table)]
    assert errors[1] < 0.7 * errors[0]
    spent = table.info["fitted_on"]["evaluations"]
    assert spent["calls"] == spent["forward"] + 2 * spent["backward"] + spent["tangent"]
