"""What a weight of a solver table is: a number, or one channel matrix per band of spatial frequencies.

Weights of either kind form a ring: sums and products of weights are weights again, so canonical form, substitution
and Picard iteration are exact for both. A space says how tables of its weights are multiplied; bound to the shape of
samples it says how they act.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """Weights are numbers: w x. Every scheduler is such a table."""

    ops: ClassVar[tuple[int, ...]] = ()

    def bind(self, shape: Sequence[int], device: torch.device) -> "Plain":
        """Numbers act on samples of every shape."""
        return self

    def split(self, x: Tensor) -> Tensor:
        """The form that weights act on, here `x` itself."""
        return x

    def merge(self, parts: Tensor) -> Tensor:
        """Inverse of `split`."""
        return parts

    def add(self, total: Tensor | None, weight: Tensor, parts: Tensor) -> Tensor:
        """total + weight parts, in place where nothing is differentiated; weight parts where there is no total."""
        if total is None:
            return weight * parts
        return (torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_)(total, weight, parts)

    def mix(self, weights: Tensor, parts: Tensor) -> Tensor:
        """sum_j weights[i, j] parts[j] for several rows at once: (rows, ...) of (rows, columns) and (columns, ...)."""
        return torch.tensordot(weights, parts, dims=1)

    def isometric(self, parts: Tensor) -> tuple[Tensor, ...]:
        """The parts that weights act on independently of each other, scaled to keep sums of squares."""
        return (parts,)

    def scale(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Each row of weights, (rows, columns), times a weight of its own, (rows,)."""
        return weights[:, None] * rows

    def matrix(self, weights: Tensor) -> Tensor:
        """Weights (I, J) as one matrix that multiplies like them."""
        return weights

    def weights(self, matrix: Tensor) -> Tensor:
        """Inverse of `matrix`."""
        return matrix

    def mean(self, weights: Tensor) -> Tensor:
        """The number nearest to each weight."""
        return weights

    def embed(self, numbers: Tensor) -> Tensor:
        """Numbers as weights of this space."""
        return numbers


