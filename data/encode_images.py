"""`train.py predict`: pictures with captions as shards of latents and text embeddings, on any number of processes."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor
from tqdm import tqdm

from data.image_sources import LeftOut, Source, find_sources
from data.image_text import read_image_text
from data.latent_shards import LatentSamples, stored
from data.latent_writer import LatentWriter
from data.manifest import precision
from data.shards import flatten_condition
from data.teacher import StoreTrajectories
from denoisers.encoders import Encoders, load_encoders
from denoisers.prompts import call_defaults

DTYPES = ("float16", "bfloat16", "float32")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class EncodeImages(lightning.LightningModule):
    """Encodes a source of pictures and captions at a time into a shard. `LatentData` reads them for training.

    Latents are the mean of the autoencoder's distribution, scaled as the network takes them. Pictures are read as
    `data.pictures.read_picture` says, scaled until they cover the size, and cut at the centre. What cannot be used is
    left out, counted, and named in skipped.txt.

    Args:
        model: path of a model with prompts as `load_denoiser` takes it; `height`, `width`, `variant`, `encode` and
            `negative_prompt` of its denoiser.yaml hold.
        images: folder of webdataset shards with NAME.jpg (or any picture) and NAME.txt (or `caption` in NAME.json);
            or, where it has no shards, of such files.
        folder: where the encoded shards go, each named as its source; an interrupted run goes on there.
        shards: pattern of the shards in `images`.
        captions: a table of the captions of files (csv, tsv, json or jsonl), see `data.captions`.
        shard_size: pictures in a shard, of files.
        batch_size: pictures encoded at once.
        dtype: of the stored latents and embeddings: float16, bfloat16 or float32.
        text_dtype: of the weights of the text encoders, which are large: float16, bfloat16 or float32.
        max_skipped: share of the pictures, and of the shards that are cut off, that may be left out; where it is more,
            the run ends with an error, and the shards are not used for training until more is allowed.
        workers: threads of each process that decode pictures.
    Raises:
        ValueError: a model that cannot be loaded, an unknown dtype or precision, no pictures, a table that cannot be
            read, a folder with other shards, or in the end too much that was left out.
    """

    def __init__(
        self,
        model: str,
        images: str,
        folder: str,
        shards: str = "*.tar*",
        captions: str | None = None,
        shard_size: int = 1000,
        batch_size: int = 16,
        dtype: str = "float16",
        text_dtype: str = "float32",
        max_skipped: float = 0.01,
        workers: int = 4,
    ) -> None:
        super().__init__()
        self.dtype_, self.text_dtype = _dtype(dtype), _dtype(text_dtype)
        if min(batch_size, workers, shard_size) < 1:
            raise ValueError(
                f"batch_size {batch_size}, workers {workers} and shard_size {shard_size} must be at least 1"
            )
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"max_skipped is {max_skipped}: give a share between 0 and 1")
        self.sources = find_sources(images, shards, captions, shard_size)
        self.encoders: Encoders = load_encoders(model, self.text_dtype)
        self.folder, self.batch_size, self.max_skipped, self.workers = folder, batch_size, max_skipped, workers
        self.writer: LatentWriter
        self.progress: Progress

    def setup(self, stage: str) -> None:
        """Check precision and folder, or refuse them, before any work."""
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}: encode with one of {', '.join(PRECISIONS)}; "
                "model.text_dtype makes text encoders small"
            )
        with self.trainer.precision_plugin.predict_step_context():
            null = stored(self.encoders.null_condition(), self.dtype_)
            description = describe_encoding(self.encoders, null, self.dtype_, self.text_dtype)
        self.writer = LatentWriter(self.folder, description, self.sources, null, self.max_skipped)

    def on_predict_start(self) -> None:
        """The first process shows its share of the work."""
        self.progress = Progress(self.writer.num_missing, self.global_rank == 0)

    def predict_step(self, batch: int, batch_idx: int) -> list[None]:
        """Make a shard; nothing for one that exists already."""
        if batch >= 0:
            source, left_out = self.sources[batch], LeftOut()
            self.writer.write(batch, (self.encode(source, left_out), left_out))
            self.progress.end(source.name, len(left_out.notes))
        return []

    def on_predict_end(self) -> None:
        """Say what there is."""
        self.progress.close()
        if self.global_rank == 0:
            print(self.writer.summary(), file=sys.stderr)

    def encode(self, source: Source, left_out: LeftOut) -> Iterator[LatentSamples]:
        """A source in batches, encoded on this module's device; they are on the CPU. Without samples an empty one."""
        for batch in read_image_text(source, self.encoders.pixels, self.batch_size, left_out, self.workers):
            latents = self.encoders.encode_images(scaled(batch.images.to(self.device)))
            encoded = (latents, self.encoders.encode_prompts(batch.captions))
            samples = LatentSamples(batch.keys, *(stored(value, self.dtype_) for value in encoded))
            _check_finite(samples, source.name)
            yield samples
            self.progress.update(batch.share, len(batch.keys))

    def configure_callbacks(self) -> list[lightning.Callback]:
        """The writer is part of the job."""
        return [StoreTrajectories()]


