"""One table says what a fast sampler is; one loop runs it. See docs/table.md."""

from typing import TYPE_CHECKING, Any

from solvers.artifact import load_solver, save_solver, student_path
from solvers.calls import Call
from solvers.errors import SolverError
from solvers.export import export_solver
from solvers.hub import push_to_hub
from solvers.identity import DenoiserIdentity, identify
from solvers.ipndm import ipndm
from solvers.named import baseline_names, default_solver, named_solver, resolve_solver, solver_names
from solvers.noise import row_noise, start_noise
from solvers.sampler import Trace, sample, sample_trace
from solvers.schedule import NoiseSchedule
from solvers.space import Bands, Plain
from solvers.table import SolverTable
from solvers.tabulate import tabulate
from solvers.views import CanonicalTable, Consistency, propagate

if TYPE_CHECKING:
    from solvers.accelerate import accelerate_pipeline
    from solvers.scheduler import TableScheduler

__all__ = [
    "Bands",
    "Call",
    "CanonicalTable",
    "Consistency",
    "DenoiserIdentity",
    "NoiseSchedule",
    "Plain",
    "SolverError",
    "SolverTable",
    "TableScheduler",
    "Trace",
    "accelerate_pipeline",
    "baseline_names",
    "default_solver",
    "export_solver",
    "identify",
    "ipndm",
    "load_solver",
    "named_solver",
    "propagate",
    "push_to_hub",
    "resolve_solver",
    "row_noise",
    "sample",
    "sample_trace",
    "save_solver",
    "solver_names",
    "start_noise",
    "student_path",
    "tabulate",
]


def __getattr__(name: str) -> Any:
    """What needs diffusers, on first use: importing it takes seconds.

    diffusers, loading a pipeline that was saved with it, also looks for SchedulerMixin beside it.
    """
    if name in ("TableScheduler", "SchedulerMixin"):
        from solvers import scheduler

        return getattr(scheduler, name)
    if name == "accelerate_pipeline":
        from solvers.accelerate import accelerate_pipeline

        return accelerate_pipeline
    raise AttributeError(f"module 'solvers' has no attribute {name!r}")
