"""What an offline W&B run holds, read from its file: a log of protobuf records in blocks, as LevelDB writes them."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, HEADER = 32768, 7, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """The records of a run, sorted."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """Everything that was logged."""
        return {key for row in self.history for key in row}

    def series(self, key: str) -> list[Any]:
        """Values under a key, in order."""
        return [row[key] for row in self.history if key in row]


def read_run(folder: Path) -> OfflineRun:
    """The last offline run below a run folder."""
    path = max(folder.rglob("*.wandb"), key=lambda one: one.stat().st_mtime)
    found = OfflineRun()
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            _update(found.config, record.run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "history":
            found.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _update(config: dict[str, Any], items: Any) -> None:
    for item in items:
        config[_key(item)] = json.loads(item.value_json)


def _records(data: bytes) -> Iterator[bytes]:
    at, parts = FILE_HEADER, []
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        parts.append(data[at + HEADER.size : at + HEADER.size + length])
        at += HEADER.size + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
