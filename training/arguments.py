"""How every command ends: what a user can cause, a signal or a lost process is one line and an exit code."""

import sys
import time
from collections.abc import Callable, Collection
from signal import SIGUSR1
from typing import NoReturn

from training.signals import is_first_process, obeyed, stop

PATIENCE = 3.0  # seconds in which the first process of a run says what all of them have to say


class OneLineErrors:
    """Mixin for jsonargparse parsers: an error is one line without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and leave with exit code 2."""
        fail(" ".join(line.strip() for line in str(message).splitlines() if line.strip()) + " (see --help)")


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one error line, if there is anything to say, and leave."""
    if message:
        print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def guarded(function: Callable, *args, **kwargs):
    """Call a function; what can happen to every command ends in one line and an exit code, not in a traceback.

    A ValueError or OSError, which users can cause: 2. A signal: 128 and its number, with what `signals.stop` knows to
    be saved. Another process of the run that was lost: 1.
    """
    with obeyed():
        try:
            return _explained(function, *args, **kwargs)
        except BaseException:
            stop.is_leaving = True
            if stop.asked is None:
                raise
            if is_first_process():
                print(stop.line(), file=sys.stderr)
            elif stop.asked == SIGUSR1:
                time.sleep(PATIENCE)  # a process that is gone may end the first, which has the job queued again
            sys.exit(stop.exit_code())
        finally:
            stop.end_children()


def _explained(function: Callable, *args, **kwargs):
    try:
        result = function(*args, **kwargs)
        _wait_for_children()
    except (ValueError, OSError, RuntimeError) as error:
        stop.check()
        if not isinstance(error, RuntimeError):
            _let_the_first_speak()
            fail(_told(error))
        if _is_of_group(error):
            time.sleep(PATIENCE)  # in which who knows which process ended says so
            fail(f"another process of this run has ended: {stop.kept()}", code=1)
        raise
    stop.check()
    return result


def _wait_for_children() -> None:
    for child in stop.children:
        child.wait()
    if found := stop.lost():
        fail(found[1], found[0])


def _let_the_first_speak() -> None:
    """Mistakes are the same in all processes; this one is ended while it waits, if the first has failed too."""
    if not is_first_process():
        time.sleep(PATIENCE)


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _is_of_group(error: BaseException) -> bool:
    """Whether it says that another process does not answer."""
    chain = (error, error.__cause__)
    return any(type(one).__name__.startswith("Dist") or "gloo" in str(one) for one in chain)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError where an option is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(allowed)}")
