"""What solver training hands to W&B's logger; other loggers, or none, are left alone."""

from types import SimpleNamespace

from solvers import DenoiserIdentity, NoiseSchedule, save_solver
from solvers.named import named_solver
from training.record import log_table, upload_solver


class Logger:
    """Keeps what it is given."""

    def __init__(self):
        self.images, self.artifacts = {}, []
        self.experiment = SimpleNamespace(log_artifact=self.artifacts.append)

    def log_image(self, key, images):
        self.images[key] = images


def test_a_picture_and_a_small_artifact(tmp_path):
    schedule, logger = NoiseSchedule.linear(), Logger()
    table = named_solver("ddim:4", schedule)
    path = save_solver(table, tmp_path / "olss-4.json", DenoiserIdentity(schedule), method="olss")
    log_table(logger, "olss-4", table)
    upload_solver(logger, path)
    assert list(logger.images) == ["olss-4"]
    artifact = logger.artifacts[0]
    assert (artifact.name, artifact.type) == ("solver-olss-4", "solver")
    assert list(artifact.manifest.entries) == ["olss-4.json"]
    assert artifact.size == path.stat().st_size < 10_000


def test_without_wandb_nothing_happens(tmp_path):
    for logger in (None, SimpleNamespace()):
        log_table(logger, "olss-4", None)
        upload_solver(logger, tmp_path / "missing.json")
