"""How long a fit has taken, over interruptions."""

import time


class Clock:
    """Seconds since `start`, and those before it.

    Args:
        before: seconds of earlier processes.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self.start()

    def start(self) -> None:
        """The work begins, or goes on."""
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + time.perf_counter() - self._since
