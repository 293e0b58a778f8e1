"""The artifact: one JSON file per solver, checked strictly and never repaired. See docs/artifact.md."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from solvers import strict_json
from solvers.errors import SolverError, short_path
from solvers.files import atomic_write
from solvers.identity import DenoiserIdentity, identify, lifted_checks, own_guidance
from solvers.metadata import check_metadata
from solvers.provenance import provenance
from solvers.schedule import NoiseSchedule
from solvers.strict_json import check_fields, checksum
from solvers.student import check_student, student_entry
from solvers.table import SolverTable
from solvers.table_json import TENSORS, table_from_dict, table_to_dict

__all__ = [
    "TENSORS",
    "check_fit",
    "load_folder",
    "load_solver",
    "made_for",
    "save_solver",
    "student_path",
    "table_from_dict",
    "table_to_dict",
]

FORMAT_VERSION = 2
UNSEALED = 1  # the format of artifacts without a checksum
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
        student: weights of a distilled student, a file of a folder inside the artifact's; stored with the hash of that
            whole folder.
    Returns:
        The path written.
    Raises:
        SolverError: anything `load_solver` would refuse.
    """
    path = Path(path)
    values = {
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
        "student": None if student is None else student_entry(path.parent, student),
        "created": provenance(),
    }
    values = strict_json.loads(strict_json.dumps(values))  # as they will be read: tuples are lists, keys are text
    text = strict_json.dumps(values | {"checksum": checksum(values)})
    _parse(text, path.parent)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def load_solver(
    path: str | Path,
    denoiser: Any = None,
    guidance_scale: float | None = None,
    allow_mismatch: str | Sequence[str] = (),
) -> SolverTable:
    """Read an artifact and check it, and that it fits a denoiser when one is given.

    Args:
        path: a JSON file written by `save_solver`.
        denoiser: what it will be used with, see `identify`; None skips the check.
        guidance_scale: the scale it will be used at; by default the denoiser's.
        allow_mismatch: names of the checks to leave out, of `solvers.identity.CHECKS`.
    Returns:
        The table, its metadata in `table.info` (the file's fields but the table, and `path`).
    Raises:
        SolverError: a missing file, an unknown version, a missing or extra field, a wrong shape or type, a number
            that is not finite, a path that leaves the folder, a hash that differs, a denoiser that does not fit; one
            line of at most 300 characters.
    """
    path = Path(path)
    try:
        table = _parse(_read(path), path.parent)
    except (SolverError, OSError, RecursionError) as error:  # OSError: a path that the system refuses
        raise SolverError(f"{short_path(path)}: {error}") from error
    table = replace(table, info={**table.info, "path": str(path)})
    if denoiser is not None or guidance_scale is not None:
        check_fit(table, denoiser, guidance_scale, allow_mismatch)
    return table


def load_folder(folder: str | Path) -> dict[str, SolverTable]:
    """The artifacts of a folder by file name; raises SolverError where there is none or one is not valid."""
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*.json") if path.name != "config.json")  # a student's own
    tables = {path.name: load_solver(path) for path in paths}
    if not tables:
        raise SolverError(f"{short_path(folder)} holds no solver artifact (*.json): export one there first")
    return tables


def check_fit(
    table: SolverTable,
    denoiser: Any = None,
    guidance_scale: float | None = None,
    allow_mismatch: str | Sequence[str] = (),
) -> None:
    """Raise SolverError unless the loaded `table` was made for this denoiser and guidance scale; see `load_solver`."""
    wanted = made_for(table)
    stated = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if not stated and table.has_branches and own_guidance(denoiser) == 1:
        stated = {"guidance_scale": wanted.guidance_scale}  # guidance is in the table: the network itself fits too
    found = replace(wanted, **stated) if denoiser is None else identify(denoiser, **stated)
    if reasons := wanted.differences(found, lifted_checks(allow_mismatch)):
        raise SolverError(
            f"{short_path(table.info.get('path', 'this solver'))} does not fit: {'; '.join(reasons)}. "
            "Use one made for this model and scale, or allow_mismatch=<name of the check>"
        )


def made_for(table: SolverTable) -> DenoiserIdentity:
    """The denoiser that the artifact of a loaded `table` was made for, with the guidance of the images it makes."""
    schedule, settings = table.info["schedule"], {name: table.info[name] for name in ("guidance_scale", "thresholding")}
    return DenoiserIdentity(NoiseSchedule.from_dict(schedule), **settings, **table.info["denoiser"])


def student_path(table: SolverTable) -> Path | None:
    """The weights of a loaded artifact's student, or None where it has none."""
    student = table.info.get("student")
    return None if student is None else Path(table.info["path"]).parent / student["path"]


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            found = ", ".join(sorted(file.name for file in path.glob("*.json"))) or "none"
            raise SolverError(f"this is a folder: name the solver's .json file (found inside: {found})")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SolverError("there is no such file: check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SolverError(f"the file cannot be read as text ({error}): a solver artifact is UTF-8 JSON") from error


def _parse(text: str, folder: Path) -> SolverTable:
    """The table of an artifact's text, its other fields in `info`; raises SolverError."""
    values = strict_json.loads(text)
    version = values.get("format_version") if isinstance(values, dict) else FORMAT_VERSION
    if type(version) is not int or version not in (UNSEALED, FORMAT_VERSION):
        raise SolverError(
            f"format_version is {version!r}, this code reads {UNSEALED} and {FORMAT_VERSION}: "
            "update the code, or export the solver again"
        )
    check_fields("the artifact", values, FIELDS if version == UNSEALED else (*FIELDS, "checksum"))
    table = table_from_dict(values["table"])
    _check_schedule(values["schedule"], table.prediction_type)
    check_metadata(values, table.num_rows)
    if values["student"] is not None:
        check_student(values["student"], folder, whole=version != UNSEALED)
    if version == UNSEALED:
        _accept_unsealed(values)
    else:
        _check_sum(values)
    return replace(table, info={name: values[name] for name in FIELDS if name != "table"})


def _accept_unsealed(values: Mapping[str, Any]) -> None:
    """What format 1 could not hold is refused; what it cannot show is said."""
    if newer := {"calls", "space"} & values["table"].keys():
        raise SolverError(
            f"format_version is {UNSEALED}, but the table has {', '.join(sorted(newer))}: export it again"
        )
    warnings.warn(  # the same text at the same place: Python shows it once
        f"solver artifacts of format {UNSEALED} have no checksum, so a changed number in them is not noticed",
        stacklevel=1,
    )


def _check_sum(values: Mapping[str, Any]) -> None:
    found = checksum({name: values[name] for name in FIELDS})
    if found != values["checksum"]:
        raise SolverError(
            f"the content has checksum {found[:12]}, the file names {str(values['checksum'])[:12]}: it was edited or "
            "damaged; copy it again, or export the solver again"
        )


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
