"""Batches of cached trajectories for OLSS, in equal number on every process."""

from torch.utils.data import DataLoader, Dataset

from data.shards import Trajectories
from data.trajectories import TrajectoryCache
from training.testing import TableData

Unit = tuple[str, Trajectories | None]


class FitTrajectories(TableData):
    """The first trajectories of a cache for fitting, the last ones held out.

    Args:
        folder: written by `train.py predict`, see configs/trajectories.
        batch_size: trajectories per batch and process.
        holdout: trajectories at the end of the cache that are never fitted; they judge paths and the result.
        limit: fit at most this many; default: all but the held-out ones.
    Raises:
        ValueError: no complete cache, or too few trajectories in it.
    """

    def __init__(self, folder: str, batch_size: int = 32, holdout: int = 32, limit: int | None = None) -> None:
        super().__init__()
        self.cache = TrajectoryCache(folder)
        available = len(self.cache) - holdout
        self.num_fitted = min(available, limit or available)
        if holdout < 1 or self.num_fitted < 1:
            raise ValueError(
                f"{folder} has {len(self.cache)} trajectories, {holdout} to hold out and {self.num_fitted} to fit: "
                "at least one of each is needed"
            )
        self.batch_size, self.holdout = batch_size, holdout

    @property
    def fitted_seeds(self) -> list[int]:
        """Seeds of the trajectories that are fitted."""
        return self.cache.seeds[: self.num_fitted]

    @property
    def held_out_seeds(self) -> list[int]:
        """Seeds of those that are not."""
        return self.cache.seeds[-self.holdout :]

    def fitted(self, limit: int) -> Trajectories:
        """The first trajectories that are fitted, in memory."""
        return self.cache.load(min(limit, self.num_fitted))

    def held_out(self) -> Trajectories:
        """The held-out trajectories, in memory."""
        first = len(self.cache) - self.holdout
        size = self.cache.manifest["shard_size"]
        units = self.cache.units(size)[first // size :]
        return Trajectories.join([self.cache.read(*unit) for unit in units])[-self.holdout :]

    def train_dataloader(self) -> DataLoader:
        """(name, batch) units of this process; a process without a batch of its own in a round gets None."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(_Units(self.cache, self._units(rank, world_size)), batch_size=None, collate_fn=_as_is)

    def _units(self, rank: int, world_size: int) -> list[tuple[int, int, int] | None]:
        units = self.cache.units(self.batch_size, self.num_fitted)
        rounds = -(-len(units) // world_size)
        return (units + [None] * (rounds * world_size - len(units)))[rank::world_size]


class _Units(Dataset):
    def __init__(self, cache: TrajectoryCache, units: list[tuple[int, int, int] | None]) -> None:
        self.cache, self.units = cache, units

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> Unit:
        unit = self.units[index]
        if unit is None:
            return "none", None
        return "-".join(map(str, unit)), self.cache.read(*unit)


def _as_is(unit: Unit) -> Unit:
    return unit
