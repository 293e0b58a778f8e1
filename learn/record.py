"""The teacher's trajectories: made once, kept in shards, gone on with after an interruption."""

from pathlib import Path

from data.shards import Trajectories
from data.trajectories import FIRST_SEED, TrajectoryCache
from learn.cost import Progress
from learn.network import in_pieces
from learn.options import LearnOptions
from learn.subject import Subject
from solvers.progress import progress_bar


def record(subject: Subject, options: LearnOptions, folder: Path, progress: Progress) -> TrajectoryCache:
    """Trajectories to fit on and, after them, those held out.

    Args:
        subject: the model and its teacher.
        options: how many.
        folder: of the shards.
        progress: is told after the first one.
    Raises:
        ValueError: a folder of other trajectories, a damaged shard, or too little disk or memory.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + 2 * options.trajectories)
    with subject.writer(folder, seeds) as writer:
        for shard in progress_bar(writer.prepare(), "recording", "shard", leave=False):
            chosen = writer.shard_seeds(shard)
            parts = in_pieces(lambda part: subject.run(chosen[part]), len(chosen), subject.network)  # noqa: B023
            writer.write(shard, Trajectories.join(parts))
            progress.tell_time()
    return TrajectoryCache(folder)
