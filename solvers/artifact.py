"""The artifact: one JSON file per solver, checked strictly and never repaired. See docs/artifact.md."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from solvers import strict_json
from solvers.errors import SolverError
from solvers.files import atomic_write, sha256
from solvers.identity import DenoiserIdentity, guidance_range, identify
from solvers.provenance import provenance
from solvers.schedule import NoiseSchedule
from solvers.strict_json import check_fields, check_number, check_typed
from solvers.table import SolverTable
from solvers.table_json import TENSORS, table_from_dict, table_to_dict

__all__ = [
    "TENSORS",
    "check_fit",
    "load_solver",
    "made_for",
    "save_solver",
    "student_path",
    "table_from_dict",
    "table_to_dict",
]

FORMAT_VERSION = 1
FIELDS = (
    "format_version",
    "method",
    "table",
    "schedule",
    "guidance_scale",
    "thresholding",
    "denoiser",
    "fitted_on",
    "validation",
    "config",
    "student",
    "created",
)


def save_solver(
    table: SolverTable,
    path: str | Path,
    denoiser: DenoiserIdentity,
    *,
    method: str,
    fitted_on: Mapping[str, Any] | None = None,
    validation: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    student: str | Path | None = None,
) -> Path:
    """Write a table and where it came from as one JSON file, atomically.

    Args:
        table: the solver; gradients are dropped, doubles are kept bit for bit.
        path: the file to write, `*.json`.
        denoiser: what it was made for, `identify(denoiser)`; without a weight hash it is bound to no network.
        method: what made the table (`olss`, `solver_search`, `timestep_tuner`, `slam`, `tabulate`, ...).
        fitted_on: teacher solver, samples, and `seeds` as half-open ranges [[start, stop], ...].
        validation: figures measured on unseen seeds.
        config: the resolved configuration.
        student: weights of a distilled student, a file inside the artifact's folder; stored with its hash.
    Returns:
        The path written.
    Raises:
        SolverError: anything `load_solver` would refuse.
    """
    path = Path(path)
    text = strict_json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "method": method,
            "table": table_to_dict(table),
            "schedule": denoiser.schedule.to_dict() | {"fingerprint": denoiser.schedule.fingerprint()},
            "guidance_scale": denoiser.guidance_scale,
            "thresholding": denoiser.thresholding,
            "denoiser": {"name": denoiser.name, "weight_hash": denoiser.weight_hash},
            "fitted_on": dict(fitted_on or {}),
            "validation": dict(validation or {}),
            "config": dict(config or {}),
            "student": None if student is None else _student_entry(path.parent, student),
            "created": provenance(),
        }
    )
    _parse(text, path.parent)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def load_solver(
    path: str | Path, denoiser: Any = None, guidance_scale: float | None = None, allow_mismatch: bool = False
) -> SolverTable:
    """Read an artifact and check it, and that it fits a denoiser when one is given.

    Args:
        path: a JSON file written by `save_solver`.
        denoiser: what it will be used with, see `identify`; None skips the check.
        guidance_scale: the scale it will be used at; by default the denoiser's.
        allow_mismatch: accept a denoiser or a guidance scale the solver was not made for.
    Returns:
        The table, its metadata in `table.info` (the file's fields but the table, and `path`).
    Raises:
        SolverError: a missing file, an unknown version, a missing or extra field, a wrong shape or type, a number
            that is not finite, a path that leaves the folder, a hash that differs, a denoiser that does not fit.
    """
    path = Path(path)
    try:
        table = _parse(_read(path), path.parent)
    except SolverError as error:
        raise SolverError(f"{path}: {error}") from error
    table = replace(table, info={**table.info, "path": str(path)})
    if not allow_mismatch and (denoiser is not None or guidance_scale is not None):
        check_fit(table, denoiser, guidance_scale)
    return table


def check_fit(table: SolverTable, denoiser: Any = None, guidance_scale: float | None = None) -> None:
    """Raise SolverError unless the loaded `table` was made for this denoiser and guidance scale."""
    wanted = made_for(table)
    stated = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    found = replace(wanted, **stated) if denoiser is None else identify(denoiser, **stated)
    if reasons := wanted.differences(found):
        raise SolverError(
            f"{table.info.get('path', 'this solver')} does not fit: {'; '.join(reasons)}. "
            "Use a solver made for this model and scale, or pass allow_mismatch=True to use it all the same"
        )


def made_for(table: SolverTable) -> DenoiserIdentity:
    """The denoiser that the artifact of a loaded `table` was made for."""
    schedule, settings = table.info["schedule"], {name: table.info[name] for name in ("guidance_scale", "thresholding")}
    return DenoiserIdentity(NoiseSchedule.from_dict(schedule), **settings, **table.info["denoiser"])


def student_path(table: SolverTable) -> Path | None:
    """The weights of a loaded artifact's student, or None where it has none."""
    student = table.info.get("student")
    return None if student is None else Path(table.info["path"]).parent / student["path"]


def _read(path: Path) -> str:
    if path.is_dir():
        found = ", ".join(sorted(file.name for file in path.glob("*.json"))) or "none"
        raise SolverError(f"this is a folder: name the solver's .json file (found inside: {found})")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SolverError("there is no such file: check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SolverError(f"the file cannot be read as text ({error}): a solver artifact is UTF-8 JSON") from error


def _parse(text: str, folder: Path) -> SolverTable:
    """The table of an artifact's text, its other fields in `info`; raises SolverError."""
    values = strict_json.loads(text)
    if isinstance(values, dict) and values.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise SolverError(
            f"format_version is {values['format_version']!r}, this code reads {FORMAT_VERSION}: "
            "update the code, or export the solver again"
        )
    check_fields("the artifact", values, FIELDS)
    table = table_from_dict(values["table"])
    _check_schedule(values["schedule"], table.prediction_type)
    _check_metadata(values)
    if values["student"] is not None:
        _check_student(values["student"], folder)
    return replace(table, info={name: values[name] for name in FIELDS if name != "table"})


def _check_schedule(values: Any, prediction_type: str) -> None:
    check_fields("schedule", values, ("kind", "prediction_type", "parameters", "fingerprint"))
    try:
        schedule = NoiseSchedule.from_dict(values)
        fingerprint = schedule.fingerprint()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise SolverError(f"schedule is not valid ({error}): export the solver again") from error
    if fingerprint != values["fingerprint"]:
        raise SolverError(
            f"schedule has fingerprint {values['fingerprint']!r}, but its parameters give {fingerprint!r}: "
            "one of them was edited; export the solver again"
        )
    if schedule.prediction_type != prediction_type:
        raise SolverError(
            f"the table expects {prediction_type} outputs and the schedule's network gives {schedule.prediction_type}: "
            "they must agree"
        )


def _check_metadata(values: Mapping[str, Any]) -> None:
    check_typed("method", values["method"], str)
    _check_guidance(values["guidance_scale"])
    check_typed("thresholding", values["thresholding"], dict, type(None))
    check_fields("denoiser", values["denoiser"], ("name", "weight_hash"))
    for name, value in values["denoiser"].items():
        check_typed(f"denoiser.{name}", value, str, type(None))
    for name in ("fitted_on", "validation", "config"):
        check_typed(name, values[name], dict)
    _check_seeds(values["fitted_on"].get("seeds", []))
    check_fields("created", values["created"], ("time", "git_commit", "versions"))
    check_typed("created.time", values["created"]["time"], str)
    check_typed("created.git_commit", values["created"]["git_commit"], str, type(None))
    check_typed("created.versions", values["created"]["versions"], dict)


def _check_guidance(value: Any) -> None:
    for end in value if isinstance(value, list) else [value]:
        check_number("guidance_scale", end)
    guidance_range(value)


def _check_seeds(seeds: Any) -> None:
    check_typed("fitted_on.seeds", seeds, list)
    for pair in seeds:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not whole or not 0 <= pair[0] < pair[1]:
            raise SolverError(f"fitted_on.seeds holds {pair}: give half-open ranges [start, stop] with start < stop")


def _check_student(student: Any, folder: Path) -> None:
    check_fields("student", student, ("path", "sha256"))
    file = _inside(folder, student["path"])
    if not file.is_file():
        raise SolverError(f"the student's weights {student['path']} are missing: copy them beside the artifact")
    found = sha256(file)
    if found != student["sha256"]:
        raise SolverError(
            f"the student's weights {student['path']} have sha256 {found}, the artifact names {student['sha256']}: "
            "copy the weights that belong to it"
        )


def _student_entry(folder: Path, student: str | Path) -> dict[str, str]:
    student = Path(student)
    file = (student if student.is_absolute() else folder / student).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise SolverError(f"the student's weights {student} lie outside {folder}: put them into the artifact's folder")
    if not file.is_file():
        raise SolverError(f"the student's weights {file} are missing: save them before the artifact")
    return {"path": file.relative_to(folder.resolve()).as_posix(), "sha256": sha256(file)}


def _inside(folder: Path, name: Any) -> Path:
    """A file of the artifact's own folder; absolute paths, `..` and links that lead out are refused."""
    check_typed("student.path", name, str)
    plain = PurePosixPath(name)
    file = folder / plain
    leaves = plain.is_absolute() or ".." in plain.parts or "\\" in name or "\0" in name or ":" in name
    if leaves or not file.resolve().is_relative_to(folder.resolve()):
        raise SolverError(f"student.path {name!r} leaves the artifact's folder: use a relative path inside it")
    return file
