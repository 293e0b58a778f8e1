"""JSON that keeps doubles exact and refuses what JSON does not know: NaN, infinity, a field given twice."""

import hashlib
import json
import math
from collections.abc import Mapping
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


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values in their canonical spelling: fields in order, no white space, floats as Python's repr."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def loads(text: str) -> Any:
    """Inverse of `dumps`.

    Raises:
        SolverError: text that is not JSON, a NaN or infinity in any spelling, an integer that no double holds, a field
            given twice.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole, object_pairs_hook=_unique
        )
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
    """The value as a double; SolverError for anything but a number, such as text or true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SolverError(f"{name} holds {value!r}: it must be a number")
    return float(value)


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


def _whole(text: str) -> int:
    if len(text) > 300:
        raise SolverError(f"the artifact holds an integer of {len(text)} digits, beyond the range of a double")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SolverError(f"the artifact gives the field {key!r} twice: keep one of them")
        found[key] = value
    return found
