"""The work behind `sample.py compare`: sample what is missing, then measure and report."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from evaluation.blocks import TRACED, Drawn, ReferenceImages, blocks_of, draw, read_count, read_tensors, write_tensors
from evaluation.contenders import Contender, Group, check_seeds, load_groups
from evaluation.distances import squared_errors
from evaluation.extractors import Extractor, load_extractor
from evaluation.pictures import as_images
from evaluation.rows import Measure, choose_metrics, make_row, trajectory_error
from evaluation.statistics import ReferenceStatistics, describe, find_statistics
from solvers.files import atomic_write

SETTINGS_NAME = "comparison.json"
WRITTEN = ("rows", "report.json", "report.md", "report.html", "comparison.png")
SHOWN = 16
TOTALS = ("seconds", "rounds", "evaluations")  # of all images of a block


@dataclass(frozen=True, eq=False)
class Entry:
    """A finished row with what pictures need: first images (k, *shape), trajectory error (N+1,) or None."""

    contender: Contender
    row: dict[str, Any]
    images: Tensor
    trajectory: Tensor | None


def compare_paths(
    denoiser: str,
    solvers: Sequence[str],
    reference: str,
    *,
    output: str,
    guidance_scale: float | Sequence[float] | None,
    precision: str,
    metrics: Sequence[str] | None,
    extractor: str,
    statistics: str | None,
    samplers: Mapping[str, Callable] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """See `evaluation.compare.compare`."""
    device = _device()
    scales = [guidance_scale] if isinstance(guidance_scale, int | float) else guidance_scale
    groups = load_groups(denoiser, solvers, reference, scales, precision, device, samplers)
    wants_features = metrics is None or set(metrics) - {"rmse"}
    network = _load_extractor(extractor, metrics is not None, device) if wants_features else None
    data = find_statistics(statistics, network, extractor) if network is not None else None
    return compare_groups(
        groups, output, metrics=metrics, extractor=network, statistics=data, precision=precision, **options
    )


def compare_groups(
    groups: Sequence[Group],
    output: str | Path,
    *,
    num_samples: int = 512,
    seed: int = 0,
    batch_size: int = 64,
    precision: str = "float32",
    metrics: Sequence[str] | None = None,
    extractor: Extractor | None = None,
    statistics: ReferenceStatistics | None = None,
    bootstrap: int = 200,
    cache: str | Path = "runs/cache/reference",
    log_to_wandb: bool = False,
) -> list[dict[str, Any]]:
    """Compare solvers that are loaded already; arguments and errors as in `evaluation.compare.compare`.

    Started in several processes with the variables of `torchrun`, each samples its share of the images, and the first
    one writes the report.

    Returns:
        The rows of report.json; an empty list in the other processes.
    """
    if num_samples < 1 or batch_size < 1 or bootstrap < 0:
        raise ValueError(
            f"num_samples {num_samples} and batch_size {batch_size} must be positive, bootstrap not negative"
        )
    check_seeds(groups, range(seed, seed + num_samples))
    shape = groups[0].reference.denoiser.sample_shape
    measure = choose_metrics(metrics, extractor, statistics, num_samples, shape)
    run = Run(Path(output), groups, measure, num_samples, seed, batch_size, precision, Path(cache))
    with _processes() as (rank, world_size):
        if rank == 0:
            run.claim()
        _barrier(world_size)
        run.sample(rank, world_size)
        _barrier(world_size)
        return _report(run, bootstrap, log_to_wandb) if rank == 0 else []


@dataclass(frozen=True, eq=False)
class Run:
    """One comparison in its output folder: `comparison.json`, and `rows/<contender>/` with a file per block."""

    output: Path
    groups: Sequence[Group]
    measure: Measure
    num_samples: int
    seed: int
    batch_size: int
    precision: str
    cache: Path

    def settings(self) -> dict[str, Any]:
        """What makes it this comparison; the list of solvers and the number of images may grow."""
        measure = self.measure
        return {
            "references": {str(group.reference.guidance_scale): group.reference.key for group in self.groups},
            "num_samples": self.num_samples,
            "seed": self.seed,
            "precision": self.precision,
            "metrics": list(measure.metrics),
            "extractor": measure.extractor and measure.extractor.identity["name"],
            "extractor_fingerprint": measure.extractor and measure.extractor.fingerprint,
            "statistics": describe(measure.statistics),
        }

    def claim(self) -> None:
        """Take the output folder, or go on in it.

        Raises:
            ValueError: it holds something else.
        """
        path, settings = self.output / SETTINGS_NAME, self.settings()
        solvers = {_key(contender): contender.name for group in self.groups for contender in group.contenders}
        if path.is_file():
            _check_same(path, settings, solvers)
        else:
            _check_free(self.output)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(settings | {"solvers": solvers}, indent=2) + "\n")

    def sample(self, rank: int = 0, world_size: int = 1) -> None:
        """Compute this process's missing blocks, the reference of a block before the solvers that need it."""
        with tqdm(
            total=self._evaluations(rank, world_size), desc="comparing", unit="evaluation", disable=rank > 0
        ) as bar:
            for group in self.groups:
                reference = ReferenceImages(group.reference, self.cache, self.seed, self.precision)
                for block in blocks_of(self.num_samples)[rank::world_size]:
                    self._sample_block(group, reference, block, bar.update)

    def _sample_block(self, group: Group, reference: ReferenceImages, block: range, step: Any) -> None:
        missing = self._missing(group, block)
        if not missing:
            return
        target = reference.get(block, self.batch_size, step)
        seeds = range(self.seed + block.start, self.seed + block.stop)
        for contender in missing:
            drawn = target if contender is group.reference else self._draw(contender, seeds, step)
            write_tensors(self._path(contender, block), self._measured(drawn, target.images))

    def _missing(self, group: Group, block: range) -> list[Contender]:
        """Contenders without all images of a block."""
        everyone = (group.reference, *group.contenders)
        return [c for c in everyone if read_count(self._path(c, block), "squared_errors") < len(block)]

    def _draw(self, contender: Contender, seeds: range, step: Any) -> Drawn:
        return draw(contender, seeds, self.batch_size, TRACED if seeds[0] == self.seed else 0, step)

    def _measured(self, drawn: Drawn, target: Tensor) -> dict[str, Tensor]:
        """What is kept of a block: errors, features and scores of all images, pictures and states of the first ones."""
        values = {
            "squared_errors": squared_errors(drawn.images, target),
            "seconds": torch.tensor(drawn.seconds, dtype=torch.float64),
        }
        for name in ("rounds", "evaluations"):
            if getattr(drawn, name) is not None:
                values[name] = torch.tensor(getattr(drawn, name), dtype=torch.float64)
        if self.measure.extractor is not None:
            device = next(self.measure.extractor.parameters()).device
            parts = [self.measure.extractor(part.to(device)) for part in drawn.images.split(self.batch_size)]
            values["features"] = torch.cat([features for features, _ in parts])
            if parts[0][1] is not None:
                values["scores"] = torch.cat([scores for _, scores in parts])
        if drawn.trace is not None:
            values |= {"images": drawn.images[:SHOWN], "trace": drawn.trace}
        return values

    def _evaluations(self, rank: int, world_size: int) -> int:
        """Network evaluations still to do in this process."""
        total = 0
        for group in self.groups:
            reference = ReferenceImages(group.reference, self.cache, self.seed, self.precision)
            for block in blocks_of(self.num_samples)[rank::world_size]:
                missing = self._missing(group, block)
                total += sum(c.table.nfe * len(block) for c in missing if c is not group.reference)
                total += reference.missing(block) * group.reference.table.nfe if missing else 0
        return total

    def entries(self, repeats: int) -> list[Entry]:
        """All rows, measured: per group the reference, then its contenders."""
        entries = []
        bar = tqdm(total=sum(1 + len(group.contenders) for group in self.groups), desc="measuring", unit="solver")
        with bar:
            for group in self.groups:
                target = self._read(group.reference)
                for contender in (group.reference, *group.contenders):
                    entries.append(self._entry(contender, group, target, repeats))
                    bar.update()
        return entries

    def _entry(self, contender: Contender, group: Group, target: Mapping[str, Tensor], repeats: int) -> Entry:
        is_reference = contender is group.reference
        values = target if is_reference else self._read(contender)
        row = make_row(contender, values, self.measure, repeats, is_reference)
        errors = trajectory_error(contender.table, values["trace"], group.reference.table, target["trace"])
        images = as_images(contender.denoiser, values["images"])
        return Entry(contender, row, images, None if is_reference else errors)

    def _read(self, contender: Contender) -> dict[str, Tensor]:
        """All blocks of a contender joined, totals added up."""
        parts = [read_tensors(self._path(contender, block)) for block in blocks_of(self.num_samples)]
        first = {name: parts[0][name] for name in ("images", "trace")}
        totals = {name: torch.stack([part[name] for part in parts]).sum() for name in TOTALS if name in parts[0]}
        others = parts[0].keys() - {*first, *totals}
        return {**first, **totals, **{name: torch.cat([part[name] for part in parts]) for name in others}}

    def _path(self, contender: Contender, block: range) -> Path:
        return self.output / "rows" / _key(contender) / f"{block.start:07d}.safetensors"


