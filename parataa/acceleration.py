"""Triangular Anderson acceleration: what the last rounds tell about the next."""

import torch
from torch import Tensor


def triangular_anderson(residual: Tensor, moved: Tensor, changes: Tensor, regularization: float) -> Tensor:
    """What triangular Anderson acceleration adds to the plain step.

        -(dX[i] + dR[i]) (sum_{rows <= i} dR^T dR + lambda I)^-1 (sum_{rows <= i} dR^T R)

    The sums over the rows before i keep the triangular structure that plain Anderson acceleration breaks. lambda is
    `regularization` times the mean of the diagonal it is added to, so that its meaning does not depend on the size
    of a sample.

    Args:
        residual: R, (rows, elements).
        moved: dX, differences of successive states, (memory, rows, elements), the newest first.
        changes: dR, differences of successive residuals, of the same shape.
        regularization: > 0.
    Returns:
        (rows, elements).
    Source: arXiv 2402.09970, eq. 14, with lambda made relative.
    """
    gram = torch.einsum("mid,nid->imn", changes, changes).double().cumsum(0)
    right = torch.einsum("mid,id->im", changes, residual).double().cumsum(0)
    weights = torch.linalg.solve(_regularized(gram, regularization), right).to(residual)
    return -torch.einsum("im,mid->id", weights, moved + changes)


def _regularized(gram: Tensor, regularization: float) -> Tensor:
    """Add a multiple of the mean of the diagonal; rows without any change get the unit matrix."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    shift = torch.where(mean > 0, regularization * mean, 1.0)
    return gram + torch.diag_embed(shift[..., None].expand(gram.shape[:-1]))
