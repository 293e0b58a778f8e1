"""evaluate_table: the figures of one solver table, for `train.py test` and for logging during training."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torchmetrics import MetricCollection

from denoisers import network_calls
from denoisers.generate import as_images, device_of, generate, image_shape
from evaluation.contenders import check_disjoint
from evaluation.extractors import Extractor, extractor_of, load_extractor
from evaluation.metrics import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall, ReferenceError
from evaluation.processes import rank_and_size
from evaluation.rows import Measure, choose_metrics
from evaluation.statistics import find_statistics
from solvers import SolverTable


def shipped_measure(denoiser: Any, num_images: int, metrics: Sequence[str] | None = None) -> Measure:
    """What can be measured offline of this many images: with the shipped classifier where images fit it, else RMSE.

    Args:
        denoiser: the network whose images are measured; its name chooses the classifier (`extractor_of`).
        num_images: images per solver.
        metrics: as in `evaluation.rows.choose_metrics`.
    """
    folder = extractor_of(denoiser)
    extractor = load_extractor(folder) if (metrics is None or set(metrics) - {"rmse"}) and folder.is_dir() else None
    statistics = None if extractor is None else find_statistics(None, extractor, folder)
    return choose_metrics(metrics, extractor, statistics, num_images, image_shape(denoiser))


@torch.no_grad()
def evaluate_table(
    denoiser: Any,
    table: SolverTable,
    reference: SolverTable | torch.Tensor | None = None,
    *,
    num_images: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    measure: Measure | None = None,
    fitted_seeds: Sequence[Sequence[int]] = (),
    reference_denoiser: Any = None,
) -> dict[str, float]:
    """Figures of a table on fresh noises, the same in every process of a running process group.

    Each process samples its share of the images; sums and features are gathered.

    Args:
        denoiser: the network, with `sample_shape`.
        table: the solver.
        reference: solver that RMSE and PSNR are measured against, or what `reference_images` gave of it; without one
            they are left out.
        num_images: images in total, at least one per process.
        seed: of the first image.
        batch_size: images per network call.
        measure: what to measure; default: `shipped_measure(denoiser, num_images)`.
        fitted_seeds: half-open ranges the table was fitted on.
        reference_denoiser: the network of `reference`; default `denoiser`. (A student's teacher.)
    Returns:
        Some of `rmse`, `median`, `p99`, `worst`, `psnr`, `fd`, `kid`, `precision`, `recall`, `inception_score`, and
        `nfe`, `num_images`.
    Raises:
        ValueError: seeds that overlap, fewer images than processes, or images that are not finite.
    """
    seeds = range(seed, seed + num_images)
    check_disjoint(seeds, fitted_seeds)
    share = _share(seeds)
    measure = measure or shipped_measure(reference_denoiser or denoiser, num_images)
    device = device_of(denoiser)
    images = generate(denoiser, table, share, batch_size=batch_size).to(device)
    found: dict[str, Any] = {"nfe": float(network_calls(table, denoiser)), "num_images": float(num_images)}
    if reference is not None:
        if isinstance(reference, SolverTable):
            reference = generate(reference_denoiser or denoiser, reference, share, batch_size=batch_size)
        error = ReferenceError().to(device)
        error.update(images, reference.to(device))
        found |= error.compute()
    if measure.extractor is not None:
        parts = (as_images(denoiser, part) for part in images.split(batch_size))
        found |= _distances(parts, measure, measure.extractor.to(device), device)
    return {name: float(value) for name, value in found.items()}


def reference_images(
    denoiser: Any, table: SolverTable, num_images: int, seed: int, batch_size: int = 64, progress: str | None = None
) -> torch.Tensor:
    """This process's share of a solver's images, as `evaluate_table` compares them with those of other tables.

    Args:
        denoiser, table: the reference.
        num_images, seed, batch_size: as in `evaluate_table`.
        progress: text of a progress bar; none by default.
    Raises:
        ValueError: fewer images than processes.
    """
    share = _share(range(seed, seed + num_images))
    return generate(denoiser, table, share, batch_size=batch_size, progress=progress)


def _distances(
    parts: Iterable[torch.Tensor], measure: Measure, extractor: Extractor, device: torch.device
) -> dict[str, Any]:
    statistics = measure.statistics
    chosen: dict[str, Any] = {}
    if "fd" in measure.metrics:
        chosen["fd"] = FrechetDistance(statistics)
    if "kid" in measure.metrics:
        chosen["kid"] = KernelDistance(statistics)
    if "precision_recall" in measure.metrics:
        chosen["precision_recall"] = PrecisionRecall(statistics)
    metrics = MetricCollection(chosen, compute_groups=False).to(device)
    score = InceptionScore().to(device) if "inception_score" in measure.metrics else None
    for part in parts:
        features, scores = extractor(part)
        metrics.update(features)
        if score is not None:
            score.update(scores)
    return dict(metrics.compute()) | ({} if score is None else {"inception_score": score.compute()})


def _share(seeds: range) -> range:
    """Seeds of this process."""
    rank, world_size = rank_and_size()
    if len(seeds) < world_size:
        raise ValueError(f"{len(seeds)} images for {world_size} processes: evaluate at least one per process")
    return seeds[rank::world_size]
