"""evaluate_table: the figures of one solver table, for `train.py test` and for logging during training."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from denoisers import network_calls
from denoisers.generate import as_images, device_of, generate, image_shape
from evaluation.contenders import check_disjoint
from evaluation.distances import error_figures, psnr, squared_errors
from evaluation.extractors import extractor_of, load_extractor
from evaluation.metrics import Measure, choose_metrics
from evaluation.parts import Parts
from evaluation.processes import rank_and_size
from evaluation.statistics import find_statistics
from solvers import SolverTable


class Figures(Metric):
    """All figures of images, as a torchmetric: batch by batch, gathered from all processes.

    Args:
        measure: what is measured.
        kwargs: of torchmetrics' Metric.
    """

    is_differentiable, higher_is_better, full_state_update = False, None, False

    def __init__(self, measure: Measure, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.measure = measure
        names = [kind + space.suffix for space in measure.spaces for kind in ("features", "scores")]
        self.names = {name: f"value_{index}" for index, name in enumerate(["squared_errors", *names])}
        for state in self.names.values():
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, reference: Tensor | None = None, pictures: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            images: as the model makes them.
            reference: the reference solver's from the same noises; without them there are no errors.
            pictures: what a decoder makes of the images, where there is one.
        Raises:
            ValueError: different shapes, or values that are not finite.
        """
        values = self.measure.values(images if pictures is None else pictures)
        if reference is not None:
            values["squared_errors"] = squared_errors(images, reference)
        for name, value in values.items():
            getattr(self, self.names[name]).append(value.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Figures by name, float64.

        Raises:
            ValueError: no images.
        """
        states = {name: getattr(self, state) for name, state in self.names.items()}
        values = {name: dim_zero_cat(state).cpu() for name, state in states.items() if len(state)}
        if not values:
            raise ValueError("no images were given: call update before compute")
        squared = values.pop("squared_errors", None)
        found: dict[str, float] = {} if squared is None else error_figures(squared)
        if squared is not None:
            found["psnr"] = psnr(found["rmse"])
        found |= self.measure.figures({name: Parts.of(value) for name, value in values.items()})
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def shipped_measure(denoiser: Any, num_images: int, metrics: Sequence[str] | None = None) -> Measure:
    """What can be measured offline of this many images: with the shipped classifier where images fit it, else RMSE.

    Args:
        denoiser: the network whose images are measured; its name chooses the classifier (`extractor_of`).
        num_images: images per solver.
        metrics: as in `evaluation.metrics.choose_metrics`.
    """
    folder, spaces = extractor_of(denoiser), []
    if (metrics is None or set(metrics) - {"rmse"}) and folder.is_dir():
        extractor = load_extractor(folder)
        spaces.append((extractor, find_statistics(None, extractor, folder)))
    return choose_metrics(metrics, spaces, num_images, image_shape(denoiser))


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
    for space in measure.spaces:
        space.extractor.to(device)
    images = generate(denoiser, table, share, batch_size=batch_size)
    if isinstance(reference, SolverTable):
        reference = generate(reference_denoiser or denoiser, reference, share, batch_size=batch_size)
    figures = Figures(measure).to(device)
    targets = repeat(None) if reference is None else reference.cpu().split(batch_size)
    for part, target in zip(images.split(batch_size), targets):
        figures.update(part, target, as_images(denoiser, part.to(device)) if measure.spaces else None)
    counts = {"nfe": float(network_calls(table, denoiser)), "num_images": float(num_images)}
    found = figures.compute() if measure.spaces or reference is not None else {}
    return counts | {name: float(value) for name, value in found.items()}


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


def _share(seeds: range) -> range:
    """Seeds of this process."""
    rank, world_size = rank_and_size()
    if len(seeds) < world_size:
        raise ValueError(f"{len(seeds)} images for {world_size} processes: evaluate at least one per process")
    return seeds[rank::world_size]
