"""How far work is and the time left: a bar in a terminal, a line a minute in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 60.0  # seconds
LAYOUT = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} passed, {remaining} left"


class Lines(tqdm):
    """A line now and then: bars fill a log with their states."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, bar_format=LAYOUT, delay=EVERY, mininterval=EVERY, miniters=1)

    def display(self, *args: Any, **options: Any) -> None:
        """The state as a line."""
        print(self, file=self.fp, flush=True)

    def close(self) -> None:
        """Lines stay."""
        self.disable = True


def progress_bar(
    iterable: Iterable | None = None,
    desc: str = "",
    unit: str = "",
    *,
    total: int | None = None,
    show: bool = True,
    leave: bool = True,
) -> tqdm:
    """What suits the error stream; work of less than a minute says nothing in a log.

    Args:
        iterable: what is gone through; without, say `total` here and call `update`.
        desc: what is done.
        unit: what is counted, in the singular.
        total: how many there are, by default the length of `iterable`.
        show: or nothing at all, as in other processes than the first.
        leave: a bar stays when it is full.
    """
    kind = tqdm if sys.stderr.isatty() else Lines
    return kind(iterable, desc, total, leave, unit=unit, disable=not show)
