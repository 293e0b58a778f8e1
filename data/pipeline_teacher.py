"""`train.py predict` for pipelines without an adapter: their own runs, recorded on any number of devices."""

import lightning
from torch import nn

from data.pipeline_recorder import describe_recording, record_seeds
from data.shards import Trajectories
from data.teacher import TeacherTrajectories, stored_dtype
from data.trajectories import FIRST_SEED
from data.trajectory_writer import TrajectoryWriter
from denoisers import load_denoiser
from denoisers.pipeline import PipelineDenoiser


class PipelineTrajectories(TeacherTrajectories):
    """Runs a pipeline with its own scheduler from each seed; a callback stores what the scheduler sees.

    Args:
        denoiser: a PipelineDenoiser, or a description file of `family: pipeline` for `load_denoiser`.
        folder: where the trajectories go; an interrupted run goes on there.
        num_inference_steps: of the pipeline.
        num_trajectories: how many; default: one per prompt.
        first_seed: they have seeds first_seed, first_seed + 1, ...
        shard_size: trajectories in a shard.
        dtype: of the stored states and outputs.
        guidance_scale: the pipeline's own, for a denoiser given by its path.
    Raises:
        ValueError: a denoiser that is no pipeline, an unknown dtype, or what `record_trajectories` refuses.
    """

    def __init__(
        self,
        denoiser: str | nn.Module,
        folder: str,
        num_inference_steps: int = 50,
        num_trajectories: int | None = None,
        first_seed: int = FIRST_SEED,
        shard_size: int = 8,
        dtype: str = "float32",
        guidance_scale: float = 1.0,
    ) -> None:
        lightning.LightningModule.__init__(self)
        self.dtype_ = stored_dtype(dtype)
        self.denoiser = load_denoiser(denoiser, guidance_scale) if isinstance(denoiser, str) else denoiser
        if not isinstance(self.denoiser, PipelineDenoiser):
            raise ValueError(
                f"{denoiser} is a {type(self.denoiser).__name__}: recording needs `family: pipeline` in its file; "
                "for a model with an adapter use data.teacher.TeacherTrajectories"
            )
        self.num_inference_steps = num_inference_steps
        self.seeds = range(first_seed, first_seed + (num_trajectories or len(self.denoiser.entries)))
        self.folder, self.shard_size = folder, shard_size

    def setup(self, stage: str) -> None:
        """Move the pipeline to this process's device, and check the folder, or refuse it, before any work."""
        self.denoiser.to(self.trainer.strategy.root_device)
        teacher = describe_recording(self.denoiser, self.num_inference_steps, self.dtype_)
        self.writer = TrajectoryWriter(self.folder, teacher, self.seeds, self.shard_size)

    def predict_step(self, batch: int, batch_idx: int) -> list[Trajectories]:
        """Trajectories of a shard; nothing for one that exists already."""
        if batch < 0:
            return []
        return [record_seeds(self.denoiser, self.num_inference_steps, self.writer.shard_seeds(batch), self.dtype_)]
