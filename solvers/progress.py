"""How far work is and the time left: a bar in a terminal, a line a minute in a log."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 60.0  # seconds
LAYOUT = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} passed, {remaining} left"
ENDLESS = "{desc}: {n_fmt} {unit}s, {elapsed} passed"  # where nobody knows how many there are


class Lines(tqdm):
    """A line now and then: bars fill a log with their states. Many short ones in a row share the minute."""

    spoken = time.monotonic()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, mininterval=0, miniters=1, smoothing=0)
        self.bar_format = LAYOUT if self.total is not None else ENDLESS

    def display(self, *args: Any, **options: Any) -> None:
        """The state as a line, where a minute has passed since the last one of any work."""
        if self.n and time.monotonic() - Lines.spoken >= EVERY:
            print(self, file=self.fp, flush=True)
            Lines.spoken = time.monotonic()

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
    """What suits the error stream; lines in a log are at least a minute apart, so short work alone says nothing.

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
