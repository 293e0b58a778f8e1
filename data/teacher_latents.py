"""`train.py predict`: latents that a model with prompts makes itself, with their embeddings, for want of pictures."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from data.image_sources import LeftOut, SeedSource
from data.latent_shards import LatentSamples, stored
from data.latent_writer import LatentWriter
from data.manifest import describe_teacher, short
from data.shards import flatten_condition, seed_ranges
from data.teacher import TeacherTrajectories
from data.trajectories import FIRST_SEED
from denoisers import class_labels, condition_to
from denoisers.encoder_files import encoder_hashes
from denoisers.generate import check_finite
from solvers import sample, start_noise
from solvers.conditions import index_condition


class TeacherLatents(TeacherTrajectories):
    """Samples the teacher from each seed, with the prompt that belongs to it. `LatentData` reads them for training.

    Args:
        denoiser: with prompts, or its path for `load_denoiser`.
        folder: where the shards go; an interrupted run goes on there.
        teacher: solver as name:steps or an artifact's path; default: ddim:100, or euler:100 for a flow schedule.
        num_samples: how many; seed s has prompt s % number of prompts.
        first_seed: they have seeds first_seed, first_seed + 1, ...
        shard_size: samples in a shard.
        batch_size: samples in the network's batch.
        dtype: of the stored latents and embeddings.
        guidance_scale: of the teacher, for a denoiser given by its path.
    Raises:
        ValueError: a denoiser without prompts or without a negative one, or a folder with other samples.
    """

    def __init__(
        self,
        denoiser: str | nn.Module,
        folder: str,
        teacher: str | None = None,
        num_samples: int = 512,
        first_seed: int = FIRST_SEED,
        shard_size: int = 64,
        batch_size: int = 4,
        dtype: str = "float16",
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__(denoiser, folder, teacher, num_samples, first_seed, shard_size, dtype, guidance_scale)
        if "null" not in (getattr(self.denoiser, "conditions", None) or {}):
            raise ValueError(
                f"{self.denoiser.name} has no prompts with a negative one: write `prompts: ...` and `negative_prompt: "
                "''` in its denoiser.yaml"
            )
        self.batch_size = batch_size
        starts = range(0, num_samples, shard_size)
        parts = [self.seeds[start : start + shard_size] for start in starts]
        self.sources = [SeedSource(f"samples-{index:05d}", part) for index, part in enumerate(parts)]
        self.writer: LatentWriter  # type: ignore[assignment]

    def setup(self, stage: str) -> None:
        """Take the folder, or refuse it, before any work."""
        null = stored(index_condition(self.denoiser.conditions["null"], slice(0, 1)), self.dtype_)
        with self.trainer.precision_plugin.predict_step_context():
            description = self._description(null)
        self.writer = LatentWriter(self.folder, description, self.sources, null)

    def predict_step(self, batch: int, batch_idx: int) -> list[Any]:
        """Make a shard; nothing for one that exists already."""
        if batch >= 0:
            self.writer.write(batch, (self._samples(self.sources[batch].seeds), LeftOut()))
        return []

    def _samples(self, seeds: Sequence[int]) -> Iterator[LatentSamples]:
        for start in range(0, len(seeds), self.batch_size):
            part = list(seeds[start : start + self.batch_size])
            condition = condition_to(class_labels(self.denoiser, part), self.device)
            noise = start_noise(part, self.denoiser.sample_shape).to(self.device)
            latents = sample(self.denoiser, self.table, noise, condition, seeds=part)
            check_finite(latents, part)
            told = {name: value for name, value in condition.items() if name != "null"}
            kept = (stored(value, self.dtype_) for value in (latents, told))
            yield LatentSamples([f"{seed:010d}" for seed in part], *kept)

    def _description(self, null: dict[str, Tensor]) -> dict[str, Any]:
        """What all shards have in common, JSON types."""
        shape, source = list(self.denoiser.sample_shape), getattr(self.denoiser, "source", None)
        options = {} if source is None else source.options
        tensors = {name: list(value.shape[1:]) for name, value in flatten_condition("condition", null).items()}
        return {
            "model": self.denoiser.name,
            "encoders": {} if source is None else encoder_hashes(source.root, source.variant),
            "sample_shape": shape,
            "options": options.get("encode") or {},
            "prompts": short([options.get("prompts"), options.get("negative_prompt")]),
            "solver": self.solver,
            "teacher": describe_teacher(self.denoiser, self.table, self.dtype_),
            "seeds": seed_ranges(list(self.seeds)),
            "tensors": {"latents": shape, **tensors},
        }
