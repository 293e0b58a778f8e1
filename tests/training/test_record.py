"""What solver training hands to W&B's logger; other loggers, or none, are left alone."""

import json
from types import SimpleNamespace

from lightning.pytorch.loggers.logger import DummyLogger

from solvers import DenoiserIdentity, NoiseSchedule, save_solver
from solvers.named import named_solver
from training.record import log_about, log_table, takes_pictures, upload_solver
from training.run_card import Origin, RunCard


class Logger:
    """Keeps what it is given."""

    def __init__(self, offline=False):
        self.images, self.artifacts, self.used, self.config = {}, [], [], {}
        self.experiment = SimpleNamespace(
            log_artifact=self.artifacts.append, use_artifact=self.used.append, offline=offline
        )

    def log_image(self, key, images):
        self.images[key] = images

    def use_artifact(self, artifact):
        raise AssertionError("through the run alone")

    def log_hyperparams(self, params):
        self.config |= params


def test_a_picture_and_a_small_artifact(tmp_path):
    schedule, logger = NoiseSchedule.linear(), Logger()
    table = named_solver("ddim:4", schedule)
    identity = DenoiserIdentity(schedule, name="tiny", weight_hash="ab")
    path = save_solver(table, tmp_path / "olss-4.json", identity, method="olss", validation={"median": 0.5})
    log_table(logger, "olss-4", table)
    upload_solver(logger, path, "tiny", [Origin.of_model(identity)])
    assert list(logger.images) == ["tables/olss-4"]
    artifact = logger.artifacts[0]
    assert (artifact.name, artifact.type) == ("tiny-olss-4", "solver")
    assert artifact.description == "olss-4: 4 network evaluations, epsilon outputs, guidance scale 1.0, made for tiny"
    assert artifact.metadata["validation"] == {"median": 0.5}
    assert artifact.metadata["made_from"]["model:tiny"]["digest"] == "ab"
    assert list(artifact.manifest.entries) == ["olss-4.json"]
    assert artifact.size == path.stat().st_size < 10_000


def test_a_student_goes_along(tmp_path):
    schedule, logger = NoiseSchedule.linear(), Logger()
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(b"weights")
    path = save_solver(
        named_solver("ddim:1", schedule), tmp_path / "slam-1.json", DenoiserIdentity(schedule), method="s"
    )
    upload_solver(logger, path, "tiny", student=tmp_path / "student")
    assert sorted(logger.artifacts[0].manifest.entries) == ["slam-1.json", "student/model.safetensors"]


def test_online_a_run_is_linked_to_what_it_came_from(tmp_path):
    """By content: the same weights are the same version wherever they lie."""
    here, there = Origin("tiny", "model", "ab", "here"), Origin("tiny", "model", "ab", "there")
    online, offline = Logger(), Logger(offline=True)
    log_about(online, {"teacher": "ddim:20"}, [here])
    log_about(online, {}, [there])
    log_about(online, {}, [Origin("tiny", "model", "cd", "here")])
    log_about(offline, {"teacher": "ddim:20"}, [here])
    assert [(one.name, one.type) for one in online.used] == [("tiny", "model")] * 3
    assert online.used[0].digest == online.used[1].digest != online.used[2].digest
    assert offline.used == []
    assert offline.config["run"]["made_from"] == {"model:tiny": {"name": "tiny", "digest": "ab", "where": "here"}}


def test_trajectories_are_known_by_their_manifest(tmp_path):
    (tmp_path / "digits").mkdir()
    manifest = tmp_path / "digits" / "manifest.json"
    manifest.write_text(json.dumps({"shards": {"a": "1"}}))
    one = Origin.of_trajectories(tmp_path / "digits")
    assert (one.name, one.kind) == ("trajectories-digits", "trajectories")
    manifest.write_text(json.dumps({"shards": {"a": "2"}}))
    assert Origin.of_trajectories(tmp_path / "digits").digest != one.digest


def test_a_run_is_called_by_what_it_makes():
    assert RunCard("olss", "digits-dit", ["olss-4", "olss-6"]).name == "digits-dit olss-4 olss-6"
    assert RunCard("base", "digits-dit").name == "digits-dit base"
    assert RunCard("olss", "digits-dit", ["olss-4"]).tags == ["digits-dit", "olss", "olss-4"]


def test_without_wandb_nothing_happens(tmp_path):
    for logger in (None, SimpleNamespace(), DummyLogger()):
        assert not takes_pictures(logger)
        log_table(logger, "olss-4", None)
        upload_solver(logger, tmp_path / "missing.json", "tiny")
