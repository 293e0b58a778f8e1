"""ParaTAA: any solver table, all rows at once. See parataa/README.md."""

from parataa.processes import processes
from parataa.sampler import ParallelStats, parallel_sample
from parataa.settings import ParallelSettings

__all__ = ["ParallelSettings", "ParallelStats", "parallel_sample", "processes"]
