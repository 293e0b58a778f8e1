"""Signals: what runs gets a few seconds to reach a safe point, then the command ends with one line.

After SIGUSR1, which a cluster sends in good time, it gets as long as it takes.

The handler notes a signal, or breaks the main thread's work off with `Interrupted`. Python's handlers wait for the end
of a call into C, which may never come, so a thread watches: it ends the process where nothing else does, and where
another process of the same run was lost.
"""

import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 4.0  # seconds for work that has safe points to reach one
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # of torchrun, of a process that Lightning starts, of srun
LAST = 4.0  # seconds after those until the process is ended from outside its main thread


class Interrupted(BaseException):
    """A signal ends the command; no `except Exception` on its way stops it."""


class Stop:
    """Whether a command was asked to end, and what it says when it does.

    Attributes:
        asked: the signal; None before.
        grace: seconds from a signal until work is broken off where it is; 0 for work that loses nothing by it.
        kept: says what is saved and how to go on.
        again: called last by the first process; may start the command again, and says so.
        children: other processes of the run that this one has started.
        is_leaving: nothing more is broken off.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.grace = 0.0
        self.kept: Callable[[], str] = lambda: "nothing was begun"
        self.again: Callable[[], str] = lambda: ""
        self.children: Sequence[Popen] = ()
        self._since = 0.0
        self.is_leaving = self._is_saving = False
        self._parent = os.getppid()

    def ask(self, signum: int) -> None:
        """A signal; the first counts. All processes of the run get it."""
        if self.asked is None:
            self._since, self.asked = time.monotonic(), signal.Signals(signum)
            self.end_children(signum)

    def check(self) -> None:
        """A safe point: nothing is lost here."""
        if self.asked is not None:
            self.is_leaving = True
            raise Interrupted

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save what was done, however long it takes."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def take_signals(self) -> None:
        """Handle them, whoever did so before; for the main thread."""
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def line(self) -> str:
        """What is said of the signal; said once."""
        return f"stopped by {self.asked.name if self.asked else 'nobody'}: {self.kept()}{self.again()}"

    @property
    def patience(self) -> float:
        """Seconds from the signal until work is broken off."""
        return math.inf if self.grace and self.asked == signal.SIGUSR1 else self.grace

    def exit_code(self) -> int:
        """As a shell has it for a process that a signal ends."""
        return 128 + (self.asked or 0)

    def lost(self) -> tuple[int, str] | None:
        """Where another process of the run has failed: an exit code, and a line if that one could say none."""
        for rank, child in enumerate(self.children, 1):
            code = child.poll() or 0
            if code > 0:
                return code, ""
            if code < 0:
                ended = f"process {rank} of {len(self.children) + 1} was ended by {signal.Signals(-code).name}"
                return 1, f"{ended}: {self.kept()}"
        if int(os.environ.get("LOCAL_RANK", "0")) and os.getppid() != self._parent:
            return 1, f"the first process of this run has ended: {self.kept()}"
        return None

    def end_children(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to the other processes of the run."""
        for child in self.children:
            child.send_signal(signum)  # nothing for one that has ended

    def watch(self, bell: socket.socket) -> None:
        """Until the bell's other end is closed: break the main thread's work off in time, or end the process."""
        while True:
            if select.select([bell], [], [], 0.5)[0]:
                rung = bell.recv(64)  # the numbers of the signals
                if not rung:
                    return
                for signum in set(rung) & set(SIGNALS):
                    self.ask(signum)
            waited = time.monotonic() - self._since
            if self.asked is None:
                self._end_if_lost()
            elif waited >= self.patience + LAST and not self._is_saving:
                self._end(self.exit_code(), self.line() if is_first_process() else "")
            elif waited >= self.patience and not self.is_leaving:
                signal.pthread_kill(threading.main_thread().ident or 0, self.asked)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.ask(signum)
        if time.monotonic() - self._since >= self.patience and not (self._is_saving or self.is_leaving):
            self.check()

    def _end_if_lost(self) -> None:
        if found := self.lost():
            code, line = found
            self._end(code, line and f"error: {line}")

    def _end(self, code: int, line: str) -> NoReturn:
        if line:
            print(line, file=sys.stderr, flush=True)
        self.end_children()
        os._exit(code)


stop = Stop()  # of this process, as signals are


@contextmanager
def obeyed() -> Iterator[None]:
    """Obey signals, in the main thread of a process; inside another such block nothing changes."""
    if threading.current_thread() is not threading.main_thread() or _is_obeyed():
        yield
        return
    vars(stop).update(vars(Stop()))
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    bell, button = socket.socketpair()
    button.setblocking(False)
    watcher = threading.Thread(target=stop.watch, args=(bell,), daemon=True)
    wakeup = signal.set_wakeup_fd(button.fileno(), warn_on_full_buffer=False)
    watcher.start()
    stop.take_signals()
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        button.close()
        watcher.join()
        bell.close()


def _is_obeyed() -> bool:
    return any(signal.getsignal(signum) == stop._handle for signum in SIGNALS)


def _leave_to_parent() -> None:
    """In a worker that was forked: Ctrl-C reaches it too, but its parent says when it ends."""
    if _is_obeyed():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)


def is_first_process() -> bool:
    """Whether this is the process of a run that speaks to the user."""
    return int(next((os.environ[name] for name in RANKS if name in os.environ), "0")) == 0
