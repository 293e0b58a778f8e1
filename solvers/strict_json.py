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
