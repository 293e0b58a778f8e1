"""TableScheduler: solver artifacts as a scheduler for any diffusers pipeline.

    pipe.scheduler = TableScheduler.from_solver("olss-8.json")

A pipeline saved with it brings the scheduler's code along, and loads without this project by

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

Without trust, this project's own code runs it:

    scheduler = TableScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe = DiffusionPipeline.from_pretrained(folder, scheduler=scheduler)
"""

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from torch import Tensor

from solvers import identity
from solvers.artifact import load_folder, load_solver
from solvers.errors import SolverError
from solvers.identity import DenoiserIdentity, lifted_checks
from solvers.online import hub
from solvers.prediction import velocity_scale
from solvers.schedule import NoiseSchedule
from solvers.standalone.table_scheduler import STEP_CHECKS, is_guidance, pipeline_guidance
from solvers.standalone.table_scheduler import TableScheduler as StandaloneScheduler
from solvers.table import SolverTable
from solvers.table_json import table_from_dict, table_to_dict

__all__ = ["SchedulerMixin", "TableScheduler", "load_tables"]

NO_WORDS = {"continuous_vp": ("beta_min", "beta_max", "timestep_scale"), "flow": ("timestep_scale", "step_shifts")}
CONFIG = "scheduler_config.json"
Solver = str | Path | SolverTable
CHECKS = tuple(dict.fromkeys((*identity.CHECKS, *STEP_CHECKS, "start scale")))


