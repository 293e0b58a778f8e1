"""How every command line of the project reports what a user can cause: one line, exit code 2, no traceback."""

import sys
from collections.abc import Callable, Collection
from typing import NoReturn


class OneLineErrors:
    """Mixin for jsonargparse parsers: an error is one line without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and leave with exit code 2."""
        fail(" ".join(line.strip() for line in str(message).splitlines() if line.strip()) + " (see --help)")


def fail(message: str) -> NoReturn:
    """Print one error line and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def guarded(function: Callable, *args, **kwargs):
    """Call a function; ValueErrors, which users can cause, end in one line."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        fail(str(error))


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError where an option is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(allowed)}")
