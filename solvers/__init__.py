"""One table says what a fast sampler is; one loop runs it. See docs/table.md."""

from solvers.artifact import load_solver, save_solver, student_path
from solvers.errors import SolverError
from solvers.noise import row_noise, start_noise
from solvers.sampler import Trace, sample, sample_trace
from solvers.schedule import NoiseSchedule
from solvers.table import CanonicalTable, Consistency, SolverTable, propagate
from solvers.tabulate import tabulate

__all__ = [
    "CanonicalTable",
    "Consistency",
    "NoiseSchedule",
    "SolverError",
    "SolverTable",
    "Trace",
    "load_solver",
    "propagate",
    "row_noise",
    "sample",
    "sample_trace",
    "save_solver",
    "start_noise",
    "student_path",
    "tabulate",
]
