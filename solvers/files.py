"""Files appear whole or not at all, and are known by their hash."""

import errno
import fcntl
import glob
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = 2**16  # bytes: less than this is a full disk


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    What a process left that was killed while it wrote `path` is removed.

    Raises:
        OSError: `path` cannot be written, or the disk is full, whatever the library says that writes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        temporary = _temporary(path)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except Exception as error:
        if reason := _refusal(error, path, temporary):
            raise OSError(reason, os.strerror(reason), str(path)) from error
        raise
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Write to a folder alone, until the block or the process ends; a new one in which nothing is left goes again.

    Args:
        path: the folder, or a file `*.json`, which is claimed by an empty folder beside it.
    Raises:
        ValueError: another process writes to it.
    """
    path = Path(path)
    is_file = path.suffix == ".json"
    folder = path.with_name(f".{path.name}.claim") if is_file else path
    is_new = is_file or not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, path)
        yield
    finally:
        if is_new:
            with suppress(OSError):
                os.rmdir(folder)
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process writes to {path}: wait for its end, or use another folder") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(path: Path) -> Path:
    _sweep(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_prefix(path)}{os.getpid()}.", suffix=path.suffix)
    os.close(handle)
    return Path(name)


def _refusal(error: Exception, path: Path, temporary: Path | None) -> int | None:
    """The system's reason why a file could not be written; None for what has another cause."""
    if isinstance(error, OSError) and error.errno is not None:
        is_own = temporary is None or error.filename in (None, str(temporary))
        return error.errno if is_own else None
    return errno.ENOSPC if shutil.disk_usage(path.parent).free < FULL else None


def _prefix(path: Path) -> str:
    """How names of partial files begin, before the process that writes them: by this machine's processes alone."""
    return f".{path.name}.{platform.node()[:40]}."


def _sweep(path: Path) -> None:
    """Remove partial files of processes that are gone."""
    prefix = _prefix(path)
    for partial in path.parent.glob(f"{glob.escape(prefix)}*"):
        process = partial.name.removeprefix(prefix).partition(".")[0]
        if process.isdigit() and not _runs(int(process)):
            partial.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
