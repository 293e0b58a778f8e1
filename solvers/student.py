"""A student beside an artifact: a folder that `load_denoiser` takes, known by the hash of everything in it."""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

from solvers.errors import SolverError
from solvers.files import sha256
from solvers.strict_json import check_fields, check_typed


def student_entry(folder: Path, weights: str | Path) -> dict[str, str]:
    """What an artifact says about a student: `path` of its weights from the artifact's folder, and `sha256`.

    Raises:
        SolverError: weights that are missing, or not in a folder of their own inside the artifact's.
    """
    weights = Path(weights)
    file = (weights if weights.is_absolute() else folder / weights).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise SolverError(f"the student's weights {weights} lie outside {folder}: put them into the artifact's folder")
    if not file.is_file():
        raise SolverError(f"the student's weights {file} are missing: save them before the artifact")
    name = file.relative_to(folder.resolve()).as_posix()
    return {"path": name, "sha256": folder_sha256(_own_folder(folder, name))}


def check_student(student: Any, folder: Path, whole: bool) -> None:
    """Make sure that a student is the one an artifact names.

    Args:
        student: the artifact's entry.
        folder: the artifact's.
        whole: `sha256` is that of the student's whole folder; else, as in artifacts of format 1, of its weights alone.
    Raises:
        SolverError: a path that leaves the folder, files that are missing, or a hash that differs.
    """
    check_fields("student", student, ("path", "sha256"))
    file = _inside(folder, student["path"])
    if not file.is_file():
        raise SolverError(f"the student's weights {student['path']} are missing: copy them beside the artifact")
    found = folder_sha256(_own_folder(folder, student["path"])) if whole else sha256(file)
    if found != student["sha256"]:
        what = "folder of the student's weights" if whole else "student's weights"
        raise SolverError(
            f"the {what} {student['path']} has SHA-256 {found[:12]}, the artifact names {str(student['sha256'])[:12]}: "
            "copy the student that belongs to it"
        )


def student_files(folder: Path, name: str) -> list[Path]:
    """All files of the student whose weights are `name` in an artifact's folder; hidden ones are not read and left out.

    Raises:
        SolverError: one that is a link out of the folder.
    """
    return _files(_own_folder(folder, name))


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's files; raises SolverError as `student_files`."""
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(f"{sha256(file)} {file.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    for path in found:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise SolverError(f"{path} of the student's folder leads out of it: copy the file there")
    return sorted(path for path in found if path.is_file())


def _own_folder(folder: Path, name: str) -> Path:
    first, *rest = PurePosixPath(name).parts
    if not rest:
        raise SolverError(f"the student's weights {name} lie beside the artifact: give them a folder of their own")
    return folder / first


def _inside(folder: Path, name: Any) -> Path:
    """A file of the artifact's own folder; absolute paths, `..` and links that lead out are refused."""
    check_typed("student.path", name, str)
    plain = PurePosixPath(name)
    file = folder / plain
    leaves = plain.is_absolute() or ".." in plain.parts or "\\" in name or "\0" in name or ":" in name
    if leaves or not plain.parts or not file.resolve().is_relative_to(folder.resolve()):
        raise SolverError(f"student.path {name!r} leaves the artifact's folder: use a relative path inside it")
    return file
