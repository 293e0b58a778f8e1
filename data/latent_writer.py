"""Writes shards of latents, one of each source, and says what was left out; too much of it is refused in the end."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save

from data.image_sources import LeftOut, SeedSource, Source
from data.latent_shards import AGAIN, FIELDS, NULL_NAME, SKIPPED_NAME, LatentSamples, latent_file
from data.manifest import FORMAT_VERSION, MANIFEST_NAME, parse_manifest, short
from data.shard_writer import ShardWriter
from data.shards import flatten_condition
from solvers.files import atomic_write, sha256

SHOWN = 3  # notes on the screen


class LatentWriter(ShardWriter):
    """Writes a shard for each source shard, and the manifest.

    Args:
        folder: created if missing.
        description: what all shards have in common, JSON types; shards of another one are refused.
        sources: what is encoded, or sampled; their names must differ.
        null: the condition of the empty prompt, (1, ...).
        max_skipped: share of the samples, and of the shards that are cut off, that may be left out.
    Raises:
        ValueError: no sources, sources of one name, or a folder that holds something else.
    """

    again = AGAIN

    def __init__(
        self,
        folder: str | Path,
        description: dict[str, Any],
        sources: Sequence[Source | SeedSource],
        null: dict[str, Any],
        max_skipped: float = 0.0,
    ) -> None:
        super().__init__(folder)
        self.sources, self.null, self.max_skipped = list(sources), null, max_skipped
        self.num_missing = 0  # shards that this process makes
        self._names = [f"{source.name}.tar" for source in self.sources]
        if not sources or len(set(self._names)) < len(self._names):
            raise ValueError(f"{len(sources)} shards to encode with {len(set(self._names))} names: each needs its own")
        listed = {source.name: source.identity for source in self.sources}
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
        """Encoders, shapes and shards, which are complete where not too much was left out."""
        short_records = {name: {key: one[key] for key in one if key != "notes"} for name, one in shards.items()}
        null = sha256(self.folder / NULL_NAME) if shards else None
        complete = bool(shards) and self._excess(shards) is None
        described = {"encoded": self.description, "complete": complete, "null_sha256": null, "shards": short_records}
        return {"format_version": FORMAT_VERSION, **described}

    def announce(self, rank: int, todo: Sequence[int]) -> None:
        """Store the embeddings of the empty prompt."""
        self.num_missing = len(todo)
        if not (self.folder / NULL_NAME).exists():
            with atomic_write(self.folder / NULL_NAME) as path:
                path.write_bytes(save(flatten_condition("condition", self.null)))

    def write(self, shard: int, value: tuple[Iterable[LatentSamples], LeftOut]) -> None:
        """Write a shard and its record, each part while the network works on the next one, in this thread."""
        self.store(shard, value)

    def store(self, shard: int, value: tuple[Iterable[LatentSamples], LeftOut]) -> None:
        """Write a shard and its record."""
        parts, left_out = value
        with latent_file(self.path(shard), left_out) as append, ThreadPoolExecutor(1) as pool:
            pending = pool.submit(int)
            for samples in parts:
                pending.result()
                pending = pool.submit(append, samples)
            pending.result()

    def check_complete(self) -> None:
        """Also refuses where too much was left out."""
        super().check_complete()
        if excess := self._excess(self._records()):
            raise ValueError(
                f"{excess}, more than max_skipped {self.max_skipped:g} allows, see {self.folder / SKIPPED_NAME}: "
                "delete the shards it names and run again, which makes only them, or allow more, which makes none again"
            )

    def summary(self) -> str:
        """How many samples there are and were left out; of these the first."""
        records = self._records()
        notes = _notes(records)
        line = f"{sum(one['samples'] for one in records.values()):,} pictures in {self.folder}, {len(notes):,} left out"
        more = f"; ... {self.folder / SKIPPED_NAME} names all" if len(notes) > SHOWN else ""
        return line + (f": {'; '.join(notes[:SHOWN])}{more}" if notes else "")

    def _save(self, manifest: dict[str, Any]) -> None:
        """The notes first."""
        if manifest["shards"]:
            with atomic_write(self.folder / SKIPPED_NAME) as path:
                path.write_text("".join(f"{note}\n" for note in _notes(self._records())), encoding="utf-8")
        super()._save(manifest)

    def _records(self) -> dict[str, Any]:
        return {path.name: self._record(path) for path in map(self.path, range(self.num_shards))}

    def _excess(self, records: dict[str, Any]) -> str | None:
        """What is too much of what was left out."""
        skipped, cut = (sum(one[key] for one in records.values()) for key in ("skipped", "is_cut"))
        samples = skipped + sum(one["samples"] for one in records.values())
        if cut > self.max_skipped * len(records):
            return f"{cut:,} of {len(records):,} shards are cut off"
        return f"{skipped:,} of {samples:,} samples were left out" if skipped > self.max_skipped * samples else None


def _notes(records: dict[str, Any]) -> list[str]:
    return [f"{name}: {note}" for name, record in records.items() for note in record["notes"]]


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
