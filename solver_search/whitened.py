"""Coordinates in which the weights of a table are well conditioned."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.shards import Trajectories
from solver_search.objective import Objective
from solver_search.parameters import FreeParameters
from solvers import sample_trace
from solvers.sampler import Trace

SMALLEST = 1e-4  # singular values of a row's columns below this, relative to the largest, count as it
UNIT = 0.05  # root mean square by which a unit moves a state
TOLD = 0.05  # shares of a timestep's spacing by which a unit moves it


def whitened(parameters: FreeParameters, objective: Objective, teacher: Any) -> FreeParameters:
    """The same numbers in other coordinates: a unit of a weight moves a channel of its row's state by an RMS of .05.

    Start noise and early outputs are nearly the same vector, so that single weights are badly conditioned: a method of
    first order creeps, or needs a learning rate of its own for every table. With the columns X of a row, in each band,

        weights = start + .05 (mean of X X^T)^(-1/2) theta

    Args:
        parameters: around a start.
        objective: runs the start, and averages over all processes.
        teacher: the samples to run it on.
    """
    table, rows = parameters.start, parameters.moving_rows

    def moments(part: Trajectories) -> Tensor:
        trace = sample_trace(objective.denoiser, table, part.noise, part.condition)
        objective.evaluations.forward += len(part) * table.nfe
        return torch.cat([_moments(parameters, trace, row).flatten() for row in rows])

    with torch.no_grad():
        found = objective.mean(teacher, moments)
    basis = torch.diag(torch.full((parameters.size,), TOLD, dtype=torch.float64))
    places = [parameters.places(row) for row in rows]
    sizes = [place.shape[0] * place.shape[2] ** 2 for place in places]
    for place, matrix in zip(places, found.split(sizes)):
        roots = UNIT * _inverse_root(matrix.reshape(-1, place.shape[2], place.shape[2]))
        basis[place[..., :, None], place[..., None, :]] = roots[:, None].expand(-1, place.shape[1], -1, -1)
    units = parameters.units.clamp_min(torch.finfo(torch.float64).tiny)
    return replace(parameters, basis=basis / units[:, None])


def _moments(parameters: FreeParameters, trace: Trace, row: int) -> Tensor:
    """Mean of X X^T over the elements of a sample's channel, (bands, columns * C, columns * C)."""
    states, outputs = parameters.columns(row)
    columns = [*(trace.states[j] for j in states), *(trace.outputs[k] for k in outputs)]
    bound = parameters.start.space.bind(columns[0].shape[1:], columns[0].device)
    split = zip(
        *(
            bound.isometric(bound.split(column.to(torch.promote_types(column.dtype, torch.float32))))
            for column in columns
        )
    )
    channels = parameters.channels
    elements = columns[0].numel() / channels
    stacked = [
        torch.cat([band.double().reshape(len(band), channels, -1).transpose(0, 1).flatten(1) for band in bands])
        for bands in split
    ]
    return torch.stack([matrix @ matrix.T for matrix in stacked]) / elements


def _inverse_root(matrix: Tensor) -> Tensor:
    """matrix^(-1/2) of symmetric ones."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(values[..., -1:] * SMALLEST**2)
    return vectors @ torch.diag_embed(values.rsqrt()) @ vectors.transpose(-1, -2)
