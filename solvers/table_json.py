"""A solver table as JSON types and back."""

from typing import Any

import torch
from torch import Tensor

from solvers.calls import Call
from solvers.errors import SolverError
from solvers.space import Bands, Plain
from solvers.strict_json import check_fields, check_number, check_typed
from solvers.table import SolverTable

TENSORS = ("timesteps", "alpha", "sigma", "state_coef", "output_coef", "noise_coef")
SUPPORTS = ("state_support", "output_support")


def table_to_dict(table: SolverTable) -> dict[str, Any]:
    """JSON types only, doubles exact; calls, space and supports appear only where they are not the default."""
    values = {name: getattr(table, name).detach().tolist() for name in TENSORS}
    values |= {"start_scale": float(table.start_scale), "prediction_type": table.prediction_type}
    if table.has_own_calls:
        values["calls"] = [[call.row, call.branch] for call in table.calls]
    if isinstance(table.space, Bands):
        values["space"] = {"edges": list(table.space.edges), "channels": table.space.channels}
    for name in SUPPORTS:
        support = getattr(table, name)
        if not torch.equal(support, table.used(name.replace("support", "coef"))):
            values[name] = support.tolist()
    return values


def table_from_dict(values: Any) -> SolverTable:
    """Inverse of `table_to_dict`.

    Raises:
        SolverError: a missing or extra field, a wrong shape or type, or anything SolverTable refuses.
    """
    optional = (*SUPPORTS, "calls", "space")
    check_fields("table", values, (*TENSORS, "start_scale", "prediction_type"), optional=optional)
    space = _space(values["space"]) if "space" in values else Plain()
    depths = {name: 2 + len(space.ops) if name.endswith("coef") else 1 for name in TENSORS}
    fields: dict[str, Any] = {name: _tensor(name, values[name], depth) for name, depth in depths.items()}
    fields |= {name: _tensor(name, values[name], 2, of=bool) for name in SUPPORTS if name in values}
    fields["calls"] = _calls(values["calls"]) if "calls" in values else ()
    start_scale = check_number("table.start_scale", values["start_scale"])
    try:
        return SolverTable(**fields, start_scale=start_scale, prediction_type=values["prediction_type"], space=space)
    except ValueError as error:
        raise SolverError(f"the table is not valid: {error}") from error


def _calls(values: Any) -> tuple[Call, ...]:
    check_typed("table.calls", values, list)
    for call in values:
        fits = isinstance(call, list) and len(call) == 2 and type(call[0]) is int and isinstance(call[1], str)
        if not fits:
            raise SolverError(f"table.calls holds {str(call)[:60]}: a call is [row, branch]")
    return tuple(Call(*call) for call in values)


def _space(values: Any) -> Bands:
    check_fields("table.space", values, ("edges", "channels"))
    check_typed("table.space.edges", values["edges"], list)
    check_typed("table.space.channels", values["channels"], int)
    try:
        edges = tuple(check_number("table.space.edges", edge) for edge in values["edges"])
        return Bands(edges, values["channels"])
    except ValueError as error:
        raise SolverError(f"the table's space is not valid: {error}") from error


def _tensor(name: str, values: Any, depth: int, of: type = float) -> Tensor:
    """A float64 (or bool) tensor from lists nested `depth` deep; its size is checked by SolverTable."""
    numbers: list[Any] = []
    shape = _flatten(name, values, depth, numbers)
    if of is bool:
        if not all(type(number) is bool for number in numbers):
            raise SolverError(f"table.{name} holds a value that is neither true nor false")
        return torch.tensor(numbers, dtype=torch.bool).reshape(shape)
    checked = [check_number(f"table.{name}", number) for number in numbers]
    return torch.tensor(checked, dtype=torch.float64).reshape(shape)


def _flatten(name: str, values: Any, depth: int, numbers: list[Any]) -> tuple[int, ...]:
    """Append the entries of a nested list in order and return its shape."""
    if depth == 0:
        numbers.append(values)
        return ()
    shapes = {_flatten(name, value, depth - 1, numbers) for value in values} if isinstance(values, list) else ()
    if not isinstance(values, list) or len(shapes) > 1:
        raise SolverError(f"table.{name} has a wrong shape: it must be a list of equally long lists of numbers")
    return (len(values), *(shapes.pop() if shapes else (0,) * (depth - 1)))
