"""`train.py predict`: an image-text webdataset as shards of latents and text embeddings, on any number of processes."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from data.image_text import Damage, read_image_text
from data.latent_shards import AGAIN, FIELDS, NULL_NAME, LatentSamples, write_latents
from data.manifest import FORMAT_VERSION, MANIFEST_NAME, parse_manifest, precision, short
from data.shard_writer import ShardWriter
from data.shards import flatten_condition
from data.teacher import StoreTrajectories
from denoisers.encoders import Encoders, load_encoders
from solvers.conditions import concatenate_conditions, map_condition
from solvers.files import atomic_write, sha256

DTYPES = ("float16", "bfloat16", "float32")


class EncodeImages(lightning.LightningModule):
    """Encodes a shard of pictures and captions at a time; a callback stores it. `LatentData` reads them for training.

    Latents are the mean of the autoencoder's distribution, scaled as the network takes them. Pictures are scaled until
    they cover the size, and cut at the centre.

    Args:
        model: path of a Stable Diffusion model as `load_denoiser` takes it; `height`, `width` and `variant` of its
            denoiser.yaml hold.
        images: folder of webdataset shards with NAME.jpg (or .png) and NAME.txt.
        folder: where the encoded shards go, each named as its source; an interrupted run goes on there.
        shards: pattern of the shards in `images`.
        batch_size: pictures encoded at once.
        dtype: of the stored latents and embeddings: float16, bfloat16 or float32.
        skip_corrupt: leave out corrupt samples and shards; the manifest names them.
        workers: threads of each process that decode pictures.
    Raises:
        ValueError: a model that cannot be loaded, an unknown dtype, no shards, or a folder with other shards; while
            encoding: a corrupt sample or shard, unless it is skipped.
    """

    def __init__(
        self,
        model: str,
        images: str,
        folder: str,
        shards: str = "*.tar*",
        batch_size: int = 16,
        dtype: str = "float16",
        skip_corrupt: bool = False,
        workers: int = 4,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
        if batch_size < 1 or workers < 1:
            raise ValueError(f"batch_size {batch_size} and workers {workers} must be at least 1")
        self.sources = sorted(Path(images).glob(shards))
        if not self.sources:
            raise ValueError(f"no image-text shards {shards} in {images}: give the folder that holds them")
        self.encoders: Encoders = load_encoders(model)
        self.folder, self.dtype_ = folder, getattr(torch, dtype)
        self.batch_size, self.skip_corrupt, self.workers = batch_size, skip_corrupt, workers
        self.writer: LatentWriter

    def setup(self, stage: str) -> None:
        """Check the folder, or refuse it, before any work."""
        with self.trainer.precision_plugin.predict_step_context():
            null = self._stored(self.encoders.null_condition())
            description = describe_encoding(self.encoders, null, self.dtype_)
        self.writer = LatentWriter(self.folder, description, self.sources, null)

    def predict_step(self, batch: int, batch_idx: int) -> list[LatentSamples]:
        """The samples of a shard; nothing for one that exists already."""
        return [] if batch < 0 else [self.encode(self.sources[batch])]

    def encode(self, source: Path) -> LatentSamples:
        """A whole shard in batches, on this module's device; the result is on the CPU."""
        damage, keys = Damage(self.skip_corrupt), []
        latents = [torch.empty(0, *self.encoders.sample_shape, dtype=self.dtype_)]
        conditions = [map_condition(lambda value: value[:0], self.writer.null)]
        batches = read_image_text(source, self.encoders.size.pixels, self.batch_size, damage, self.workers)
        for batch in self._shown(batches, source):
            encoded = self._stored(self.encoders.encode_images(scaled(batch.images.to(self.device))))
            if not bool(encoded.isfinite().all()):
                raise ValueError(
                    f"latents of {', '.join(batch.keys[:3])}, ... of {source} are not finite in {self.dtype_}: store "
                    "them in another dtype, or run the autoencoder in float32 (trainer.precision)"
                )
            keys += batch.keys
            latents.append(encoded)
            conditions.append(self._stored(self.encoders.encode_prompts(batch.captions)))
        for note in damage.notes:
            print(f"left out: {note}", file=sys.stderr)
        with torch.autocast("cpu", enabled=False):  # which cannot join tensors of another half precision than its own
            return LatentSamples(keys, torch.cat(latents), concatenate_conditions(conditions), damage.notes)

    def configure_callbacks(self) -> list[lightning.Callback]:
        """The writer is part of the job."""
        return [StoreTrajectories()]

    def _shown(self, batches: Any, source: Path) -> Any:
        """The batches of a shard with a count of its pictures, below the trainer's bar of shards."""
        hidden = self.global_rank != 0 or self.trainer.progress_bar_callback is None
        with tqdm(desc=source.name, unit=" pictures", position=1, leave=False, disable=hidden or None) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch.keys))

    def _stored(self, value: Any) -> Any:
        def convert(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", self.dtype_) if tensor.is_floating_point() else tensor.cpu()

        return map_condition(convert, value)


def scaled(images: Tensor) -> Tensor:
    """uint8 pictures in [-1, 1]."""
    return images.float() / 127.5 - 1


def describe_encoding(encoders: Encoders, null: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What all shards of a folder have in common, JSON types."""
    tensors = {name: list(value.shape[1:]) for name, value in flatten_condition("condition", null).items()}
    return {
        "model": encoders.name,
        "encoders": encoders.hashes,
        "sample_shape": list(encoders.sample_shape),
        "image_size": list(encoders.size.pixels),
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision(torch.float32),
        "tensors": {"latents": list(encoders.sample_shape), **tensors},
    }


class LatentWriter(ShardWriter):
    """Writes a shard for each source shard, and the manifest.

    Args:
        folder: created if missing.
        description: what all shards have in common, JSON types; shards of another one are refused.
        sources: the shards to encode; their names must differ.
        null: the condition of the empty prompt, (1, ...).
    Raises:
        ValueError: no sources, sources of one name, or a folder that holds something else.
    """

    again = AGAIN

    def __init__(
        self, folder: str | Path, description: dict[str, Any], sources: Sequence[Path], null: dict[str, Any]
    ) -> None:
        super().__init__(folder)
        self.sources, self.null = list(sources), null
        self._names = [f"{source.name.partition('.')[0]}.tar" for source in self.sources]
        if not sources or len(set(self._names)) < len(self._names):
            raise ValueError(f"{len(sources)} shards to encode with {len(set(self._names))} names: each needs its own")
        listed = {source.name: source.stat().st_size for source in self.sources}
        self.description = {**description, "sources": listed}
        _check_same(self.folder, self.description)

    @property
    def num_shards(self) -> int:
        """Number of shards of all processes together."""
        return len(self.sources)

    def path(self, shard: int) -> Path:
        """File of a shard, named as its source."""
        return self.folder / self._names[shard]

    def manifest(self, shards: dict[str, Any]) -> dict[str, Any]:
        """Encoders, shapes and shards."""
        complete = {"complete": bool(shards), "null_sha256": None, "shards": shards}
        if shards:
            complete["null_sha256"] = sha256(self.folder / NULL_NAME)
        return {"format_version": FORMAT_VERSION, "encoded": self.description, **complete}

    def announce(self, rank: int, todo: Sequence[int]) -> None:
        """Store the embeddings of the empty prompt."""
        if not (self.folder / NULL_NAME).exists():
            with atomic_write(self.folder / NULL_NAME) as path:
                path.write_bytes(save(flatten_condition("condition", self.null)))

    def store(self, shard: int, value: LatentSamples) -> None:
        """Write a shard and its record.

        Raises:
            ValueError: the disk is too small for it.
        """
        size, free = sum(tensor.nbytes for tensor in value.tensors().values()), self.free_bytes()
        if size > free:
            raise ValueError(f"{self.path(shard)} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room")
        write_latents(self.path(shard), value)


def _check_same(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse a folder that holds something else."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return
    found = parse_manifest(path, FIELDS, f"delete the folder and {AGAIN}")["encoded"]
    for name, value in json.loads(json.dumps(wanted)).items():
        if name != "model" and found.get(name) != value:
            raise ValueError(
                f"{folder} holds shards with another {name}: found {short(found.get(name))}, asked for "
                f"{short(value)}; use another folder, or delete this one"
            )
