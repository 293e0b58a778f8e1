"""Images block by block on disk, so that a killed comparison goes on and a reference is computed once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from denoisers.generate import generate
from evaluation.contenders import Contender
from evaluation.distances import require_finite
from solvers import sample
from solvers.files import atomic_write

BLOCK = 128
TRACED = 8


@dataclass(frozen=True)
class Drawn:
    """Images (n, *shape), the states of the first few of them (N+1, k, *shape) or None, and what all of them took:
    seconds, and of a parallel sampler rounds and network evaluations."""

    images: Tensor
    trace: Tensor | None
    seconds: float
    rounds: int | None = None
    evaluations: int | None = None


def blocks_of(num_samples: int) -> list[range]:
    """Offsets of the images, in blocks."""
    return [range(start, min(start + BLOCK, num_samples)) for start in range(0, num_samples, BLOCK)]


def draw(contender: Contender, seeds: range, batch_size: int, traced: int, step: Callable[[int], None]) -> Drawn:
    """Sample the images of `seeds`.

    Args:
        contender: the solver and its network.
        seeds: one per image.
        batch_size: images per network call.
        traced: keep all states of this many images at the start of the first batch.
        step: called with the number of rows done.
    Raises:
        ValueError: images that are not finite.
    """
    run = _sequential if contender.sampler is None else _with_rounds
    taken = run(contender, seeds, batch_size, traced, step)
    require_finite(taken.images, f"images of {contender.name}")
    return taken


def _sequential(contender: Contender, seeds: range, batch_size: int, traced: int, step: Callable[[int], None]) -> Drawn:
    states: list[Tensor] = []
    seconds = 0.0

    def sampler(denoiser, table, noise, condition, *, seeds, callback):
        nonlocal seconds
        keep = traced if not states else 0
        if keep:
            states.append(noise[:keep].float().cpu() * table.start_scale)

        def after(row: int, state: Tensor) -> None:
            step(len(state))
            if keep:
                states.append(state[:keep].float().cpu())

        begin = time.perf_counter()
        images = sample(denoiser, table, noise, condition, seeds=seeds, callback=after).cpu()
        seconds += time.perf_counter() - begin
        return images

    images = generate(contender.denoiser, contender.table, seeds, batch_size=batch_size, sampler=sampler)
    return Drawn(images, torch.stack(states) if states else None, seconds)


def _with_rounds(
    contender: Contender, seeds: range, batch_size: int, traced: int, step: Callable[[int], None]
) -> Drawn:
    """By the contender's own sampler."""
    traces: list[Tensor] = []
    seconds, rounds, evaluations = 0.0, 0, 0

    def sampler(denoiser, table, noise, condition, *, seeds, callback):
        nonlocal seconds, rounds, evaluations
        keep = traced if not traces else 0
        begin = time.perf_counter()
        images, stats = contender.sampler(denoiser, table, noise, condition, seeds=seeds, keep_states=keep > 0)
        images = images.cpu()
        seconds += time.perf_counter() - begin
        rounds, evaluations = rounds + sum(stats.sample_rounds), evaluations + stats.evaluations
        if keep:
            traces.append(stats.states[:, :keep].float().cpu())
        step(table.num_rows * len(images))
        return images

    images = generate(contender.denoiser, contender.table, seeds, batch_size=batch_size, sampler=sampler)
    return Drawn(images, traces[0] if traces else None, seconds, rounds, evaluations)


class ReferenceImages:
    """The reference solver's images, kept in a folder of their own and used again by every later comparison.

    Args:
        contender: the reference solver.
        cache: folder of all references.
        seed: seed of the first image.
        precision: of the network.
    """

    def __init__(self, contender: Contender, cache: str | Path, seed: int, precision: str) -> None:
        self.contender, self.seed = contender, seed
        self.folder = Path(cache) / f"{contender.key}-{precision}-{seed}"

    def missing(self, block: range) -> int:
        """Number of images of a block that are not there yet."""
        return len(block) - min(len(block), self._count(block))

    def get(self, block: range, batch_size: int, step: Callable[[int], None]) -> Drawn:
        """A block's images, computed where they are missing; a longer block than needed is cut."""
        path, count = self._path(block), self._count(block)
        kept = read_tensors(path) if count else {}
        if count < len(block):
            seeds = range(self.seed + block.start + count, self.seed + block.stop)
            drawn = draw(self.contender, seeds, batch_size, TRACED if seeds[0] == self.seed else 0, step)
            kept = _joined(kept, drawn)
            write_tensors(path, kept)
        seconds = float(kept["seconds"]) / len(kept["images"]) * len(block)
        return Drawn(kept["images"][: len(block)], kept.get("trace"), seconds)

    def _count(self, block: range) -> int:
        return read_count(self._path(block), "images")

    def _path(self, block: range) -> Path:
        return self.folder / f"{block.start:07d}.safetensors"


def _joined(kept: dict[str, Tensor], drawn: Drawn) -> dict[str, Tensor]:
    seconds = torch.tensor(drawn.seconds, dtype=torch.float64)
    if kept:
        return kept | {"images": torch.cat([kept["images"], drawn.images]), "seconds": kept["seconds"] + seconds}
    trace = {} if drawn.trace is None else {"trace": drawn.trace}
    return {"images": drawn.images, "seconds": seconds, **trace}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    with atomic_write(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)


def read_tensors(path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Its tensors, all or some.

    Raises:
        ValueError: missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, it will be computed again") from error


def read_count(path: Path, name: str) -> int:
    """Length of one of its tensors, 0 where there is no file."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice(name).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, it will be computed again") from error
