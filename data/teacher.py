"""`train.py predict`: teacher trajectories by Lightning, on as many processes as the trainer has."""

from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from data.manifest import describe_teacher
from data.shards import Trajectories
from data.trajectories import FIRST_SEED, run_teacher
from data.trajectory_writer import TrajectoryWriter
from denoisers import load_denoiser, split_guidance
from solvers.named import default_solver, resolve_solver

DTYPES = ("float16", "bfloat16", "float32", "float64")


class TeacherTrajectories(lightning.LightningModule):
    """Runs the teacher from each seed; a callback stores the trajectories. `TrajectoryCache(folder)` reads them.

    Args:
        denoiser: a network, or a path for `load_denoiser`.
        folder: where the trajectories go; an interrupted run goes on there.
        teacher: solver as name:steps or an artifact's path; default: 100 steps of `default_solver`.
        num_trajectories: how many.
        first_seed: they have seeds first_seed, first_seed + 1, ...
        shard_size: trajectories in a shard and in the network's batch.
        dtype: of the stored states and outputs.
        guidance_scale: classifier-free guidance, for a denoiser given by its path; 1 is none.
        branches: store the outputs of both branches of guidance, so that a solver can leave calls out; without, the
            guided outputs alone, for solvers that a pipeline's scheduler runs by itself.
        trust_remote_code: a `denoiser.yaml` may name a class of your own, see `load_denoiser`.
    Raises:
        ValueError: a denoiser or solver that cannot be loaded, an unknown dtype, or a folder with other trajectories.
    """

    def __init__(
        self,
        denoiser: str | nn.Module,
        folder: str,
        teacher: str | None = None,
        num_trajectories: int = 256,
        first_seed: int = FIRST_SEED,
        shard_size: int = 32,
        dtype: str = "float32",
        guidance_scale: float = 1.0,
        branches: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.dtype_ = stored_dtype(dtype)
        if isinstance(denoiser, str):
            denoiser = load_denoiser(denoiser, guidance_scale, trust_remote_code=trust_remote_code)
        self.denoiser: Any = denoiser
        self.solver = teacher or default_solver(self.denoiser.schedule)
        table = resolve_solver(self.solver, self.denoiser.schedule)
        self.table = split_guidance(table, self.denoiser) if branches else table
        self.seeds = range(first_seed, first_seed + num_trajectories)
        self.folder, self.shard_size = folder, shard_size
        self.writer: TrajectoryWriter

    def setup(self, stage: str) -> None:
        """Check the folder, or refuse it, before any work."""
        with self.trainer.precision_plugin.predict_step_context():
            teacher = describe_teacher(self.denoiser, self.table, self.dtype_)
        self.writer = TrajectoryWriter(self.folder, teacher, self.seeds, self.shard_size, self.solver)

    def predict_step(self, batch: int, batch_idx: int) -> list[Trajectories]:
        """Trajectories of a shard; nothing for one that exists already."""
        if batch < 0:
            return []
        seeds = self.writer.shard_seeds(batch)
        return [run_teacher(self.denoiser, self.table, seeds, self.dtype_, device=self.device)]

    def configure_callbacks(self) -> list[lightning.Callback]:
        """The writer is part of the job."""
        return [StoreTrajectories()]


def stored_dtype(name: str) -> torch.dtype:
    """A dtype by its name; ValueError where trajectories are not stored in it."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    return getattr(torch, name)


class StoreTrajectories(lightning.Callback):
    """Hands each shard to the module's writer, which works in the background."""

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: TeacherTrajectories,
        outputs: list[Trajectories],
        batch: int,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Queue a shard."""
        for trajectories in outputs:
            pl_module.writer.write(batch, trajectories)

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: TeacherTrajectories) -> None:
        """Wait for the last shard and complete the manifest; all processes must have made theirs."""
        pl_module.writer.close()
        trainer.strategy.barrier("shards are written")
        pl_module.writer.check_complete()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: TeacherTrajectories, exception: BaseException
    ) -> None:
        """Wait for the last shard."""
        if hasattr(pl_module, "writer"):
            pl_module.writer.abandon()


class TrajectoryShards(lightning.LightningDataModule):
    """The shards each process has to make.

    Every process sees equally many: -1 stands for a shard that exists already, and for none, where there are more
    processes than shards.
    """

    def predict_dataloader(self) -> DataLoader:
        """Shard numbers of this process."""
        writer: TrajectoryWriter = self.trainer.lightning_module.writer
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        mine = range(rank, writer.num_shards, world_size)
        todo = set(writer.prepare(rank, world_size))
        shards = [shard if shard in todo else -1 for shard in mine]
        padding = -(-writer.num_shards // world_size) - len(shards)
        return DataLoader(shards + [-1] * padding, batch_size=None, collate_fn=_as_is)


def _as_is(batch: int) -> int:
    return batch
