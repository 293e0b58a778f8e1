"""One table says what a fast sampler is; one loop runs it. See docs/table.md."""

from solvers.noise import row_noise, start_noise
from solvers.sampler import Trace, sample, sample_trace
from solvers.schedule import NoiseSchedule
from solvers.table import CanonicalTable, Consistency, SolverTable, propagate
from solvers.tabulate import tabulate

__all__ = [
    "CanonicalTable",
    "Consistency",
    "NoiseSchedule",
    "SolverTable",
    "Trace",
    "propagate",
    "row_noise",
    "sample",
    "sample_trace",
    "start_noise",
    "tabulate",
]