def _key(contender: Contender) -> str:
    return f"{contender.key}-g{contender.guidance_scale:g}"


def _check_free(output: Path) -> None:
    taken = [name for name in WRITTEN if (output / name).exists()]
    if taken:
        raise ValueError(f"{output} holds {', '.join(taken)} of something else: choose another --output")


def _check_same(path: Path, settings: dict[str, Any], solvers: dict[str, str]) -> None:
    try:
        found = json.loads(path.read_text())
        differ = [name for name, value in settings.items() if found[name] != value and name != "num_samples"]
        differ += ["num_samples"] * (settings["num_samples"] < found["num_samples"])
        lost = [name for key, name in found["solvers"].items() if key not in solvers]
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


def _report(run: Run, repeats: int, log_to_wandb: bool) -> list[dict[str, Any]]:
    from evaluation.report import log_report, write_report

    entries = run.entries(repeats)
    write_report(run.output, entries, run.settings(), run.measure.notes)
    if log_to_wandb:
        log_report(run.output, entries)
    return [entry.row for entry in entries]


def _load_extractor(name: str, is_required: bool, device: torch.device) -> Extractor | None:
    """The extractor; None when the default one is not there and no metric was asked for."""
    if not is_required and not Path(name).is_dir() and ":" not in name and name != "inception":
        return None
    return load_extractor(name).to(device)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(rank, number of processes): of a running process group, of torchrun, or this one alone."""
    group = torch.distributed
    starts = not group.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if starts:
        group.init_process_group("gloo")
    try:
        yield (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)
    finally:
        if starts:
            group.destroy_process_group()


def _barrier(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()
