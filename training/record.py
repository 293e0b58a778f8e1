"""What trainings show in W&B: tables and pictures, artifacts, and what they came from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from solvers import SolverTable, load_solver
from solvers.export import describe
from training.exam import COLUMNS, PICTURES
from training.run_card import ABOUT, SPENT, Origin

METADATA = ("method", "guidance_scale", "denoiser", "fitted_on", "validation", "config", "created")


def takes_pictures(logger: Any) -> bool:
    """Whether it shows pictures; that of a smoke test takes anything and keeps nothing."""
    return hasattr(logger, "log_image") and not isinstance(logger, DummyLogger)


def keeps_artifacts(logger: Any) -> bool:
    """Whether it is W&B's."""
    return takes_pictures(logger) and hasattr(logger, "use_artifact")


@rank_zero_only
def log_table(logger: Any, name: str, table: SolverTable, title: str | None = None) -> None:
    """A picture of coefficients and timesteps, where the logger takes pictures; its title is the name by default."""
    if takes_pictures(logger):
        from evaluation.pictures import draw_table

        logger.log_image(f"tables/{name}", [draw_table(table, title or name)])


@rank_zero_only
def log_about(logger: Any, about: dict[str, Any], origins: Sequence[Origin]) -> None:
    """What a run is about into W&B's config of it, and lines to what it came from, which W&B draws online alone."""
    logger.log_hyperparams({ABOUT: about | {"made_from": _records(origins)}})
    for origin in [] if logger.experiment.offline else origins:
        logger.experiment.use_artifact(_artifact(origin))


@rank_zero_only
def log_origin(logger: Any, origin: Origin) -> None:
    """What others will come from, under the same name and content."""
    if keeps_artifacts(logger):
        logger.experiment.log_artifact(_artifact(origin))


@rank_zero_only
def log_errors(logger: Any, group: str, figures: dict[str, float], spent: float) -> None:
    """Errors of a solver on which `spent` network calls were spent so far."""
    logger.log_metrics({f"{group}/{name}": value for name, value in figures.items()} | {SPENT: spent})


@rank_zero_only
def log_validation(logger: Any, name: str, found: dict[str, Any], spent: float) -> None:
    """What an artifact says of samples that its method held out, where that are numbers."""
    figures = {key: value for key, value in found.items() if isinstance(value, int | float)}
    if takes_pictures(logger):
        log_errors(logger, f"validation/{name}", figures, spent)


@rank_zero_only
def log_results(logger: Any, rows: Sequence[Sequence[Any]], pictures: Sequence[Sequence[Any]]) -> None:
    """The table of a run's solvers, with pictures side by side, and the best errors for each number of calls.

    Args:
        logger: W&B's.
        rows: in the order of `exam.COLUMNS`.
        pictures: of each row, in the order of `exam.PICTURES`; None for one that there is not.
    """
    import wandb

    shown = [[None if one is None else wandb.Image(one) for one in each] for each in pictures]
    data = [[*row, *each] for row, each in zip(rows, shown)]
    logger.log_table("pictures/results", columns=[*COLUMNS, *PICTURES], data=data)
    best: dict[str, float] = {}
    for row in rows:
        found = dict(zip(COLUMNS, row))
        for name in ("median", "p99", "worst", "rmse", "classical median"):
            key = f"best/{found['calls']}-calls/{name.replace(' ', '_')}"
            if found[name] is not None:
                best[key] = min(found[name], best.get(key, found[name]))
    logger.log_metrics(best)


@rank_zero_only
def upload_solver(
    logger: Any, path: Path, model: str, origins: Sequence[Origin] = (), student: Path | None = None
) -> None:
    """A solver as the W&B artifact `<model>-<its name>`, where the logger is W&B's.

    Args:
        logger: any.
        path: of the solver.
        model: name of the model that it was made for.
        origins: what it came from.
        student: folder of its weights, beside it, where they are to go along.
    """
    if keeps_artifacts(logger):
        import wandb

        values = json.loads(path.read_text(encoding="utf-8"))
        metadata = {name: values[name] for name in METADATA} | {"made_from": _records(origins)}
        name, text = f"{model}-{path.stem}", describe(load_solver(path))
        artifact = wandb.Artifact(name, type="solver", metadata=metadata, description=text)
        artifact.add_file(str(path))
        if student is not None:
            artifact.add_dir(str(student), name=student.name)
        logger.experiment.log_artifact(artifact)


def _records(origins: Sequence[Origin]) -> dict[str, dict[str, Any]]:
    return {f"{origin.kind}:{origin.name}": origin.record() for origin in origins}


def _artifact(origin: Origin) -> Any:
    """Of a digest alone: the same content is the same version wherever it lies, and nothing large is uploaded."""
    import wandb

    artifact = wandb.Artifact(origin.name, type=origin.kind, metadata=origin.record())
    with artifact.new_file("origin.json") as file:
        json.dump({"name": origin.name, "digest": origin.digest}, file)
    return artifact
