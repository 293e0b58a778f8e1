"""JSON that keeps doubles exact and refuses what JSON does not know: NaN, infinity, a field given twice."""

import json
import math
from typing import Any

from solvers.errors import SolverError


def dumps(value: Any) -> str:
    """Text with one field or matrix row per line; floats as Python's repr, which reads back to the same double.

    Raises:
        SolverError: NaN, infinity, or a value that is no JSON type (a tensor, a path).
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SolverError(
            f"the artifact holds a value JSON cannot keep ({error}): use numbers, strings, lists"
        ) from error
    return _text(value, 0) + "\n"


def loads(text: str) -> Any:
    """Inverse of `dumps`.

    Raises:
        SolverError: text that is not JSON, a NaN or infinity in any spelling, a field given twice.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SolverError(f"the artifact is not valid JSON ({error}): export it again") from error


def check_fields(name: str, values: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Raise SolverError unless `values` is an object with the required fields and no others but the optional ones."""
    check_typed(name, values, dict)
    missing = [field for field in required if field not in values]
    extra = [field for field in values if field not in (*required, *optional)]
    if missing or extra:
        parts = [f"misses {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(extra)}"] * bool(extra)
        raise SolverError(f"{name} {' and '.join(parts)}: its fields are {', '.join((*required, *optional))}")


def check_typed(name: str, value: Any, *types: type) -> None:
    """Raise SolverError unless `value` is one of the types."""
    if not isinstance(value, types):
        allowed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise SolverError(f"{name} is {type(value).__name__}: it must be {allowed}")


def check_number(name: str, value: Any) -> float:
    """The value as a double; SolverError for text, true or false, or an integer that is too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SolverError(f"{name} holds {value!r}: it must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise SolverError(
            f"{name} holds an integer beyond the range of a double: every number must be finite"
        ) from error


def _text(value: Any, depth: int) -> str:
    nested = isinstance(value, dict) or (
        isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value)
    )
    if not nested or not value:
        return json.dumps(value)
    pad, end = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(value, dict):
        items = [f"{json.dumps(str(key))}: {_text(item, depth + 1)}" for key, item in value.items()]
        return "{" + pad + ("," + pad).join(items) + end + "}"
    return "[" + pad + ("," + pad).join(_text(item, depth + 1) for item in value) + end + "]"


def _refuse(constant: str) -> float:
    raise SolverError(f"the artifact holds {constant}: every number must be finite; fit the solver again")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SolverError(f"the artifact gives the field {key!r} twice: keep one of them")
        found[key] = value
    return found
