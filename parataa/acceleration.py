"""Two ways to use the last rounds' changes: triangular Anderson acceleration and per-row secants."""

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


def triangular_secant(
    residual: Tensor, moved: Tensor, changes: Tensor, output_coef: Tensor, regularization: float
) -> Tensor:
    """What a Newton step with secant Jacobians adds to the plain step.

        e[k+1] = R[k] + sum_{j <= k} B[k,j] J[j] e[j],   J[j] = dO[j] (dX[j]^T dX[j] + lambda I)^-1 dX[j]^T

    e is the change of the states, R the residual, B the output weights. J is the least-squares secant Jacobian of
    output j with respect to its own state, so that the changes of earlier states act on later ones within the same
    round. Only the products q[j] = dX[j]^T e[j] are unknown: one triangular system of rows * memory equations.

    Args:
        residual: R of the rows, (rows, elements).
        moved: dX, differences of the states that the rows' outputs are read at, (memory, rows, elements).
        changes: dO, differences of those outputs, of the same shape.
        output_coef: B, (rows, rows), lower triangular.
        regularization: > 0, relative to the mean of the diagonal it is added to.
    Returns:
        (rows, elements).
    """
    memory, rows, _ = moved.shape
    gram = torch.einsum("mid,nid->imn", moved, moved).double()[1:]  # state `start` is final, so that e[0] = 0
    coupling = torch.einsum("mkd,njd->kmjn", moved[:, 1:], changes[:, 1:]).double()
    coupling = coupling * output_coef[:-1, 1:].double()[:, None, :, None]
    right = torch.einsum("mkd,kd->km", moved[:, 1:], residual[:-1]).double()
    sides = torch.cat([coupling.flatten(2), right[..., None]], dim=-1)
    sides = torch.linalg.solve(_regularized(gram, regularization), sides).flatten(0, 1)
    matrix = torch.eye(len(sides), device=sides.device, dtype=sides.dtype) - sides[:, :-1]
    weights = torch.linalg.solve_triangular(matrix, sides[:, -1:], upper=False, unitriangular=True)
    outputs = torch.einsum("jn,njd->jd", weights.reshape(rows - 1, memory).to(residual), changes[:, 1:])
    return output_coef[:, 1:] @ outputs


def _regularized(gram: Tensor, regularization: float) -> Tensor:
    """Add a multiple of the mean of the diagonal; rows without any change get the unit matrix."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    shift = torch.where(mean > 0, regularization * mean, 1.0)
    return gram + torch.diag_embed(shift[..., None].expand(gram.shape[:-1]))
