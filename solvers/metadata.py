"""What an artifact says beside its table: types and ranges of everything that is read somewhere."""

from collections.abc import Callable, Mapping
from typing import Any

from solvers.errors import SolverError
from solvers.identity import guidance_range
from solvers.strict_json import check_fields, check_number, check_typed


def check_metadata(values: Mapping[str, Any], num_rows: int) -> None:
    """Check the fields of an artifact but its table, schedule and student.

    Args:
        values: the artifact's fields.
        num_rows: of its table.
    Raises:
        SolverError: a wrong type, a guidance scale that is none, seeds that are no ranges, or timesteps that are not
            one for each row.
    """
    check_typed("method", values["method"], str)
    _check_guidance("guidance_scale", values["guidance_scale"])
    check_typed("thresholding", values["thresholding"], dict, type(None))
    check_fields("denoiser", values["denoiser"], ("name", "weight_hash"))
    for name, value in values["denoiser"].items():
        check_typed(f"denoiser.{name}", value, str, type(None))
    for section in ("fitted_on", "validation", "config"):
        check_typed(section, values[section], dict)
    for section in ("fitted_on", "validation"):
        for name in _KNOWN.keys() & values[section].keys():
            _KNOWN[name](f"{section}.{name}", values[section][name])
    original = values["fitted_on"].get("original_timesteps")
    if original is not None and len(original) != num_rows:
        raise SolverError(f"fitted_on.original_timesteps has {len(original)} numbers, the table {num_rows} rows")
    check_fields("created", values["created"], ("time", "git_commit", "versions"))
    check_typed("created.time", values["created"]["time"], str)
    check_typed("created.git_commit", values["created"]["git_commit"], str, type(None))
    check_typed("created.versions", values["created"]["versions"], dict)


def _check_guidance(name: str, value: Any) -> None:
    for end in value if isinstance(value, list) else [value]:
        check_number(name, end)
    guidance_range(value)


def _check_seeds(name: str, seeds: Any) -> None:
    check_typed(name, seeds, list)
    for pair in seeds:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not whole or not 0 <= pair[0] < pair[1]:
            raise SolverError(f"{name} holds {pair}: give half-open ranges [start, stop] with start < stop")


def _check_numbers(name: str, values: Any) -> None:
    check_typed(name, values, list)
    for value in values:
        check_number(name, value)


def _check_counts(name: str, values: Any) -> None:
    check_typed(name, values, dict)
    for part, value in values.items():
        check_number(f"{name}.{part}", value)


_KNOWN: dict[str, Callable[[str, Any], Any]] = {
    "seeds": _check_seeds,
    "guidance_scale": _check_guidance,
    "original_timesteps": _check_numbers,
    "evaluations": _check_counts,
    "seconds": check_number,
    "rmse": check_number,
}
