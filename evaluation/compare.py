"""The work behind `sample.py compare`: load what is named, sample what is missing, measure and report."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from denoisers.generate import image_shape
from evaluation.args import CompareArgs
from evaluation.comparison import Comparison
from evaluation.contenders import Group, check_seeds, load_groups
from evaluation.extractors import Extractor, extractor_of, load_extractor
from evaluation.processes import barrier, first_alone, processes
from evaluation.report import log_report, write_report
from evaluation.rows import choose_metrics
from evaluation.statistics import DataStatistics, find_statistics
from solvers.files import claimed


def compare(args: CompareArgs, samplers: Mapping[str, Callable] | None = None) -> list[dict[str, Any]]:
    """Compare solvers: report.json, report.md, report.html and comparison.png. A killed comparison continues.

    Several processes: `torchrun --nproc_per_node N sample.py compare ...`.

    Args:
        args: what is compared and how.
        samplers: other samplers than the sequential one, by name, see `evaluation.contenders.Contender`.
    Returns:
        The rows of report.json: the reference, then the solvers, per guidance scale.
    Raises:
        ValueError: an unknown solver, a solver that does not fit the model, overlapping seeds, too few images for a
            metric that was asked for, images that are not finite, statistics of another extractor, or an output
            folder of something else.
    """
    device = _device()
    groups = load_groups(args, device, samplers)
    folder = args.extractor or str(extractor_of(groups[0].reference.denoiser))
    extractor = _load_extractor(folder, args.metrics, device)
    statistics = None if extractor is None else find_statistics(args.statistics, extractor, folder)
    return compare_groups(groups, args, extractor, statistics)


def compare_groups(
    groups: Sequence[Group],
    args: CompareArgs,
    extractor: Extractor | None = None,
    statistics: DataStatistics | None = None,
) -> list[dict[str, Any]]:
    """Compare solvers that are loaded already.

    Started in several processes with the variables of `torchrun`, each samples its share of the images, and the first
    one writes the report.

    Args:
        groups: the solvers and their networks.
        args: how they are compared.
        extractor: None measures RMSE alone.
        statistics: of the data.
    Returns:
        The rows of report.json; an empty list in the other processes.
    """
    check_seeds(groups, args.seeds)
    shape = image_shape(groups[0].reference.denoiser)
    measure = choose_metrics(args.metrics, extractor, statistics, args.num_samples, shape)
    comparison = Comparison(args, groups, measure)
    with processes() as (rank, world_size), ExitStack() as alone:
        first_alone(comparison.claim)
        first_alone(lambda: alone.enter_context(claimed(comparison.output)))
        comparison.sample(rank, world_size)
        barrier()
        return _report(comparison) if rank == 0 else []


def _report(comparison: Comparison) -> list[dict[str, Any]]:
    output, notes = comparison.output, comparison.measure.notes
    entries = comparison.entries()
    write_report(output, entries, comparison.settings() | {"num_samples": comparison.args.num_samples}, notes)
    comparison.finish()
    print(*notes, f"report: {output / 'report.html'}", sep="\n")
    if comparison.args.wandb:
        log_report(output, entries)
    return [entry.row for entry in entries]


def _load_extractor(name: str, metrics: Sequence[str] | None, device: torch.device) -> Extractor | None:
    """The extractor; None when no metric needs it, or when none was asked for and it is not there."""
    if metrics is not None and not set(metrics) - {"rmse"}:
        return None
    if metrics is None and not Path(name).is_dir() and ":" not in name and name != "inception":
        return None
    return load_extractor(name).to(device)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
