"""The work behind `sample.py compare`: sample what is missing, then measure and report."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from evaluation.blocks import TRACED, Drawn, ReferenceImages, blocks_of, draw, read_count, read_tensors, write_tensors
from evaluation.contenders import Contender, Group, check_seeds, load_groups
from evaluation.distances import squared_errors
from evaluation.extractors import Extractor, extractor_of, load_extractor
from evaluation.generate import as_images, device_of, image_shape
from evaluation.rows import Measure, choose_metrics, make_row, trajectory_error
from evaluation.statistics import ReferenceStatistics, describe, find_statistics
from solvers.files import atomic_write
from solvers.noise import check_seed

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
    extractor: str | None,
    statistics: str | None,
    samplers: Mapping[str, Callable] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """See `evaluation.compare.compare`."""
    device = _device()
    scales = [guidance_scale] if isinstance(guidance_scale, int | float) else guidance_scale
    groups = load_groups(denoiser, solvers, reference, scales, precision, device, samplers)
    wants_features = metrics is None or set(metrics) - {"rmse"}
    folder = extractor or str(extractor_of(groups[0].reference.denoiser))
    network = _load_extractor(folder, metrics is not None, device) if wants_features else None
    data = find_statistics(statistics, network, folder) if network is not None else None
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
    for last in (seed, seed + num_samples - 1):
        check_seed(last)
    measure = choose_metrics(metrics, extractor, statistics, num_samples, image_shape(groups[0].reference.denoiser))
    run = Run(Path(output), groups, measure, num_samples, seed, batch_size, precision, Path(cache))
    with _processes() as (rank, world_size):
        _first_alone(run.claim, rank, world_size)
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

    @property
    def solvers(self) -> dict[str, str]:
        """Names by key."""
        return {_key(contender): contender.name for group in self.groups for contender in group.contenders}

    def settings(self) -> dict[str, Any]:
        """What makes it this comparison."""
        measure = self.measure
        return {
            "references": {str(group.reference.guidance_scale): group.reference.key for group in self.groups},
            "seed": self.seed,
            "precision": self.precision,
            "metrics": measure.asked and list(measure.asked),
            "extractor": measure.extractor and measure.extractor.identity["name"],
            "extractor_fingerprint": measure.extractor and measure.extractor.fingerprint,
            "statistics": describe(measure.statistics),
        }

    def claim(self) -> None:
        """Take the output folder, or go on in it.

        Raises:
            ValueError: it holds something else, or a report with more solvers or images.
        """
        path = self.output / SETTINGS_NAME
        if path.is_file():
            _check_same(path, self.settings(), self.solvers, self.num_samples)
            return
        _check_free(self.output)
        self._write_settings({}, 0)

    def finish(self) -> None:
        """Note what the report holds, which later runs may extend but not shorten."""
        self._write_settings(self.solvers, self.num_samples)

    def _write_settings(self, solvers: Mapping[str, str], num_samples: int) -> None:
        reported = {"num_samples": num_samples, "solvers": solvers}
        with atomic_write(self.output / SETTINGS_NAME) as temporary:
            temporary.write_text(json.dumps(self.settings() | reported, indent=2) + "\n")

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
            write_tensors(self._path(contender, block), self._measured(contender, drawn, target.images))

    def _missing(self, group: Group, block: range) -> list[Contender]:
        """Contenders without all images of a block."""
        everyone = (group.reference, *group.contenders)
        return [c for c in everyone if read_count(self._path(c, block), "squared_errors") < len(block)]

    def _draw(self, contender: Contender, seeds: range, step: Any) -> Drawn:
        return draw(contender, seeds, self.batch_size, TRACED if seeds[0] == self.seed else 0, step)

    def _measured(self, contender: Contender, drawn: Drawn, target: Tensor) -> dict[str, Tensor]:
        """What is kept of a block: errors, features and scores of all images, pictures and states of the first ones."""
        values = {
            "squared_errors": squared_errors(drawn.images, target),
            "seconds": torch.tensor(drawn.seconds, dtype=torch.float64),
        }
        for name in ("rounds", "evaluations"):
            if getattr(drawn, name) is not None:
                values[name] = torch.tensor(getattr(drawn, name), dtype=torch.float64)
        if self.measure.extractor is not None:
            device = device_of(self.measure.extractor)
            pictures = (as_images(contender.denoiser, part) for part in drawn.images.split(self.batch_size))
            parts = [self.measure.extractor(part.to(device)) for part in pictures]
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
        parts = [_cut(read_tensors(self._path(contender, block)), block) for block in blocks_of(self.num_samples)]
        first = {name: parts[0][name] for name in ("images", "trace")}
        totals = {name: torch.stack([part[name] for part in parts]).sum() for name in TOTALS if name in parts[0]}
        others = parts[0].keys() - {*first, *totals}
        return {**first, **totals, **{name: torch.cat([part[name] for part in parts]) for name in others}}

    def _path(self, contender: Contender, block: range) -> Path:
        return self.output / "rows" / _key(contender) / f"{block.start:07d}.safetensors"


def _cut(values: dict[str, Tensor], block: range) -> dict[str, Tensor]:
    """A stored block that a larger comparison has made longer, as it is needed; its totals in proportion."""
    share = len(block) / len(values["squared_errors"])
    return {
        name: value * share if name in TOTALS else value if name == "trace" else value[: len(block)]
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


def _report(run: Run, repeats: int, log_to_wandb: bool) -> list[dict[str, Any]]:
    from evaluation.report import log_report, write_report

    entries = run.entries(repeats)
    write_report(run.output, entries, run.settings() | {"num_samples": run.num_samples}, run.measure.notes)
    run.finish()
    print(*run.measure.notes, f"report: {run.output / 'report.html'}", sep="\n")
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
        group.init_process_group("gloo", timeout=timedelta(days=30))  # the shares of an hours-long run may differ
    try:
        yield (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)
    finally:
        if starts:
            group.destroy_process_group()


def _first_alone(action: Callable[[], None], rank: int, world_size: int) -> None:
    """Rank 0 acts; where it is refused, all processes are, each with the same error."""
    refusal = [""]
    if rank == 0:
        try:
            action()
        except ValueError as error:
            refusal = [str(error)]
    if world_size > 1:
        torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise ValueError(refusal[0])


def _barrier(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()