class TableScheduler(StandaloneScheduler):
    __doc__ = StandaloneScheduler.__doc__
    __module__ = _module = "solvers"  # the name pipelines save

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
        allow_mismatch: str | Sequence[str] = (),
        later: Solver | Sequence[Solver] = (),
    ) -> "TableScheduler":
        """A scheduler of one solver, or of several with different numbers of steps.

        Args:
            solver: an artifact's path, the folder of several, a SolverTable, or a list of these.
            seed: see the class; needed for reproducible noise columns in pipelines that pass no generator (DiT, SD3).
            schedule, guidance_scale: what the tables were made for; by default what the artifact says.
            scale_start: see the class.
            allow_mismatch: names of the checks to leave out, of CHECKS.
            later: solvers that begin at less noise, for pipelines that start later than at the first step.
        Raises:
            SolverError: an artifact that cannot be loaded, or solvers made for different models or guidance scales.
        """
        tables, later_tables = load_tables(solver), load_tables(later)
        settings = [_settings(table, schedule, guidance_scale) for table in (*tables, *later_tables)]
        if any(other != settings[0] for other in settings):
            raise SolverError(f"these solvers were made for different models or scales ({settings}): export them apart")
        lifted = [name for name in lifted_checks(allow_mismatch, CHECKS) if name in STEP_CHECKS]
        kept = {"seed": seed, "scale_start": scale_start, "allow_mismatch": lifted}
        dicts = [[table_to_dict(table) for table in part] for part in (tables, later_tables)]
        scheduler = cls(tables=dicts[0], later_tables=dicts[1], **settings[0], **kept)
        scheduler.register_to_config(**_in_diffusers_words(settings[0]["schedule"]))
        return scheduler

    @classmethod
    def for_pipeline(
        cls,
        solver: Solver | Sequence[Solver],
        pipe: Any,
        *,
        guidance_scale: float | None = None,
        seed: int | list[int] | None = None,
        allow_mismatch: str | Sequence[str] = (),
        later: Solver | Sequence[Solver] = (),
    ) -> "TableScheduler":
        """A scheduler that fits a pipeline: checked against it, start noise scaled if the pipeline does not do so.

        Its config keeps what the original scheduler's says, for schedulers that follow.

        Args:
            solver, seed, allow_mismatch, later: as in `from_solver`.
            pipe: a diffusers pipeline with its original scheduler, or the folder of a saved one.
            guidance_scale: the scale the pipeline will be called with; None leaves it unchecked.
        Raises:
            SolverError: the solver was made for another schedule, shift, prediction type or guidance scale.
        """
        original, pipeline_class = _parts(pipe)
        scale_start = not _mentions(pipeline_class, "init_noise_sigma")
        lifted = [*lifted_checks(allow_mismatch, CHECKS), *_inapplicable(original, pipeline_class)]
        kept = {"seed": seed, "allow_mismatch": lifted, "later": later}
        scheduler = cls.from_solver(solver, scale_start=scale_start, **kept)
        scheduler.check_pipeline(pipe, guidance_scale, allow_mismatch=lifted)
        scheduler._keep(_config(original))
        return scheduler

    def push_to_hub(self, repo_id: str, *args: Any, **options: Any) -> str:
        """As diffusers' schedulers do; `solvers.push_to_hub` uploads artifacts with figures and pictures.

        Raises:
            SolverError: a Hub that cannot be reached.
        """
        with hub(options.get("token")):
            return super().push_to_hub(repo_id, *args, **options)

    def _keep(self, original: dict[str, Any]) -> None:
        """Take over a scheduler's config but what is told here already; its defaults stay defaults."""
        own = inspect.signature(type(self).__init__).parameters.keys() - {"prediction_type"}
        kept = {name: value for name, value in original.items() if name not in own and not name.startswith("_")}
        defaults = {*self.config.get("_use_default_values", ()), *original.get("_use_default_values", ())}
        self.register_to_config(**kept, _use_default_values=sorted(defaults & {*self.config, *kept}))

    def check_pipeline(
        self, pipe: Any, guidance_scale: float | None = None, allow_mismatch: str | Sequence[str] = ()
    ) -> None:
        """Compare schedule, shift, prediction type and guidance scale with a pipeline's.

        Args:
            pipe: a diffusers pipeline with its original scheduler, that scheduler, or the folder of a saved pipeline.
            guidance_scale: the scale the pipeline will be called with; None leaves it unchecked.
            allow_mismatch: names of the checks to leave out, of CHECKS.
        Raises:
            SolverError: they differ; the message names every difference.
        """
        original, pipeline_class = _parts(pipe)
        if guidance_scale is not None:
            guidance_scale = pipeline_guidance(pipe, {"guidance_scale": guidance_scale})
        lifted = lifted_checks(allow_mismatch, CHECKS)
        reasons = self._identity_reasons(original, guidance_scale, lifted)
        reasons += [] if "start scale" in lifted else self._start_reasons(pipeline_class)
        if not _mentions(pipeline_class, "set_timesteps", "retrieve_timesteps"):
            reasons.append(
                "the pipeline runs others, with schedulers of their own: take one, such as pipe.decoder_pipe"
            )
        if reasons:
            raise SolverError(
                f"this solver does not fit the pipeline: {'; '.join(reasons)}. Use a solver made for this pipeline, "
                "or allow_mismatch=<name of the check>"
            )

    def _identity_reasons(self, original: Any, guidance_scale: float | None, lifted: Sequence[str]) -> list[str]:
        if self.config["schedule"] is None:
            unknown = ["its schedule is not known: load it from an artifact, or pass schedule= to from_solver"]
            return [] if "noise schedule" in lifted else unknown
        schedule, found = NoiseSchedule.from_dict(self.config["schedule"]), NoiseSchedule.from_scheduler(original)
        if _config(original).get("use_dynamic_shifting"):  # set_timesteps compares the shift with the mu of each call
            shifts = {name: value for name, value in schedule.parameters.items() if name in ("shift", "step_shifts")}
            found = replace(found, parameters=found.parameters | shifts)
        scales = [scale for scale in (self.config["guidance_scale"], guidance_scale) if scale is not None] or [1.0]
        return DenoiserIdentity(schedule, scales[0]).differences(DenoiserIdentity(found, scales[-1]), lifted)

    def _start_reasons(self, pipeline_class: type | None) -> list[str]:
        """Whether the first state gets its scale, from the pipeline or from this scheduler."""
        if all(abs(plan.start_scale - 1) <= 1e-7 for plan in self._plans.values()):
            return []
        if self.config["scale_start"]:
            scaled = _mentions(pipeline_class, "scale_model_input")
            return [] if scaled else ["the pipeline never scales its start noise, as this solver needs"]
        if not _mentions(pipeline_class, "init_noise_sigma"):
            return ["the pipeline ignores init_noise_sigma: use for_pipeline, or pass scale_start=True to from_solver"]
        return []

    def _schedule_nodes(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self.config["schedule"] is None:
            return super()._schedule_nodes(timesteps)
        return NoiseSchedule.from_dict(self.config["schedule"]).alpha_sigma(timesteps)


def load_tables(solver: Solver | Sequence[Solver]) -> list[SolverTable]:
    """One solver or several: tables, artifacts' paths, or folders of several artifacts or of a saved scheduler."""
    solvers = [solver] if isinstance(solver, str | Path | SolverTable) else list(solver)
    return [table for entry in solvers for table in _tables(entry)]


def _tables(solver: Solver) -> list[SolverTable]:
    if isinstance(solver, SolverTable):
        return [solver]
    if Path(solver, CONFIG).is_file():
        return _saved_tables(solver)
    return list(load_folder(solver).values()) if Path(solver).is_dir() else [load_solver(solver)]


def _saved_tables(folder: str | Path) -> list[SolverTable]:
    """Those of a saved scheduler, with what they were made for."""
    scheduler: Any = TableScheduler.from_pretrained(folder)
    config = scheduler.config
    names = {"schedule": "schedule", "guidance_scale": "guidance_scale", "thresholding": "further_guidance"}
    info = {name: config[known] for name, known in names.items() if config[known] is not None}
    return [replace(table_from_dict(table), info=info) for table in config["tables"]]


def _settings(table: SolverTable, schedule: NoiseSchedule | None, guidance_scale: Any) -> dict[str, Any]:
    """What a table was made for, as config entries."""
    info = table.info
    known = info.get("schedule") if schedule is None else schedule.to_dict()
    made_for = None if known is None else {name: known[name] for name in ("kind", "prediction_type", "parameters")}
    return {
        "schedule": made_for,
        "guidance_scale": info.get("guidance_scale") if guidance_scale is None else guidance_scale,
        "further_guidance": {name: v for name, v in (info.get("thresholding") or {}).items() if is_guidance(name)},
        "num_train_timesteps": _num_train_timesteps(made_for),
        "prediction_type": _told_prediction(table.prediction_type),
    }


def _told_prediction(prediction_type: str) -> str:
    """diffusers' word for a prediction type: EDM's own, at either sign, is epsilon or v_prediction there."""
    scale = velocity_scale(prediction_type)
    return prediction_type if scale is None else "epsilon" if scale > 0 else "v_prediction"


def _in_diffusers_words(schedule: dict[str, Any] | None) -> dict[str, Any]:
    """A schedule's parameters by the names of diffusers' schedulers; none where they have no such schedule."""
    if schedule is None:
        return {}
    unknown = ("num_train_timesteps", *NO_WORDS.get(schedule["kind"], ()))
    return {name: value for name, value in schedule["parameters"].items() if name not in unknown}


def _num_train_timesteps(schedule: dict[str, Any] | None) -> int:
    if schedule is None:
        return 1000
    parameters = schedule["parameters"]
    steps = parameters.get("num_train_timesteps") or len(parameters.get("trained_betas", ()))
    return int(steps or parameters.get("timestep_scale", 1000))


def _parts(pipe: Any) -> tuple[Any, type | None]:
    """The scheduler (or its config) and the class of a pipeline, a pipeline's folder, or a bare scheduler."""
    if isinstance(pipe, str | Path):
        return saved_parts(Path(pipe))
    return (pipe.scheduler, type(pipe)) if hasattr(pipe, "scheduler") else (pipe, None)


def saved_parts(folder: Path) -> tuple[dict[str, Any], type | None]:
    """The scheduler's config and the class of a saved pipeline; SolverError where the folder holds none."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "scheduler" / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise SolverError(f"{folder} is not the folder of a saved diffusers pipeline ({error})") from error
    return config, getattr(diffusers, str(index.get("_class_name")), None)


def _inapplicable(original: Any, pipeline_class: type | None) -> list[str]:
    """Checks that say nothing about a pipeline: it passes a mu that its scheduler ignores, or sigmas of its own."""
    known = () if pipeline_class is None else inspect.signature(pipeline_class.__call__).parameters
    own_sigmas = pipeline_class is not None and "sigmas" not in known
    return ["shift"] * (not _config(original).get("use_dynamic_shifting")) + ["sigmas"] * own_sigmas


def _config(scheduler: Any) -> dict[str, Any]:
    return dict(getattr(scheduler, "config", scheduler))


def _mentions(pipeline_class: type | None, *names: str) -> bool:
    """Whether a pipeline's code, or that of one it is derived from, uses one of a scheduler's attributes.

    Assumed where there is no source to look at.
    """
    kinds = () if pipeline_class is None else pipeline_class.__mro__
    own = [kind for kind in kinds if issubclass(kind, diffusers.DiffusionPipeline)][:-1] or kinds[:1]
    try:
        sources = [inspect.getsource(sys.modules[kind.__module__]) for kind in own]
    except (OSError, KeyError, TypeError):
        return True
    return not sources or any(name in source for source in sources for name in names)
