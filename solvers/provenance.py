"""Where an artifact came from: time, commit, library versions."""

import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

LIBRARIES = ("torch", "diffusers", "lightning", "numpy")


def provenance() -> dict[str, Any]:
    """Time (UTC), commit and library versions: what made an artifact."""
    versions = {"python": python_version()} | {name: _version(name) for name in LIBRARIES}
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": _commit(), "versions": versions}


def _version(name: str) -> str | None:
    """From the installed metadata: importing the library could take seconds."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """Commit of this code at first use, with `-dirty` after local changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
