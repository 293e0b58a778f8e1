"""The work behind `sample.py compare`: load what is named, sample what is missing, measure and report."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from denoisers.generate import image_shape
from evaluation.args import CompareArgs
from evaluation.comparison import Comparison
from evaluation.contenders import Group, check_seeds, load_groups
from evaluation.extractors import Extractor, extractor_of, load_extractor
from evaluation.judges import load_judges, prompts_of
from evaluation.metrics import METRICS, choose_metrics
from evaluation.processes import barrier, first_alone, processes
from evaluation.report import log_report, write_report
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
    device = current_device()
    groups = load_groups(args, device, samplers)
    default = extractor_of(groups[0].reference.denoiser)
    spaces = load_spaces(args.extractor, args.statistics, args.metrics, default, device)
    return compare_groups(groups, args, spaces, load_judges(args.metrics, args.lpips, args.clip, device))


def load_spaces(
    names: str | Sequence[str] | None,
    statistics: str | Sequence[str] | None,
    metrics: Sequence[str] | None,
    default: str | Path,
    device: torch.device,
) -> list[tuple[Extractor, DataStatistics | None]]:
    """Extractors with the statistics of the data.

    Args:
        names: of extractors.
        statistics: a source for all of them, or one each.
        metrics: that are asked for.
        default: the extractor where none is named, if it is there.
        device: of the networks.
    Returns:
        None where no metric needs features or there is no extractor.
    Raises:
        ValueError: an extractor named twice, or sources that are neither one nor one each.
    """
    given = [names] if isinstance(names, str) else list(names or ([str(default)] if Path(default).is_dir() else []))
    sources = [statistics] if isinstance(statistics, str | None) else list(statistics)
    if len(set(given)) < len(given) or (given and len(sources) not in (1, len(given))):
        raise ValueError(f"extractors {given} and statistics {sources}: name each once, with one source or one each")
    if metrics is not None and not set(metrics) & METRICS.keys():
        return []
    loaded = [load_extractor(name).to(device) for name in given]
    each = sources * len(given) if len(sources) == 1 else sources
    return [(e, find_statistics(source, e, name)) for e, source, name in zip(loaded, each, given)]


def compare_groups(
    groups: Sequence[Group],
    args: CompareArgs,
    spaces: Sequence[tuple[Extractor, DataStatistics | None]] = (),
    judges: Mapping[str, nn.Module] | None = None,
) -> list[dict[str, Any]]:
    """Compare solvers that are loaded already.

    Started in several processes with the variables of `torchrun`, each samples its share of the images, and the first
    one writes the report.

    Args:
        groups: the solvers and their networks.
        args: how they are compared.
        spaces: extractors with the statistics of the data; none measure RMSE alone.
        judges: see `evaluation.judges.load_judges`.
    Returns:
        The rows of report.json; an empty list in the other processes.
    """
    check_seeds(groups, args.seeds)
    denoiser = groups[0].reference.denoiser
    if "clip_score" in (judges or {}) and prompts_of(denoiser, [0]) is None:
        raise ValueError("clip_score was asked for: the model has no prompts")
    measure = choose_metrics(args.metrics, spaces, args.num_samples, image_shape(denoiser), judges)
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


def current_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