class Progress:
    """How much of this process's shards is made, and the time left: a bar, or a line a shard where nobody watches.

    Args:
        shards: to make.
        is_shown: or nothing at all.
    """

    def __init__(self, shards: int, is_shown: bool = True) -> None:
        layout = "{desc}: {percentage:3.1f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        disable = None if is_shown else True
        self.bar = tqdm(total=shards, desc="encoding", bar_format=layout, disable=disable, position=1, leave=False)
        self.shards, self.is_shown, self.begin = shards, is_shown, time.monotonic()
        self.made, self.pictures, self.left_out = 0, 0, 0

    def update(self, share: float, pictures: int) -> None:
        """So much of the shard is done; `pictures` came since the last time."""
        self.pictures += pictures
        self.bar.set_postfix_str(f"{self.pictures:,} pictures, {self._rate:.1f} a second", refresh=False)
        self.bar.update(self.made + share - self.bar.n)

    def end(self, name: str, left_out: int) -> None:
        """A shard is made."""
        self.made, self.left_out = self.made + 1, self.left_out + left_out
        self.bar.update(self.made - self.bar.n)
        if self.is_shown and self.bar.disable:
            left = (time.monotonic() - self.begin) * (self.shards / self.made - 1)
            print(
                f"{name}: {self.made} of {self.shards} shards, {self.pictures:,} pictures, {self._rate:.1f} a second, "
                f"{self.left_out:,} left out, {tqdm.format_interval(left)} left",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()

    @property
    def _rate(self) -> float:
        return self.pictures / (time.monotonic() - self.begin)


def scaled(images: Tensor) -> Tensor:
    """uint8 pictures in [-1, 1]."""
    return images.float() / 127.5 - 1


def _check_finite(samples: LatentSamples, name: str) -> None:
    broken = [part for part, value in samples.tensors().items() if not bool(value.isfinite().all())]
    if broken:
        dtype = str(samples.latents.dtype).removeprefix("torch.")
        raise ValueError(
            f"{', '.join(broken)} of {', '.join(samples.keys[:3])}, ... of {name} are not finite in {dtype}: store "
            "them in another dtype, or run the encoders in bfloat16 or float32 (trainer.precision, text_dtype)"
        )


def describe_encoding(
    encoders: Encoders, null: dict[str, Any], dtype: torch.dtype, text_dtype: torch.dtype
) -> dict[str, Any]:
    """What all shards of a folder have in common, JSON types."""
    tensors = {name: list(value.shape[1:]) for name, value in flatten_condition("condition", null).items()}
    return {
        "model": encoders.name,
        "encoders": encoders.hashes,
        "sample_shape": list(encoders.sample_shape),
        "image_size": list(encoders.pixels),
        "negative_prompt": encoders.negative_prompt,
        "options": encoders.options,
        "defaults": call_defaults(encoders.pipe),
        "dtype": str(dtype).removeprefix("torch."),
        "text_dtype": str(text_dtype).removeprefix("torch."),
        "precision": precision(torch.float32),
        "tensors": {"latents": list(encoders.sample_shape), **tensors},
    }


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    return getattr(torch, name)
