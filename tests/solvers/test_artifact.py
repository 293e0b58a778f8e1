"""The artifact keeps every double, and refuses everything else with a reason."""

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import (
    DenoiserIdentity,
    NoiseSchedule,
    SolverError,
    SolverTable,
    load_solver,
    sample,
    save_solver,
    start_noise,
    student_path,
)
from solvers.files import sha256
from solvers.identity import CHECKS
from solvers.strict_json import checksum
from solvers.student import folder_sha256
from tests.analytic import gaussian_denoiser

SCHEDULE = NoiseSchedule.linear()
TENSORS = ("timesteps", "alpha", "sigma", "state_coef", "output_coef", "noise_coef", "state_support", "output_support")
doubles = st.floats(allow_nan=False, allow_infinity=False)


def small_table(n: int = 3, **changes) -> SolverTable:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    values = {
        "timesteps": 999 * draw(n),
        "alpha": draw(n + 1),
        "sigma": draw(n + 1),
        "state_coef": draw(n, n).tril(),
        "output_coef": draw(n, n).tril(),
        "noise_coef": torch.zeros(n, n, dtype=torch.float64),
        "start_scale": 1.0,
        "prediction_type": "epsilon",
    }
    return SolverTable(**values | changes)


@pytest.fixture
def saved(tmp_path) -> Path:
    denoiser = DenoiserIdentity(SCHEDULE, 2.0, name="tiny", weight_hash="abc")
    return save_solver(small_table(), tmp_path / "solver.json", denoiser, method="olss")


def edited(path: Path, *keys, value=None, remove: bool = False, sealed: bool = False) -> Path:
    """The artifact with one field set or removed, without any check; `sealed`: and its checksum made to fit."""
    values = json.loads(path.read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    if remove:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    if sealed:
        values["checksum"] = checksum({name: part for name, part in values.items() if name != "checksum"})
    path.write_text(json.dumps(values))
    return path


@st.composite
def tables(draw) -> SolverTable:
    n = draw(st.integers(1, 4))

    def vector(size):
        return torch.tensor(draw(st.lists(doubles, min_size=size, max_size=size)), dtype=torch.float64)

    def lower():
        return torch.stack([torch.cat([vector(i + 1), torch.zeros(n - i - 1).double()]) for i in range(n)])

    state_coef = lower()
    extra = torch.tensor(draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n))).reshape(n, n).tril()
    return SolverTable(
        vector(n),
        vector(n + 1),
        vector(n + 1),
        state_coef,
        lower(),
        lower(),
        start_scale=draw(st.floats(1e-30, 1e30)),
        prediction_type=draw(st.sampled_from(["epsilon", "sample", "v_prediction"])),
        state_support=(state_coef != 0) | extra,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables())
def test_round_trip_is_bit_for_bit(tmp_path, table):
    schedule = NoiseSchedule.cosine(prediction_type=table.prediction_type)
    loaded = load_solver(save_solver(table, tmp_path / "a.json", DenoiserIdentity(schedule), method="test"))
    for name in TENSORS:
        expected, found = getattr(table, name), getattr(loaded, name)
        assert found.dtype == expected.dtype
        same = torch.equal(found.view(torch.int64), expected.view(torch.int64)) if found.is_floating_point() else True
        assert same, name  # bits, so that -0.0 counts
        assert torch.equal(found, expected), name
    assert (loaded.start_scale, loaded.prediction_type) == (table.start_scale, table.prediction_type)
    again = tmp_path / "b.json"
    save_solver(loaded, again, DenoiserIdentity(schedule), method="test")
    tables_of = [json.loads(path.read_text())["table"] for path in (tmp_path / "a.json", again)]
    assert tables_of[0] == tables_of[1]


