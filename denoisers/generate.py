"""Images from seeds: noise, condition and fresh noises are all addressed by the seed, in batches of any size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from denoisers.labels import check_labels, class_labels
from solvers import SolverTable, sample, start_noise
from solvers.conditions import condition_to, index_condition
from solvers.progress import progress_bar


def generate(
    denoiser: Any,
    table: SolverTable,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    labels: Sequence[int] | None = None,
    sampler: Callable[..., Tensor] = sample,
    progress: str | None = None,
) -> Tensor:
    """Run a table from the noises of `seeds`.

    Args:
        denoiser: carries `.sample_shape`; class-conditional ones get the label seed % num_classes.
        table: any solver table.
        seeds: one per image; image k depends on seeds[k] alone.
        batch_size: images per network call.
        labels: class labels to use in turn instead.
        sampler: `sample` or a function of the same signature.
        progress: text of a progress bar over the rows; none by default.
    Returns:
        (len(seeds), *sample_shape), float32, on the CPU.
    Raises:
        ValueError: no seeds, no labels, or a label out of range.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("no images to generate: num_samples is 0, give at least 1")
    batches = list(_batches(denoiser, seeds, labels, batch_size))
    total = len(seeds) * table.num_rows
    with progress_bar(desc=progress or "", unit="row", total=total, show=progress is not None) as bar:
        images = []
        for batch, condition in batches:
            noise = start_noise(batch, denoiser.sample_shape).to(device_of(denoiser))
            with torch.no_grad():  # no inference mode: what a network caches may be part of a later gradient
                step = lambda row, state: bar.update(len(state))  # noqa: E731
                images.append(sampler(denoiser, table, noise, condition, seeds=batch, callback=step).float().cpu())
    return torch.cat(images)


def check_finite(states: Tensor, seeds: Sequence[int]) -> None:
    """Refuse NaN and infinity.

    Args:
        states: (len(seeds), ...).
        seeds: of the samples.
    Raises:
        ValueError: names the first sample that has one.
    """
    bad = (~torch.isfinite(states)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(seeds)} samples hold NaN or infinity, the first has seed {seeds[bad[0]]}: nothing of "
            "them was written; check the weights, or use a wider number format (float32, or bf16 for float16)"
        )


def as_images(denoiser: Any, states: Tensor) -> Tensor:
    """States as images, (n, channels, height, width): decoded where the denoiser has a decoder."""
    return getattr(denoiser, "decode", lambda value: value)(states)


def image_shape(denoiser: Any) -> tuple[int, ...]:
    """Shape of one image: that of a state, or of what the decoder makes of one."""
    shape = tuple(denoiser.sample_shape)
    if not hasattr(denoiser, "decode"):
        return shape
    with torch.inference_mode():
        return tuple(as_images(denoiser, torch.zeros(1, *shape, device=device_of(denoiser))).shape[1:])


def _batches(denoiser, seeds, labels, batch_size) -> Iterator[tuple[list[int], Any]]:
    device = device_of(denoiser)
    chosen = _labels(denoiser, seeds, labels)
    for start in range(0, len(seeds), batch_size):
        stop = start + batch_size
        yield seeds[start:stop], condition_to(index_condition(chosen, slice(start, stop)), device)


def _labels(denoiser, seeds, labels) -> Any:
    if labels is None:
        return class_labels(denoiser, seeds)
    classes = check_labels(denoiser, labels)
    if not len(classes):
        raise ValueError("labels is an empty list: give at least one, or leave it out")
    return classes[torch.arange(len(seeds)) % len(classes)]


def device_of(denoiser: Any) -> torch.device:
    """Where its parameters are; the CPU for one without."""
    parameter = next(iter(denoiser.parameters()), None) if hasattr(denoiser, "parameters") else None
    return torch.device("cpu") if parameter is None else parameter.device
