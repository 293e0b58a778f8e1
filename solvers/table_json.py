"""A solver table as JSON types and back, bit for bit."""

from typing import Any

import torch
from torch import Tensor

from solvers.errors import SolverError
from solvers.strict_json import check_fields, check_number
from solvers.table import SolverTable

TENSORS = ("timesteps", "alpha", "sigma", "state_coef", "output_coef", "noise_coef")
SUPPORTS = ("state_support", "output_support")


def table_to_dict(table: SolverTable) -> dict[str, Any]:
    """JSON types only, doubles exact; supports appear only where they differ from coef != 0."""
    values = {name: getattr(table, name).detach().tolist() for name in TENSORS}
    values |= {"start_scale": float(table.start_scale), "prediction_type": table.prediction_type}
    for name in SUPPORTS:
        support = getattr(table, name)
        if not torch.equal(support, getattr(table, name.replace("support", "coef")).detach() != 0):
            values[name] = support.tolist()
    return values


def table_from_dict(values: Any) -> SolverTable:
    """Inverse of `table_to_dict`.

    Raises:
        SolverError: a missing or extra field, a wrong shape or type, or anything SolverTable refuses.
    """
    check_fields("table", values, (*TENSORS, "start_scale", "prediction_type"), optional=SUPPORTS)
    tensors: dict[str, Any] = {name: _tensor(name, values[name], name.endswith("coef")) for name in TENSORS}
    tensors |= {name: _tensor(name, values[name], matrix=True, of=bool) for name in SUPPORTS if name in values}
    start_scale = check_number("table.start_scale", values["start_scale"])
    try:
        return SolverTable(**tensors, start_scale=start_scale, prediction_type=values["prediction_type"])
    except ValueError as error:
        raise SolverError(f"the table is not valid: {error}") from error


def _tensor(name: str, values: Any, matrix: bool, of: type = float) -> Tensor:
    """A float64 (or bool) vector or matrix from nested lists; its size is checked by SolverTable."""
    shape = "a list of equally long lists" if matrix else "a list"
    rows = values if matrix else [values]
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise SolverError(f"table.{name} has a wrong shape: it must be {shape} of numbers")
    if of is bool:
        if not all(type(value) is bool for row in rows for value in row):
            raise SolverError(f"table.{name} holds a value that is neither true nor false")
        return torch.tensor(values, dtype=torch.bool)
    numbers = [[check_number(f"table.{name}", value) for value in row] for row in rows]
    return torch.tensor(numbers if matrix else numbers[0], dtype=torch.float64)
