"""Files appear whole or not at all, and are known by their hash."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = 2**16  # bytes: less than this is a full disk


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

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
def claimed(folder: str | Path) -> Iterator[None]:
    """Write to a folder alone; the claim ends with the process, too.

    Raises:
        ValueError: another process writes to it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another process writes to {folder}: wait for its end, or use another folder") from error
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    return Path(name)


def _refusal(error: Exception, path: Path, temporary: Path | None) -> int | None:
    """The system's reason why a file could not be written; None for what has another cause."""
    if isinstance(error, OSError) and error.errno is not None:
        is_own = temporary is None or error.filename in (None, str(temporary))
        return error.errno if is_own else None
    return errno.ENOSPC if shutil.disk_usage(path.parent).free < FULL else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
