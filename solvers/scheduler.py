"""TableScheduler: solver artifacts as a scheduler for any diffusers pipeline.

    pipe.scheduler = TableScheduler.from_solver("olss-8.json")

In a fresh process, a pipeline saved with it loads by

    scheduler = TableScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe = DiffusionPipeline.from_pretrained(folder, scheduler=scheduler)

(`import solvers` beforehand is enough, too; `export_solver(..., "diffusers", ...)` is for people without this project.)
"""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from solvers.artifact import guidance_fits, load_solver, table_from_dict, table_to_dict
from solvers.errors import SolverError
from solvers.schedule import NoiseSchedule
from solvers.standalone.table_scheduler import TableScheduler as StandaloneScheduler
from solvers.table import SolverTable

DYNAMIC_SHIFT = (
    "use_dynamic_shifting",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)
Solver = str | Path | SolverTable


class TableScheduler(StandaloneScheduler):
    __doc__ = StandaloneScheduler.__doc__
    __module__ = "solvers"  # the name pipelines save; `import solvers` then suffices to load them

    @staticmethod
    def _checked(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [table_to_dict(table_from_dict(table)) for table in tables]

    @classmethod
    def from_solver(
        cls,
        solver: Solver | Sequence[Solver],
        *,
        seed: int | list[int] | None = None,
        schedule: NoiseSchedule | None = None,
        guidance_scale: float | list[float] | None = None,
        scale_start: bool = False,
        allow_mismatch: bool = False,
    ) -> "TableScheduler":
        """A scheduler of one solver, or of several with different numbers of steps.

        Args:
            solver: an artifact's path, a SolverTable, or a list of these.
            seed: see the class; needed for reproducible noise columns in pipelines that pass no generator (DiT, SD3).
            schedule, guidance_scale: what the tables were made for; by default what the artifact says.
            scale_start, allow_mismatch: see the class.
        Raises:
            SolverError: an artifact that cannot be loaded, or solvers made for different models or guidance scales.
        """
        tables = load_tables(solver)
        settings = [_settings(table, schedule, guidance_scale) for table in tables]
        if any(other != settings[0] for other in settings):
            raise SolverError(f"these solvers were made for different models or scales ({settings}): export them apart")
        kept = {"seed": seed, "scale_start": scale_start, "allow_mismatch": allow_mismatch}
        return cls(tables=[table_to_dict(table) for table in tables], **settings[0], **kept)

    @classmethod
    def for_pipeline(
        cls,
        solver: Solver | Sequence[Solver],
        pipe: Any,
        *,
        guidance_scale: float | None = None,
        seed: int | list[int] | None = None,
        allow_mismatch: bool = False,
    ) -> "TableScheduler":
        """A scheduler that fits a pipeline: checked against it, start noise scaled if the pipeline does not do so.

        Args:
            solver, seed, allow_mismatch: as in `from_solver`.
            pipe: a diffusers pipeline with its original scheduler.
            guidance_scale: the scale the pipeline will be called with; None leaves it unchecked.
        Raises:
            SolverError: the solver was made for another schedule, shift, prediction type or guidance scale.
        """
        scale_start = not _mentions(pipe, "init_noise_sigma")
        scheduler = cls.from_solver(solver, seed=seed, allow_mismatch=allow_mismatch, scale_start=scale_start)
        scheduler.check_pipeline(pipe, guidance_scale, allow_mismatch=allow_mismatch)
        original = pipe.scheduler.config
        if original.get("use_dynamic_shifting"):
            scheduler.register_to_config(**{name: original[name] for name in DYNAMIC_SHIFT if name in original})
        return scheduler

    def check_pipeline(self, pipe: Any, guidance_scale: float | None = None, allow_mismatch: bool = False) -> None:
        """Compare schedule, shift, prediction type and guidance scale with a pipeline's (or its scheduler's).

        Args:
            pipe: a diffusers pipeline with its original scheduler, or that scheduler.
            guidance_scale: the scale the pipeline will be called with; None leaves it unchecked.
            allow_mismatch: accept any difference.
        Raises:
            SolverError: they differ; the message names every difference.
        """
        reasons = [] if allow_mismatch else self._reasons(pipe, guidance_scale)
        if reasons:
            raise SolverError(
                f"this solver does not fit {type(pipe).__name__}: {'; '.join(reasons)}. Use a solver made for this "
                "pipeline, or pass allow_mismatch=True to use it all the same"
            )

    def _reasons(self, pipe: Any, guidance_scale: float | None) -> list[str]:
        original = getattr(pipe, "scheduler", pipe)
        made_for = self.config.schedule
        if made_for is None:
            return ["its schedule is not known: load it from an artifact, or pass schedule= to from_solver"]
        reasons = []
        found = _schedule_of(original)
        if found.prediction_type != made_for["prediction_type"]:
            reasons.append(f"prediction type is {found.prediction_type}, made for {made_for['prediction_type']}")
        made = {"kind": made_for["kind"], **made_for["parameters"]}
        has = {"kind": found.kind, **found.parameters}
        if original.config.get("use_dynamic_shifting"):
            has["shift"] = made.get("shift")  # set_timesteps compares it with the mu of each call
        if has != made:
            reasons.append(f"noise schedule is {has}, made for {made}")
        allowed = self.config.guidance_scale
        if guidance_scale is not None and allowed is not None and not guidance_fits(allowed, guidance_scale):
            reasons.append(f"guidance scale is {guidance_scale}, made for {allowed}")
        if any(abs(table["start_scale"] - 1) > 1e-7 for table in self._tables.values()):
            reasons += self._start_reasons(pipe)
        return reasons

    def _start_reasons(self, pipe: Any) -> list[str]:
        """Whether the pipeline scales its first state, or lets the scheduler do so."""
        if self.config.scale_start:
            return [] if _mentions(pipe, "scale_model_input") else ["the pipeline never scales its start noise"]
        if not _mentions(pipe, "init_noise_sigma"):
            return ["the pipeline ignores init_noise_sigma: use for_pipeline, or pass scale_start=True to from_solver"]
        return []

    def _nodes(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes of any timesteps of the schedule; of the table's own where the schedule is not known."""
        if self.config.schedule is None:
            return super()._nodes(timesteps)
        return NoiseSchedule.from_dict(self.config.schedule).alpha_sigma(timesteps)


def load_tables(solver: Solver | Sequence[Solver]) -> list[SolverTable]:
    """One solver or several, each an artifact's path or a table."""
    solvers = [solver] if isinstance(solver, str | Path | SolverTable) else list(solver)
    return [entry if isinstance(entry, SolverTable) else load_solver(entry) for entry in solvers]


def _settings(table: SolverTable, schedule: NoiseSchedule | None, guidance_scale: Any) -> dict[str, Any]:
    """What a table was made for, as config entries."""
    info = table.info
    known = info.get("schedule") if schedule is None else schedule.to_dict()
    made_for = None if known is None else {name: known[name] for name in ("kind", "prediction_type", "parameters")}
    return {
        "schedule": made_for,
        "guidance_scale": info.get("guidance_scale") if guidance_scale is None else guidance_scale,
        "num_train_timesteps": _num_train_timesteps(made_for),
        "prediction_type": table.prediction_type,
    }


def _num_train_timesteps(schedule: dict[str, Any] | None) -> int:
    if schedule is None:
        return 1000
    parameters = schedule["parameters"]
    steps = parameters.get("num_train_timesteps") or len(parameters.get("trained_betas", ()))
    return int(steps or parameters["timestep_scale"])


def _schedule_of(scheduler: Any) -> NoiseSchedule:
    known = scheduler.config.get("schedule") if isinstance(scheduler, StandaloneScheduler) else None
    return NoiseSchedule.from_scheduler(scheduler) if known is None else NoiseSchedule.from_dict(known)


def _mentions(pipe: Any, name: str) -> bool:
    """Whether the pipeline's code uses a scheduler's attribute; assumed where there is no source to look at."""
    if not hasattr(pipe, "scheduler"):
        return True
    try:
        return name in inspect.getsource(sys.modules[type(pipe).__module__])
    except (OSError, KeyError, TypeError):
        return True
