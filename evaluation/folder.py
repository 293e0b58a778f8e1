"""The work behind `sample.py evaluate`: figures of pictures that are there already, a block in memory at a time."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from evaluation.args import EvaluateArgs
from evaluation.blocks import read_tensors, write_tensors
from evaluation.columns import cell, interval, title
from evaluation.compare import current_device, load_spaces
from evaluation.distances import error_figures, psnr, squared_errors
from evaluation.extractors import extractor_of
from evaluation.judges import load_judges
from evaluation.metrics import Measure, choose_metrics
from evaluation.parts import Parts
from evaluation.processes import barrier, first_alone, processes
from evaluation.sources import BLOCK, Pictures, find_pictures
from solvers.files import atomic_write, claimed
from solvers.progress import progress_bar
from solvers.text import read_text, split_lines

REPORT = "evaluation.json"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Pictures, what they are compared with, and what is known of them already, in files of the output folder.

    Args:
        args: what is asked for.
        pictures: what is measured.
        reference: pictures to compare them with one by one.
        prompts: one for each picture.
        measure: what is measured of them.
    """

    args: EvaluateArgs
    pictures: Pictures
    reference: Pictures | None
    prompts: Sequence[str] | None
    measure: Measure

    @property
    def blocks(self) -> list[range]:
        """Ranges of the pictures."""
        count = self.pictures.count
        return [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]

    @cached_property
    def folder(self) -> Path:
        """Where values are kept until all are there, by the hash of all they depend on but later pictures."""
        digest = hashlib.sha256(json.dumps([self.measure.described, self.prompts, self.args.reference]).encode())
        for pictures in filter(None, (self.pictures, self.reference)):
            digest.update(f"{pictures.count} {pictures.description}".encode())
            digest.update(pictures.read(self.blocks[0]).contiguous().numpy())
        return Path(self.args.output) / f".values-{digest.hexdigest()[:16]}"

    def measure_all(self, rank: int, size: int) -> None:
        """The missing blocks of this process's share."""
        todo = [block for block in self.blocks[rank::size] if not self._path(block).is_file()]
        for block in progress_bar(todo, "measuring", "block", show=rank == 0):
            write_tensors(self._path(block), self._values(block))

    def _values(self, block: range) -> dict[str, Tensor]:
        images = self.pictures.read(block).float() / 127.5 - 1
        target = None if self.reference is None else self.reference.read(block).float() / 127.5 - 1
        values: dict[str, list[Tensor]] = {}
        for start in range(0, len(block), self.args.batch_size):
            batch = slice(start, start + self.args.batch_size)
            prompts = self.prompts and self.prompts[block.start : block.stop][batch]
            found = self.measure.values(images[batch], None if target is None else target[batch], prompts)
            if target is not None:
                found["squared_errors"] = squared_errors(images[batch], target[batch])
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        return {name: torch.cat(parts) for name, parts in values.items()}

    def figures(self) -> dict[str, float]:
        """All figures, from the files."""
        names = read_tensors(self._path(self.blocks[0])).keys()
        values = {name: self._parts(name) for name in names}
        found: dict[str, float] = {}
        if "squared_errors" in values:
            found = error_figures(values["squared_errors"].whole())
            found["psnr"] = psnr(found["rmse"])
        return found | self.measure.figures(values, self.args.bootstrap)

    def _parts(self, name: str) -> Parts:
        return Parts(
            lambda: (read_tensors(self._path(block), [name])[name] for block in self.blocks), self.pictures.count
        )

    def clear(self) -> None:
        """Remove the files."""
        for block in self.blocks:
            self._path(block).unlink()
        self.folder.rmdir()

    def _path(self, block: range) -> Path:
        return self.folder / f"{block.start:09d}.safetensors"


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Measure pictures and write evaluation.json; goes on where it was broken off.

    Several processes: `torchrun --nproc_per_node N sample.py evaluate ...`.

    Returns:
        What evaluation.json holds; nothing in the other processes.
    Raises:
        ValueError: no pictures, too few for a metric that was asked for, or what is compared does not match.
    """
    pictures, device = find_pictures(args.samples), current_device()
    reference = None if args.reference is None else find_pictures(args.reference)
    prompts = None if args.prompts is None else split_lines(read_text(args.prompts))
    for what, found in (("reference pictures", reference and reference.count), ("prompts", prompts and len(prompts))):
        if found is not None and found != pictures.count:
            raise ValueError(f"there are {pictures.count} pictures and {found} {what}: give one for each")
    default = extractor_of(SimpleNamespace(name=_made_by(args.samples)))
    spaces = load_spaces(args.extractor, args.statistics, args.metrics, default, device)
    judges = load_judges(args.metrics, args.lpips, args.clip, device)
    for name, needed in (("lpips", "reference"), ("clip_score", "prompts")):
        if name in judges and getattr(args, needed) is None:
            raise ValueError(f"{name} was asked for: give --{needed}")
    measure = choose_metrics(args.metrics, spaces, pictures.count, pictures.shape, judges)
    evaluation = Evaluation(args, pictures, reference, prompts, measure)
    with processes() as (rank, size), ExitStack() as alone:
        first_alone(lambda: alone.enter_context(claimed(args.output)))
        evaluation.measure_all(rank, size)
        barrier()
        return _report(evaluation) if rank == 0 else {}


def _report(evaluation: Evaluation) -> dict[str, Any]:
    args, pictures = evaluation.args, evaluation.pictures
    row = {"samples": args.samples, "num_images": pictures.count, **evaluation.figures()}
    found = row | evaluation.measure.described
    path = Path(args.output) / REPORT
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    evaluation.clear()
    print(*evaluation.measure.notes, *_lines(row), f"written: {path}", sep="\n")
    return found


def _lines(row: dict[str, Any]) -> list[str]:
    """A line for each figure."""
    figures = [name for name in row if not name.endswith(("_low", "_high"))][2:]
    around = {name: f" ({interval(row, name)})" if interval(row, name) else "" for name in figures}
    return [f"{title(name):24s} {cell(row, name)}{around[name]}" for name in figures]


def _made_by(samples: str) -> str:
    """Name of the model that made samples, where `sample.py generate` says it beside them."""
    path = Path(samples)
    manifest = (path if path.is_dir() else path.parent) / "manifest.json"
    try:
        return Path(json.loads(manifest.read_text())["denoiser"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return ""