def test_metadata_comes_back(tmp_path):
    given_ = {"fitted_on": {"teacher": "ddim:100", "seeds": [[2**31, 2**31 + 64]]}, "validation": {"rmse": 0.1 + 0.2}}
    path = save_solver(
        small_table(),
        tmp_path / "deep" / "solver.json",
        DenoiserIdentity(SCHEDULE, (1.0, 4.0), {"kind": "dynamic", "ratio": 0.995}),
        method="olss",
        config={"path": [1, 2, 3]},
        **given_,
    )
    info = load_solver(path).info
    assert info["method"] == "olss"
    assert info["validation"]["rmse"] == 0.1 + 0.2
    assert info["fitted_on"]["seeds"] == [[2147483648, 2147483712]]
    assert info["guidance_scale"] == [1.0, 4.0]
    assert info["config"] == {"path": [1, 2, 3]}
    assert info["thresholding"]["ratio"] == 0.995
    assert NoiseSchedule.from_dict(info["schedule"]) == SCHEDULE
    assert info["schedule"]["fingerprint"] == SCHEDULE.fingerprint()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", info["created"]["time"])
    assert info["created"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert info["path"] == str(path)


def test_the_file_is_small_readable_and_has_one_row_per_line(saved):
    lines = saved.read_text().splitlines()
    row = [line for line in lines if line.strip().startswith(repr(small_table().state_coef[0, 0].item()).join("[,"))]
    assert len(row) == 1
    assert saved.stat().st_size < 4000
    assert "support" not in saved.read_text()  # stored only where it says more than the coefficients


def test_a_support_beyond_the_coefficients_is_kept(tmp_path):
    table = small_table(output_support=torch.ones(3, 3, dtype=torch.bool).tril(), output_coef=torch.eye(3).double())
    loaded = load_solver(save_solver(table, tmp_path / "a.json", DenoiserIdentity(SCHEDULE), method="m"))
    assert torch.equal(loaded.output_support, torch.ones(3, 3, dtype=torch.bool).tril())


def test_a_trainable_table_is_saved_without_gradients(tmp_path):
    table = small_table(state_coef=torch.eye(3, dtype=torch.float64).requires_grad_())
    assert not load_solver(
        save_solver(table, tmp_path / "a.json", DenoiserIdentity(SCHEDULE), method="m")
    ).state_coef.requires_grad


def test_a_loaded_solver_samples_the_same_image(saved):
    noise = start_noise([0, 1], (2, 3), torch.float64)
    denoiser = gaussian_denoiser(SCHEDULE)
    assert torch.equal(sample(denoiser, load_solver(saved), noise), sample(denoiser, small_table(), noise))


DAMAGE = {
    "unknown version": (("format_version",), 3, "format_version is 3, this code reads 1 and 2"),
    "version of another type": (("format_version",), True, "format_version is True"),
    "older version": (("format_version",), 1, "has unknown checksum"),
    "checksum": (("checksum",), "0" * 64, "has checksum [0-9a-f]{12}, the file names 000000000000"),
    "number edited": (("table", "timesteps"), [1.0, 2.0, 3.0], "it was edited or damaged"),
    "metadata edited": (("denoiser", "weight_hash"), None, "it was edited or damaged"),
    "config edited": (("config", "steps"), 3, "it was edited or damaged"),
    "extra field": (("extra",), 1, "has unknown extra"),
    "extra table field": (("table", "steps"), 3, "table has unknown steps"),
    "shape": (("table", "alpha"), [1.0, 1.0], r"alpha has shape \(2,\): a table of 3 rows needs \(4,\)"),
    "ragged": (("table", "state_coef"), [[1.0], [1.0, 2.0]], "state_coef has a wrong shape"),
    "flat": (("table", "state_coef"), [1.0, 2.0, 3.0], "state_coef has a wrong shape"),
    "empty": (("table", "timesteps"), [], "N >= 1"),
    "above diagonal": (("table", "output_coef"), [[1.0, 1.0, 0], [0, 0, 0], [0, 0, 0]], "above the diagonal"),
    "text for number": (("table", "timesteps"), ["1", 2, 3], "timesteps holds '1'"),
    "true for number": (("table", "start_scale"), True, "start_scale holds True"),
    "huge integer": (("table", "start_scale"), 10**400, "beyond the range of a double"),
    "support": (("table", "state_support"), [[1, 0, 0]] * 3, "neither true nor false"),
    "narrow support": (("table", "state_support"), [[False] * 3] * 3, "outside state_support"),
    "prediction type": (("table", "prediction_type"), "noise", "unknown prediction type 'noise'"),
    "other prediction type": (("table", "prediction_type"), "sample", "expects sample outputs .* gives epsilon"),
    "schedule edited": (("schedule", "parameters", "beta_end"), 0.03, "has fingerprint"),
    "fingerprint edited": (("schedule", "fingerprint"), "0" * 64, "has fingerprint"),
    "schedule betas": (("schedule", "parameters", "beta_end"), 10**40, r"must be a positive number up to 1e\+12"),
    "schedule range": (("schedule", "parameters", "beta_end"), 2, "betas must be at least two"),
    "schedule huge": (("schedule", "parameters", "beta_end"), 10**400, "beyond the range of a double"),
    "schedule steps": (("schedule", "parameters", "num_train_timesteps"), 10**12, "must be from 2 to 1000000"),
    "schedule text": (("schedule", "parameters", "beta_end"), "0.02", "beta_end is 0.02: it must be a positive number"),
    "schedule extra": (("schedule", "parameters", "shift"), 3.0, "unknown shift"),
    "schedule list": (("schedule", "parameters"), [1], "schedule is not valid"),
    "schedule kind": (("schedule", "kind"), "linear", "unknown schedule kind"),
    "schedule without betas": (("schedule", "parameters"), {}, "schedule is not valid"),
    "guidance text": (("guidance_scale",), "high", "guidance_scale holds 'high'"),
    "guidance order": (("guidance_scale",), [3, 1], r"give one number or \[lowest, highest\]"),
    "seeds": (("fitted_on",), {"seeds": [[5, 5]]}, "half-open ranges"),
    "seconds": (("fitted_on",), {"seconds": "text"}, "fitted_on.seconds holds 'text': it must be a number"),
    "original timesteps": (("fitted_on",), {"original_timesteps": "abc"}, "original_timesteps is str: it must be list"),
    "original of another length": (("fitted_on",), {"original_timesteps": [1.0]}, "has 1 numbers, the table 3 rows"),
    "evaluations": (("fitted_on",), {"evaluations": {"forward": "3"}}, "evaluations.forward holds '3'"),
    "guidance fitted": (("fitted_on",), {"guidance_scale": "high"}, "fitted_on.guidance_scale holds 'high'"),
    "seeds judged": (("validation",), {"seeds": [5]}, "validation.seeds holds 5"),
    "error judged": (("validation",), {"rmse": []}, "validation.rmse holds"),
    "method": (("method",), None, "method is NoneType: it must be str"),
    "config": (("config",), [], "config is list: it must be dict"),
    "student absolute": (("student",), {"path": "/etc/passwd", "sha256": ""}, "leaves the artifact's folder"),
    "student above": (("student",), {"path": "../w.safetensors", "sha256": ""}, "leaves the artifact's folder"),
    "student drive": (("student",), {"path": "C:\\w", "sha256": ""}, "leaves the artifact's folder"),
    "student missing": (("student",), {"path": "w.safetensors", "sha256": ""}, "are missing"),
    "student long": (("student",), {"path": "w" * 5000, "sha256": ""}, "File name too long"),
    "student itself": (("student",), {"path": ".", "sha256": ""}, "leaves the artifact's folder"),
}


@pytest.mark.parametrize(("keys", "value", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused(saved, keys, value, message):
    with pytest.raises(SolverError, match=message) as caught:
        load_solver(edited(saved, *keys, value=value))
    text = str(caught.value)
    assert len(text) <= 300
    assert text.isprintable()


@pytest.mark.parametrize("text", ["1" * 5000, '"' + "\\n" * 5000 + '"', "[" * 60 + "]" * 60, '{"\\ud800": 1}'])
def test_errors_are_one_line_whatever_the_file_holds(saved, text):
    whole = saved.read_text()
    for old in ('"epsilon"', "2.0", '"tiny"', '"abc"', "{}"):
        saved.write_text(whole.replace(old, text, 1))
        with pytest.raises(SolverError) as caught:
            load_solver(saved)
        assert len(str(caught.value)) <= 300
        assert str(caught.value).isprintable()


def test_an_artifact_of_format_1_loads_and_says_so_once(saved):
    values = json.loads(saved.read_text())
    del values["checksum"]
    saved.write_text(json.dumps(values | {"format_version": 1}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        tables = [load_solver(saved) for _ in range(3)]
    assert torch.equal(tables[0].state_coef, small_table().state_coef)
    assert [str(one.message) for one in caught] == [
        "solver artifacts of format 1 have no checksum, so a changed number in them is not noticed"
    ]


def test_an_artifact_of_format_1_holds_no_calls(saved):
    save_solver(small_table().guided(2.0), saved, DenoiserIdentity(SCHEDULE), method="m")
    assert load_solver(saved).nfe == 6
    values = json.loads(saved.read_text())
    del values["checksum"]
    saved.write_text(json.dumps(values | {"format_version": 1}))
    with pytest.raises(SolverError, match="format_version is 1, but the table has calls"):
        load_solver(saved)


@pytest.mark.parametrize("keys", [("method",), ("table", "sigma"), ("schedule", "fingerprint"), ("created", "time")])
def test_a_missing_field_is_refused(saved, keys):
    with pytest.raises(SolverError, match=f"misses {keys[-1]}"):
        load_solver(edited(saved, *keys, remove=True))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(saved, text):
    saved.write_text(saved.read_text().replace('"start_scale": 1.0', f'"start_scale": {text}'))
    with pytest.raises(SolverError, match="every number must be finite"):
        load_solver(saved)


def test_a_field_given_twice_is_refused(saved):
    saved.write_text(saved.read_text().replace('"method": "olss"', '"method": "olss", "method": "slam"'))
    with pytest.raises(SolverError, match="'method' twice"):
        load_solver(saved)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must be dict"), ("[" * 9999, "JSON")])
def test_text_that_is_no_artifact_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SolverError, match=message):
        load_solver(tmp_path / "a.json")


def test_paths_that_are_no_artifact(saved):
    with pytest.raises(SolverError, match="there is no such file"):
        load_solver(saved.parent / "other.json")
    with pytest.raises(SolverError, match=r"is a folder: .*solver\.json"):
        load_solver(saved.parent)
    (saved.parent / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SolverError, match="UTF-8"):
        load_solver(saved.parent / "binary.json")


def test_every_error_names_the_file(saved):
    with pytest.raises(SolverError, match=re.escape(str(saved))):
        load_solver(edited(saved, "method", value=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"lr": math.nan}}, "value JSON cannot keep"),
        ({"config": {"table": torch.ones(1)}}, "value JSON cannot keep"),
        ({"validation": {"fd": math.inf}}, "value JSON cannot keep"),
        ({"denoiser": DenoiserIdentity(NoiseSchedule.flow())}, "expects epsilon outputs"),
        ({"fitted_on": {"seeds": [0, 1]}}, "half-open"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, arguments, message):
    with pytest.raises(SolverError, match=message):
        save_solver(
            small_table(), tmp_path / "a.json", **{"method": "m", "denoiser": DenoiserIdentity(SCHEDULE)} | arguments
        )
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_artifact(saved):
    before = saved.read_bytes()
    with pytest.raises(SolverError):
        save_solver(small_table(), saved, DenoiserIdentity(SCHEDULE), method="m", config={"lr": math.nan})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["solver.json"]


class Model:
    """The attributes of a denoiser that an artifact is checked against."""

    def __init__(self, schedule=SCHEDULE, guidance_scale=2.0, weight_hash="abc", thresholding=None):
        self.schedule, self.guidance_scale = schedule, guidance_scale
        self.weight_hash, self.thresholding = weight_hash, thresholding


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(NoiseSchedule.cosine()), "made for noise schedule .*linear.*found .*squaredcos"),
        (
            Model(NoiseSchedule.linear(prediction_type="v_prediction")),
            "made for prediction type epsilon, found v_pred",
        ),
        (Model(guidance_scale=3.0), "made for guidance scale 2.0, found 3.0"),
        (Model(weight_hash="def"), "made for weights abc, found def"),
        (Model(thresholding={"ratio": 0.9}), "made for thresholding None, found {'ratio': 0.9}"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_or_allowed(saved, model, message, monkeypatch):
    monkeypatch.chdir(saved.parent)  # a long path is cut in the message, and with it what is looked for
    saved = saved.name
    with pytest.raises(SolverError, match=message):
        load_solver(saved, model)
    (check,) = (name for name in CHECKS if f"made for {name}" in message)
    assert load_solver(saved, model, allow_mismatch=check).nfe == 3
    with pytest.raises(SolverError, match=message):
        load_solver(saved, model, allow_mismatch=[name for name in CHECKS if name != check])


def test_a_model_that_fits(saved):
    assert load_solver(saved, Model()).nfe == 3
    plain = gaussian_denoiser(SCHEDULE)  # no guidance_scale: 1
    with pytest.raises(SolverError, match=r"found 1\.0"):
        load_solver(saved, plain)
    assert load_solver(saved, plain, guidance_scale=2.0).nfe == 3
    assert load_solver(edited(saved, "guidance_scale", value=[1, 2], sealed=True), plain).nfe == 3
    with pytest.raises(SolverError, match=r"found 2\.5"):
        load_solver(saved, guidance_scale=2.5)
    with pytest.raises(SolverError, match="the denoiser has no `schedule`"):
        load_solver(saved, lambda x, timestep, condition: x)


@pytest.fixture
def distilled(tmp_path) -> Path:
    """An artifact with a student of three files."""
    for name in ("model.safetensors", "config.json", "vae/model.bin"):
        (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / name).write_text(name)
    arguments = {"method": "slam", "student": "student/model.safetensors"}
    return save_solver(small_table(), tmp_path / "s.json", DenoiserIdentity(SCHEDULE), **arguments)


def test_a_student_is_known_by_its_whole_folder(distilled):
    loaded, folder = load_solver(distilled), distilled.parent / "student"
    assert loaded.info["student"] == {"path": "student/model.safetensors", "sha256": folder_sha256(folder)}
    assert student_path(loaded) == folder / "model.safetensors"
    (folder / ".hidden").write_text("what a download leaves")
    assert load_solver(distilled).nfe == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vae/model.bin", "denoiser.yaml"])
def test_a_changed_or_new_file_of_a_student_is_refused(distilled, name):
    (distilled.parent / "student" / name).write_text("path: os.system")
    with pytest.raises(SolverError, match=r"has SHA-256 [0-9a-f]{12}, the artifact names"):
        load_solver(distilled)


def test_a_student_of_format_1_is_known_by_its_weights(distilled):
    values, weights = json.loads(distilled.read_text()), distilled.parent / "student/model.safetensors"
    del values["checksum"]
    values |= {"format_version": 1, "student": {"path": "student/model.safetensors", "sha256": sha256(weights)}}
    distilled.write_text(json.dumps(values))
    assert student_path(load_solver(distilled)) == weights
    weights.write_text("other")
    with pytest.raises(SolverError, match=r"student's weights student/model\.safetensors has SHA-256"):
        load_solver(distilled)


def test_a_student_has_a_folder_of_its_own_inside(tmp_path, distilled):
    (tmp_path / "inside").mkdir()
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    path = tmp_path / "inside" / "s.json"
    arguments = {"method": "slam", "denoiser": DenoiserIdentity(SCHEDULE)}
    with pytest.raises(SolverError, match="lie outside"):
        save_solver(small_table(), path, student="../w.safetensors", **arguments)
    with pytest.raises(SolverError, match="save them before"):
        save_solver(small_table(), path, student="w.safetensors", **arguments)
    with pytest.raises(SolverError, match="give them a folder of their own"):
        save_solver(small_table(), tmp_path / "s.json", student="w.safetensors", **arguments)
    (tmp_path / "inside" / "link.safetensors").symlink_to(tmp_path / "w.safetensors")
    save_solver(small_table(), path, **arguments)
    edited(path, "student", value={"path": "link.safetensors", "sha256": sha256(tmp_path / "w.safetensors")})
    with pytest.raises(SolverError, match="leaves the artifact's folder"):
        load_solver(path)
    (tmp_path / "student" / "link.bin").symlink_to(tmp_path / "w.safetensors")
    with pytest.raises(SolverError, match="leads out of it"):
        load_solver(distilled)


def test_the_documented_example_loads_and_is_ddim(tmp_path):
    page = (Path(__file__).parent.parent.parent / "docs" / "artifact.md").read_text()
    (tmp_path / "ddim-2.json").write_text(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    table = load_solver(tmp_path / "ddim-2.json", gaussian_denoiser(SCHEDULE))
    scale = table.alpha[1] / table.alpha[0]
    assert float(table.state_coef[0, 0]) == pytest.approx(float(scale), rel=1e-6)
    assert float(table.output_coef[0, 0]) == pytest.approx(float(table.sigma[1] - table.sigma[0] * scale), rel=1e-6)
    assert table.consistency().worst < 1e-6
