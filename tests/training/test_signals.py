"""How a command ends: signals, other processes of its run that are lost, and errors that anyone can cause."""

import os
import signal
import subprocess
import sys
import time

import pytest

from training import signals
from training.arguments import guarded
from training.signals import Interrupted, stop

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def ended(function, capsys) -> tuple[int, list[str]]:
    """Exit code and lines of the error stream of a guarded function."""
    with pytest.raises(SystemExit) as left:
        guarded(function)
    return left.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_breaks_off_what_loses_nothing(signum, code, capsys):
    done = []

    def work():
        stop.kept = lambda: "all is kept"
        signal.raise_signal(signum)
        done.append(1)

    assert ended(work, capsys) == (code, [f"stopped by {signum.name}: all is kept"])
    assert not done


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_waits_for_a_safe_point(signum, code, capsys):
    steps = []

    def work():
        stop.grace = 1e9
        for step in range(5):
            if step == 2:
                signal.raise_signal(signum)
                signal.raise_signal(signal.SIGINT)  # impatience changes nothing
            steps.append(step)
            stop.check()

    assert ended(work, capsys)[0] == code
    assert steps == [0, 1, 2]


def test_work_without_an_end_is_broken_off(capsys):
    def work():
        stop.grace = 0.2
        signal.raise_signal(signal.SIGTERM)
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # which a library may do
                continue

    assert ended(work, capsys)[0] == 143


def test_saving_is_not_broken_off(capsys):
    saved = []

    def work():
        stop.grace = 0.0
        with stop.saving():
            signal.raise_signal(signal.SIGTERM)
            saved.append(1)
        stop.check()
        saved.append(2)

    assert ended(work, capsys)[0] == 143
    assert saved == [1]


def test_an_error_after_a_signal_is_a_consequence_of_it(capsys):
    def work():
        stop.grace = 1e9
        signal.raise_signal(signal.SIGTERM)
        raise ConnectionError("a worker was ended")

    assert ended(work, capsys) == (143, ["stopped by SIGTERM: nothing was begun"])


def test_handlers_are_given_back(capsys):
    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    assert guarded(lambda: 3) == 3
    ended(lambda: signal.raise_signal(signal.SIGTERM), capsys)
    assert [signal.getsignal(signum) for signum in signals.SIGNALS] == before
    assert guarded(stop.check) is None
    stop.ask(signal.SIGTERM)
    with pytest.raises(Interrupted):
        stop.check()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such\n thing"), "error: no such thing"),
        (OSError(28, "No space left on device", "some/file"), "error: some/file: No space left on device"),
    ],
)
def test_what_a_user_can_cause_is_one_line(error, line, capsys):
    def work():
        raise error

    assert ended(work, capsys) == (2, [line])


def test_an_error_of_our_own_is_a_traceback():
    with pytest.raises(KeyError):
        guarded({}.__getitem__, "missing")
    with pytest.raises(RuntimeError, match="ours"):
        guarded(raising, RuntimeError("ours"))


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [RuntimeError("[gloo/pair.cc:1] Connection closed by peer"), None])
def test_a_process_that_does_not_answer_is_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr("training.arguments.PATIENCE", 0.0)
    if error is None:
        error = RuntimeError("process 0 waited in vain")
        error.__cause__ = RuntimeError("[gloo/pair.cc:1] Connection closed by peer")
    assert ended(lambda: raising(error), capsys) == (
        1,
        ["error: another process of this run has ended: nothing was begun"],
    )


def python(text: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own that runs a program."""
    program = "from training.arguments import guarded\nfrom training.signals import stop\n" + text
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


DEADLOCK = """
import ctypes, os, signal, threading, training.signals
training.signals.LAST = 0.1
def work():
    lock = ctypes.create_string_buffer(64)
    library = ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    library.pthread_mutex_lock(lock)
guarded(work)
"""


def test_a_process_that_hangs_in_c_is_ended():
    found = python(DEADLOCK)
    assert (found.returncode, found.stderr) == (143, "stopped by SIGTERM: nothing was begun\n")


def test_only_the_first_process_speaks_of_a_signal():
    found = python(DEADLOCK, LOCAL_RANK="1")
    assert (found.returncode, found.stderr) == (143, "")


CHILD = """
import subprocess, sys, time
def work():
    child = subprocess.Popen([sys.executable, "-c", "import os, time; {act}"])
    stop.children, stop.kept = [child], lambda: "all is kept"
    {then}
guarded(work)
"""


@pytest.mark.parametrize(
    ("act", "code", "line"),
    [
        ("os.kill(os.getpid(), 9)", 1, "error: process 1 of 2 was ended by SIGKILL: all is kept\n"),
        ("os._exit(2)", 2, ""),  # it has said why
    ],
)
@pytest.mark.parametrize("then", ["time.sleep(100)", "return"])
def test_a_lost_process_ends_the_run(act, code, line, then):
    found = python(CHILD.format(act=act, then=then))
    assert (found.returncode, found.stderr) == (code, line)


def test_other_processes_are_ended_with_the_first(tmp_path):
    file, whole = str(tmp_path / "part"), str(tmp_path / "id")
    act = f"open({file!r}, 'w').write(str(os.getpid())); os.replace({file!r}, {whole!r}); time.sleep(100)"
    then = f"import pathlib\n    while not pathlib.Path({str(tmp_path / 'id')!r}).exists(): time.sleep(.01)\n    1 / 0"
    found = python(CHILD.format(act=act, then=then))
    assert "ZeroDivisionError" in found.stderr
    with pytest.raises(ProcessLookupError):
        wait_for_end(int((tmp_path / "id").read_text()))


def wait_for_end(process: int) -> None:
    for _ in range(6000):
        os.kill(process, 0)
        time.sleep(0.01)


ORPHAN = """
import os, subprocess, sys
child = '''
import time
from training.arguments import guarded
def work():
    print("ready", flush=True)
    time.sleep(100)
guarded(work)
'''
command, environment = [sys.executable, "-c", child], os.environ | {"LOCAL_RANK": "1"}
subprocess.Popen(command, env=environment, stdout=subprocess.PIPE).stdout.readline()
"""


def test_a_process_whose_first_process_is_gone_ends():
    found = python(ORPHAN)  # returns when the error stream that both share is closed
    assert found.stderr == "error: the first process of this run has ended: nothing was begun\n"
