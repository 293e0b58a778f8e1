"""A comparison in its folder: what is sampled already, what is missing, and the rows it makes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoisers.generate import as_images
from evaluation.args import CompareArgs
from evaluation.blocks import TRACED, Drawn, ReferenceImages, blocks_of, draw, read_count, read_tensors, write_tensors
from evaluation.contenders import Contender, Group
from evaluation.distances import squared_errors
from evaluation.judges import prompts_of
from evaluation.metrics import Measure
from evaluation.parts import Parts
from evaluation.rows import make_row, trajectory_error
from solvers.files import atomic_write
from solvers.progress import progress_bar

SETTINGS_NAME = "comparison.json"
WRITTEN = ("rows", "report.json", "report.md", "report.html", "comparison.png")
SHOWN = 16
TOTALS = {"seconds", "rounds", "evaluations"}  # of all images of a block


@dataclass(frozen=True, eq=False)
class Entry:
    """A finished row with what pictures need: first images (k, *shape), trajectory error (N+1,) or None."""

    contender: Contender
    row: dict[str, Any]
    images: Tensor
    trajectory: Tensor | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """One comparison in its output folder: `comparison.json`, and `rows/<contender>/` with a file per block."""

    args: CompareArgs
    groups: Sequence[Group]
    measure: Measure

    @property
    def output(self) -> Path:
        """Its folder."""
        return Path(self.args.output)

    @property
    def blocks(self) -> list[range]:
        """Offsets of all its images."""
        return blocks_of(self.args.num_samples)

    @property
    def solvers(self) -> dict[str, str]:
        """Names by key."""
        return {_key(contender): contender.name for group in self.groups for contender in group.contenders}

    def settings(self) -> dict[str, Any]:
        """What makes it this comparison."""
        measure = self.measure
        return {
            "references": {str(group.reference.guidance_scale): group.reference.key for group in self.groups},
            "seed": self.args.seed,
            "precision": self.args.precision,
            "metrics": measure.asked and list(measure.asked),
            **measure.described,
        }

    def claim(self) -> None:
        """Take the output folder, or go on in it.

        Raises:
            ValueError: it holds something else, or a report with more solvers or images.
        """
        path = self.output / SETTINGS_NAME
        if path.is_file():
            _check_same(path, self.settings(), self.solvers, self.args.num_samples)
            return
        _check_free(self.output)
        self._write_settings({}, 0)

    def finish(self) -> None:
        """Note what the report holds, which later runs may extend but not shorten."""
        self._write_settings(self.solvers, self.args.num_samples)

    def _write_settings(self, solvers: Mapping[str, str], num_samples: int) -> None:
        reported = {"num_samples": num_samples, "solvers": solvers}
        with atomic_write(self.output / SETTINGS_NAME) as temporary:
            temporary.write_text(json.dumps(self.settings() | reported, indent=2) + "\n")

    def sample(self, rank: int = 0, world_size: int = 1) -> None:
        """Compute this process's missing blocks, the reference of a block before the solvers that need it."""
        total = self._rows(rank, world_size)
        with progress_bar(desc="comparing", unit="row", total=total, show=rank == 0) as bar:
            for group in self.groups:
                reference = self._reference(group)
                for block in self.blocks[rank::world_size]:
                    self._sample_block(group, reference, block, bar.update)

    def _sample_block(self, group: Group, reference: ReferenceImages, block: range, step: Any) -> None:
        missing = self._missing(group, block)
        if not missing:
            return
        target = reference.get(block, self.args.batch_size, step)
        seeds = self.args.seeds[block.start : block.stop]
        for contender in missing:
            drawn = target if contender is group.reference else self._draw(contender, seeds, step)
            write_tensors(self._path(contender, block), self._measured(contender, drawn, group, target.images, seeds))

    def _reference(self, group: Group) -> ReferenceImages:
        return ReferenceImages(group.reference, self.args.cache, self.args.seed, self.args.precision)

    def _missing(self, group: Group, block: range) -> list[Contender]:
        """Contenders without all images of a block."""
        everyone = (group.reference, *group.contenders)
        return [c for c in everyone if read_count(self._path(c, block), "squared_errors") < len(block)]

    def _draw(self, contender: Contender, seeds: range, step: Any) -> Drawn:
        return draw(contender, seeds, self.args.batch_size, TRACED if seeds[0] == self.args.seed else 0, step)

    def _measured(
        self, contender: Contender, drawn: Drawn, group: Group, target: Tensor, seeds: range
    ) -> dict[str, Tensor]:
        """What is kept of a block: errors and features of all images, pictures and states of the first ones."""
        values = {
            "squared_errors": squared_errors(drawn.images, target),
            "seconds": torch.tensor(drawn.seconds, dtype=torch.float64),
        }
        for name in ("rounds", "evaluations"):
            if getattr(drawn, name) is not None:
                values[name] = torch.tensor(getattr(drawn, name), dtype=torch.float64)
        size, prompts = self.args.batch_size, prompts_of(group.reference.denoiser, seeds)
        parts = [
            self.measure.values(
                as_images(contender.denoiser, drawn.images[start : start + size]),
                as_images(group.reference.denoiser, target[start : start + size]) if self.measure.judges else None,
                prompts and prompts[start : start + size],
            )
            for start in range(0, len(seeds), size)
        ]
        values |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if drawn.trace is not None:
            values |= {"images": drawn.images[:SHOWN], "trace": drawn.trace}
        return values

    def _rows(self, rank: int, world_size: int) -> int:
        """Rows of tables still to compute in this process, for all images."""
        total = 0
        for group in self.groups:
            reference = self._reference(group)
            for block in self.blocks[rank::world_size]:
                missing = self._missing(group, block)
                total += sum(c.table.num_rows * len(block) for c in missing if c is not group.reference)
                total += reference.missing(block) * group.reference.table.num_rows if missing else 0
        return total

    def entries(self) -> list[Entry]:
        """All rows, measured: per group the reference, then its contenders."""
        entries = []
        total = sum(1 + len(group.contenders) for group in self.groups)
        with progress_bar(desc="measuring", unit="solver", total=total) as bar:
            for group in self.groups:
                target = self._first(group.reference)["trace"]
                for contender in (group.reference, *group.contenders):
                    entries.append(self._entry(contender, group, target))
                    bar.update()
        return entries

    def _entry(self, contender: Contender, group: Group, target: Tensor) -> Entry:
        is_reference, first = contender is group.reference, self._first(contender)
        values = {name: self._parts(contender, name) for name in first.keys() - TOTALS - {"images", "trace"}}
        totals = {name: self._total(contender, name) for name in first.keys() & TOTALS}
        row = make_row(contender, values, totals, self.measure, self.args.bootstrap, is_reference)
        errors = trajectory_error(contender.table, first["trace"], group.reference.table, target)
        images = as_images(contender.denoiser, first["images"])
        return Entry(contender, row, images, None if is_reference else errors)

    def _first(self, contender: Contender) -> dict[str, Tensor]:
        """The first block."""
        return next(self._read(contender))

    def _parts(self, contender: Contender, name: str) -> Parts:
        """What is kept of all images, read as often as it is needed."""
        return Parts(lambda: (part[name] for part in self._read(contender, [name])), self.args.num_samples)

    def _total(self, contender: Contender, name: str) -> float:
        return sum(float(part[name]) for part in self._read(contender, [name]))

    def _read(self, contender: Contender, names: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        """Block by block."""
        for block in self.blocks:
            path = self._path(contender, block)
            yield _cut(read_tensors(path, names), block, read_count(path, "squared_errors"))

    def _path(self, contender: Contender, block: range) -> Path:
        return self.output / "rows" / _key(contender) / f"{block.start:07d}.safetensors"


def _cut(values: dict[str, Tensor], block: range, count: int) -> dict[str, Tensor]:
    """A stored block that a larger comparison has made longer, as it is needed; its totals in proportion."""
    return {
        name: value * (len(block) / count) if name in TOTALS else value if name == "trace" else value[: len(block)]
        for name, value in values.items()
    }


def _key(contender: Contender) -> str:
    return f"{contender.key}-g{contender.guidance_scale:g}"


def _check_free(output: Path) -> None:
    taken = [name for name in WRITTEN if (output / name).exists()]
    if taken:
        raise ValueError(f"{output} holds {', '.join(taken)} of something else: choose another --output")


def _check_same(path: Path, settings: dict[str, Any], solvers: dict[str, str], num_samples: int) -> None:
    """A solver whose artifact has changed since takes the place of the old one."""
    try:
        found = json.loads(path.read_text())
        settings = settings | {"num_samples": num_samples}
        differ = [name for name, value in settings.items() if found[name] != value and name != "num_samples"]
        differ += ["num_samples"] * (num_samples < found["num_samples"])
        lost = [name for key, name in found["solvers"].items() if key not in solvers and name not in solvers.values()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --output") from error
    if differ:
        listed = "; ".join(f"{name} was {found[name]}, now {settings[name]}" for name in differ)
        raise ValueError(
            f"{path.parent} holds another comparison ({listed}): choose another --output, nothing was changed"
        )
    if lost:
        raise ValueError(
            f"{path.parent} holds a comparison that includes {', '.join(lost)}: name these solvers too, or choose "
            "another --output; nothing was changed"
        )