@dataclass(frozen=True)
class Bands:
    """Weights are one channel matrix per radial frequency band: w x = sum_b P_b W_b x, W_b in R^(C x C).

    P_b projects on the spatial frequencies sqrt(fy^2 + fx^2) of band b, in cycles per pixel over the last two axes:
    below `edges[0]`, then from each edge to the next, then all above. Without edges there is one band, so the weights
    are channel matrices and need no Fourier transform.

    Args:
        edges: increasing, inside (0, sqrt(1/2)).
        channels: C, size of dimension 1 of the samples, (batch, C, ..., height, width).
    Raises:
        ValueError: edges out of order or range, fewer than one channel.
    Source: arXiv 2606.08672 treats frequency bands apart; channel matrices and their ring are this project's.
    """

    edges: tuple[float, ...]
    channels: int

    def __post_init__(self) -> None:
        inside = all(0 < edge < 0.5**0.5 for edge in self.edges)
        if not inside or any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError(
                f"band edges are {list(self.edges)}: they must increase inside (0, 0.7071), in cycles per pixel"
            )
        if self.channels < 1:
            raise ValueError(f"bands have {self.channels} channels: at least 1 is needed")

    @property
    def ops(self) -> tuple[int, int, int]:
        """Shape of a weight: (bands, C, C)."""
        return len(self.edges) + 1, self.channels, self.channels

    def bind(self, shape: Sequence[int], device: torch.device) -> "BoundBands":
        """How the weights act on samples of `shape`, (C, ..., height, width).

        Raises:
            ValueError: samples with other channels or without a height and width.
        """
        if len(shape) < 3 or shape[0] != self.channels:
            raise ValueError(
                f"the solver's weights are matrices of {self.channels} channels, the samples have shape "
                f"{tuple(shape)}: use it with the model it was fitted for"
            )
        return _bound(self, shape[-2], shape[-1], device)

    def scale(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Each row of weights, (rows, columns, *ops), times a weight of its own, (rows, *ops), from the left."""
        return torch.einsum("ikab,ijkbc->ijkac", weights, rows)

    def matrix(self, weights: Tensor) -> Tensor:
        """Weights (I, J, bands, C, C) as one matrix per band that multiplies like them, (bands, I C, J C)."""
        return weights.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def weights(self, matrix: Tensor) -> Tensor:
        """Inverse of `matrix`."""
        return matrix.unflatten(2, (-1, self.channels)).unflatten(1, (-1, self.channels)).permute(1, 3, 0, 2, 4)

    def mean(self, weights: Tensor) -> Tensor:
        """The number nearest to each weight, all bands and channels counted alike."""
        return weights.diagonal(dim1=-2, dim2=-1).mean((-2, -1))

    def embed(self, numbers: Tensor) -> Tensor:
        """Numbers as weights: the same multiple of the identity in every band."""
        return numbers[..., None, None, None] * torch.eye(self.channels, dtype=numbers.dtype).expand(self.ops)


Space = Plain | Bands


@dataclass(frozen=True, eq=False)
class BoundBands:
    """Bands at work on samples of one height and width; made by `Bands.bind`.

    A sample is split once into real and imaginary parts of its half spectrum, (batch, C, ..., numbers), band after
    band, so that a weight is one small matrix product per band.

    Args:
        size: (height, width).
        order: places of the sorted frequencies in the flat half spectrum; None for a single band.
        back: its inverse.
        numbers: real numbers of each band.
        counted: sqrt(2) for frequencies that stand for a conjugate pair, else 1; sorted, each twice.
    """

    size: tuple[int, int]
    order: Tensor | None
    back: Tensor | None
    numbers: tuple[int, ...]
    counted: Tensor | None

    def split(self, x: Tensor) -> Tensor:
        """The form that weights act on."""
        if self.order is None:
            return x.flatten(-2)
        spectrum = torch.fft.rfft2(x, norm="ortho").flatten(-2)
        return torch.view_as_real(spectrum[..., self.order]).flatten(-2)

    def merge(self, parts: Tensor) -> Tensor:
        """Inverse of `split`."""
        height, width = self.size
        if self.back is None:
            return parts.unflatten(-1, self.size)
        spectrum = torch.view_as_complex(parts.unflatten(-1, (-1, 2)).contiguous())[..., self.back]
        return torch.fft.irfft2(spectrum.unflatten(-1, (height, width // 2 + 1)), s=self.size, norm="ortho")

    def add(self, total: Tensor | None, weight: Tensor, parts: Tensor) -> Tensor:
        """total + weight parts; weight parts where there is no total."""
        bands = zip(weight, parts.split(self.numbers, -1))
        acted = torch.cat([_on_channels(matrix, band) for matrix, band in bands], -1)
        return acted if total is None else total + acted

    def mix(self, weights: Tensor, parts: Tensor) -> Tensor:
        """sum_j weights[i, j] parts[j] for several rows at once."""
        bands = parts.split(self.numbers, -1)
        return torch.cat(
            [torch.einsum("ijab,jnb...->ina...", weights[:, :, k], band) for k, band in enumerate(bands)], -1
        )

    def isometric(self, parts: Tensor) -> tuple[Tensor, ...]:
        """The bands of `split`, scaled so that their squares add up to those of the samples."""
        return (parts if self.counted is None else parts * self.counted.to(parts)).split(self.numbers, -1)


def _on_channels(matrix: Tensor, band: Tensor) -> Tensor:
    """A channel matrix on dimension 1."""
    if band.ndim == 3:
        return matrix @ band
    return torch.einsum("ab,nb...->na...", matrix, band)


@lru_cache(maxsize=64)
def _bound(space: Bands, height: int, width: int, device: torch.device) -> BoundBands:
    if not space.edges:
        return BoundBands((height, width), None, None, (height * width,), None)
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64)
    radius = (vertical**2 + horizontal**2).sqrt().flatten()
    band = torch.bucketize(radius, torch.tensor(space.edges, dtype=torch.float64), right=True)
    order = torch.argsort(band, stable=True)
    numbers = tuple((2 * torch.bincount(band, minlength=len(space.edges) + 1)).tolist())
    single = (horizontal == 0) | (horizontal == 0.5)
    counted = torch.where(single, 1.0, 2**0.5).expand(height, -1).flatten()[order].repeat_interleave(2)
    back = order.argsort()
    return BoundBands((height, width), order.to(device), back.to(device), numbers, counted.to(device))
