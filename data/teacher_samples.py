"""`train.py predict`: webdataset shards of images (or latents) sampled from the teacher, for want of data."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.image_shards import MANIFEST_NAME
from data.manifest import describe_teacher, read_record
from data.shard_writer import FolderWriter, SeedShards
from data.shards import add_member, seed_ranges
from data.teacher import TeacherTrajectories
from data.trajectories import FIRST_SEED
from denoisers import class_labels, condition_to
from denoisers.generate import check_finite
from solvers import sample, start_noise
from solvers.files import atomic_write


class TeacherSamples(TeacherTrajectories):
    """Samples the teacher from each seed; a callback stores them as shards, NAME.png (latents: NAME.npy) and NAME.cls.

    Images are rounded to 8 bits, values outside [-1, 1] cut off. The name is the seed. Models whose condition is no
    class label get a .cls of 0.

    Args:
        denoiser: a network, or a path for `load_denoiser`.
        folder: where the shards go; an interrupted run goes on there.
        teacher: solver as name:steps or an artifact's path; default: ddim:100, or euler:100 for a flow schedule.
        num_samples: how many.
        first_seed: they have seeds first_seed, first_seed + 1, ...
        shard_size: samples in a shard and in the network's batch.
        guidance_scale: classifier-free guidance, for a denoiser given by its path; 1 is none.
        trust_remote_code: a `denoiser.yaml` may name a class of your own, see `load_denoiser`.
    Raises:
        ValueError: a denoiser or solver that cannot be loaded, or a folder with other samples.
    """

    def __init__(
        self,
        denoiser: str | nn.Module,
        folder: str,
        teacher: str | None = None,
        num_samples: int = 512,
        first_seed: int = FIRST_SEED,
        shard_size: int = 64,
        guidance_scale: float = 1.0,
        trust_remote_code: bool = False,
    ) -> None:
        options: dict[str, Any] = {"guidance_scale": guidance_scale, "trust_remote_code": trust_remote_code}
        super().__init__(denoiser, folder, teacher, num_samples, first_seed, shard_size, **options)
        self.writer: SampleWriter  # type: ignore[assignment]

    def setup(self, stage: str) -> None:
        """Take the folder, or refuse it, before any work."""
        with self.trainer.precision_plugin.predict_step_context():
            teacher = describe_teacher(self.denoiser, self.table, self.dtype_)
        self.writer = SampleWriter(self.folder, teacher, self.seeds, self.shard_size, self.solver)

    def predict_step(self, batch: int, batch_idx: int) -> list[tuple[Tensor, list[int]]]:  # type: ignore[override]
        """Samples and labels of a shard; nothing for one that exists already."""
        if batch < 0:
            return []
        seeds = self.writer.shard_seeds(batch)
        condition = condition_to(class_labels(self.denoiser, seeds), self.device)
        noise = start_noise(seeds, self.denoiser.sample_shape).to(self.device)
        samples = sample(self.denoiser, self.table, noise, condition, seeds=seeds)
        is_class = bool(getattr(self.denoiser, "num_classes", None))
        return [(samples, condition.tolist() if is_class else [0] * len(seeds))]


class SampleWriter(SeedShards, FolderWriter):
    """Writes shards of samples, each whole or not at all, and `samples.json`, which says where they come from.

    Args:
        folder: created if missing.
        teacher: see `describe_teacher`.
        seeds: of all samples.
        shard_size: samples per shard.
        solver: what the teacher's solver is called.
    Raises:
        ValueError: no seeds, or a folder that holds other samples.
    """

    def __init__(
        self, folder: str | Path, teacher: dict[str, Any], seeds: Sequence[int], shard_size: int, solver: str
    ) -> None:
        if not seeds or shard_size < 1:
            raise ValueError(f"{len(seeds)} samples in shards of {shard_size}: both must be at least 1")
        super().__init__(folder)
        self.seeds, self.shard_size = list(seeds), shard_size
        ranges = seed_ranges(self.seeds)
        record = {"solver": solver, "teacher": teacher, "seeds": ranges, "shard_size": shard_size}
        path = self.folder / MANIFEST_NAME
        again = "delete the folder and sample again"
        if path.exists() and read_record(path, again) != json.loads(json.dumps(record)):
            raise ValueError(f"{self.folder} holds other samples, see {path}: use another folder, or delete this one")
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(record) + "\n")

    def prepare(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """This process's shards that are still to be made; ValueError where another run is at work in the folder."""
        if rank == 0:
            self.claim()
        return [shard for shard in range(rank, self.num_shards, world_size) if not self.path(shard).exists()]

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"samples-{shard:05d}.tar"

    def write(self, shard: int, made: tuple[Tensor, list[int]]) -> None:
        """Write a shard.

        Raises:
            ValueError: a sample that is not finite.
        """
        samples, labels = made
        check_finite(samples, self.shard_seeds(shard))
        kind, encode = ("png", _png) if samples.shape[1] in (1, 3) else ("npy", _npy)
        with atomic_write(self.path(shard)) as temporary, tarfile.open(temporary, "w") as archive:
            for seed, value, label in zip(self.shard_seeds(shard), samples.float().cpu(), labels):
                add_member(archive, f"{seed:010d}.{kind}", encode(value))
                add_member(archive, f"{seed:010d}.cls", str(label).encode())

    def close(self) -> None:
        """Let others write to the folder: every shard was written at once."""
        self._claim.close()

    abandon = close


def _png(image: Tensor) -> bytes:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(content, "png")
    return content.getvalue()


def _npy(latent: Tensor) -> bytes:
    content = io.BytesIO()
    np.save(content, latent.numpy(), allow_pickle=False)
    return content.getvalue()
