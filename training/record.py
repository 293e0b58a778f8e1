"""What solver training shows in W&B: a picture of the table, and the artifact itself."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from solvers import SolverTable


@rank_zero_only
def log_table(logger: Any, name: str, table: SolverTable, title: str | None = None) -> None:
    """A picture of coefficients and timesteps, where the logger takes pictures; its title is the name by default."""
    if hasattr(logger, "log_image"):
        from evaluation.pictures import draw_table

        logger.log_image(name, [draw_table(table, title or name)])


def upload_solver(logger: Any, path: Path) -> None:
    """The artifact's file as a W&B artifact, where the logger is W&B's."""
    upload(logger, path, f"solver-{path.stem}", "solver")


@rank_zero_only
def upload(logger: Any, path: Path, name: str, kind: str) -> None:
    """A file, or a whole folder, as a W&B artifact, where the logger is W&B's."""
    if hasattr(logger, "log_image"):
        import wandb

        artifact = wandb.Artifact(name, type=kind)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        logger.experiment.log_artifact(artifact)
