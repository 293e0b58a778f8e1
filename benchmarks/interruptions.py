"""Commands that are killed, signalled or lose a process, at random points, and what they may not do then.

A command runs in a fork of this process, which has imported everything. It is interrupted after a random share of the
processor time that it takes undisturbed, so that a busy machine changes nothing but `slow`; then it is run again.

    killed_lost, killed_other    after SIGKILL the command, run again, fails, or ends with another result
    signal_code, signal_lines    SIGTERM or SIGINT: another exit code than 143 or 130; not exactly one line about it
    signal_slow                  obeyed after more than ten seconds
    signal_lost, signal_other    as for SIGKILL, going on as the line says
    rank_code, rank_lines        of two processes one was killed: exit code 0, or not exactly one line about it
    rank_slow                    the other ended after more than a minute
"""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

from benchmarks.journal import Journal
from solvers.files import sha256

ROOT = Path(__file__).resolve().parent.parent
COUNTS = (
    *("killed_lost", "killed_other", "signal_code", "signal_lines", "signal_slow", "signal_lost", "signal_other"),
    *("rank_code", "rank_lines", "rank_slow"),
)
SMALL = {
    "base": "--trainer.max_steps=9 --trainer.callbacks.every_n_train_steps=2 --data.init_args.batch_size=16 "
    "--trainer.limit_val_batches=2 --trainer.val_check_interval=3",
    "slam": "--trainer.max_steps=6 --trainer.callbacks.every_n_train_steps=2 --data.init_args.batch_size=8",
    "olss": "--model.init_args.method.init_args.calls=[2,3]",
    "solver_search": "--model.init_args.method.init_args.nfe=[2,3] --model.init_args.method.init_args.descent.steps=2",
    "timestep_tuner": "--model.init_args.method.init_args.solvers=[ddim:3] "
    "--model.init_args.method.init_args.descent.steps=4 --trainer.callbacks.every_n_train_steps=1 "
    "--data.init_args.batch_size=4",
}
KINDS = (*SMALL, "predict", "compare")
IMPORTED = (
    *("sample", "train", "training.cli", "training.solver_training", "base.module", "slam.module", "data.teacher"),
    *("olss.method", "solver_search.method", "timestep_tuner.method", "evaluation.compare"),
)


@dataclass(frozen=True)
class Job:
    """A command of one kind that writes to a folder.

    Args:
        kind: of `KINDS`.
        folder: its own.
        prepared: see `prepare`.
    """

    kind: str
    folder: Path
    prepared: Path

    def arguments(self) -> list[str]:
        """Of `sample.py` for a comparison, else of `train.py`."""
        folder, model, cache = self.folder, self.prepared / "model", self.prepared / "trajectories"
        if self.kind == "compare":
            numbers = "--reference ddim:4 --num_samples 8 --metrics rmse --bootstrap 0"
            solvers = f"compare --denoiser {model} --solvers ddim:2 unipc:3"
            return f"{solvers} --output {folder} --cache {folder}/cache {numbers}".split()
        if self.kind == "predict":
            return predict(model, folder)
        given = f"fit --config={ROOT}/configs/{self.kind}/digits.yaml {SMALL[self.kind]} "
        given += f"--trainer.callbacks.dirpath={folder} --trainer.default_root_dir={folder} "
        given += f"--model.init_args.output={folder}/out --trainer.enable_progress_bar=false "
        if self.kind == "slam":
            given += f"--model.init_args.teacher={model}"
        elif self.kind != "base":
            given += f"--model.init_args.denoiser={model} --data.init_args.trajectories={cache} "
            given += "--data.init_args.holdout=4"
        return given.split()

    def run(self, *further: str) -> None:
        """The command, in this process."""
        if self.kind == "compare":
            from sample import main
        else:
            from train import main
        main([*self.arguments(), *further])

    def resume(self, line: str | None = None) -> list[str]:
        """What is added to go on: what a line says, or the checkpoint that is there."""
        if line is not None:
            found = re.search(r"--ckpt_path (\S+)", line)
            return ["--ckpt_path", found[1]] if found else []
        path = self.folder / "last.ckpt"
        return ["--ckpt_path", str(path)] if path.exists() else []

    def result(self) -> dict[str, str]:
        """What it has written that may not depend on interruptions, by its name."""
        if self.kind == "compare":
            rows = json.loads((self.folder / "report.json").read_text())
            return {"report.json": re.sub(r'"[a-z_]*(seconds|time)[a-z_]*": [^,}]*', "", json.dumps(rows))}
        if self.kind == "predict":
            return {path.name: sha256(path) for path in sorted(self.folder.glob("*"))}
        found = {str(path): sha256(path) for path in (self.folder / "out").rglob("*.safetensors")}
        tables = {str(path): json.loads(path.read_text()) for path in (self.folder / "out").glob("*.json")}
        found |= {path: json.dumps(values["table"]) for path, values in tables.items() if "table" in values}
        return {str(Path(path).relative_to(self.folder)): value for path, value in sorted(found.items())}


def predict(model: Path, folder: Path) -> list[str]:
    """Arguments that make a few trajectories."""
    given = f"predict --config={ROOT}/configs/trajectories/digits.yaml --trainer.enable_progress_bar=false "
    given += f"--model.init_args.denoiser={model} --model.init_args.folder={folder} --model.init_args.teacher=ddim:5 "
    return (given + "--model.init_args.num_trajectories=12 --model.init_args.shard_size=3").split()


def prepare(folder: Path) -> None:
    """A small model and its trajectories, for all jobs; modules are imported once, before there are forks."""
    for name in IMPORTED:
        importlib.import_module(name)
    job = Job("base", folder / "base", folder)

    def make() -> None:
        from train import main

        job.run()
        shutil.copytree(job.folder / "out", folder / "model")
        main(predict(folder / "model", folder / "trajectories"))

    ended = forked(make, folder / "prepare.log")
    if ended.code:
        raise RuntimeError((folder / "prepare.log").read_text())


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal that killed it), processor time, seconds since the signal,
    and what it printed."""

    code: int
    cpu: float
    obeyed: float
    text: str


def forked(work: Callable[[], object], log: Path, after: float = 0.0, signum: int = 0) -> Ended:
    """Do something in a fork, its output in `log`; after so much processor time it gets a signal."""
    begin = log.with_suffix(".signal")
    begin.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        _work(work, log, begin, after, signum)
    _, status, used = os.wait4(process, 0)
    obeyed = time.time() - begin.stat().st_mtime if begin.exists() else 0.0
    return Ended(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, obeyed, log.read_text())


def _work(work: Callable[[], object], log: Path, begin: Path, after: float, signum: int) -> NoReturn:
    def interrupt(*_: object) -> None:
        begin.touch()
        os.kill(os.getpid(), signum)

    code = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        if after:
            signal.signal(signal.SIGPROF, signal.SIG_DFL if signum == signal.SIGKILL else interrupt)
            signal.setitimer(signal.ITIMER_PROF, after)
        work()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(bool(left.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def kills(
    kind: str,
    trials: int,
    folder: Path,
    prepared: Path,
    seed: int = 0,
    journal: Journal = Journal(),  # noqa: B008
) -> Counter:
    """Broken rules of so many runs that are killed once and run again."""
    trial = _trial(kind, folder, prepared, (signal.SIGKILL,))
    return journal.counts(f"{kind}, killed", _numbered(trial, seed, trials))


def signals(
    kind: str,
    trials: int,
    folder: Path,
    prepared: Path,
    seed: int = 0,
    journal: Journal = Journal(),  # noqa: B008
) -> Counter:
    """Broken rules of so many runs that get a signal and go on as they say."""
    trial = _trial(kind, folder, prepared, (signal.SIGTERM, signal.SIGINT))
    return journal.counts(f"{kind}, signalled", _numbered(trial, seed, trials))


def _numbered(trial: Callable[[int], list[str]], seed: int, trials: int) -> dict[str, Callable[[], list[str]]]:
    return {str(number): partial(trial, number) for number in range(seed, seed + trials)}


def _trial(kind: str, folder: Path, prepared: Path, choice: tuple[signal.Signals, ...]) -> Callable[[int], list[str]]:
    """Number -> broken rules of a run that gets one of the signals, compared with one that gets none."""
    whole = Job(kind, folder / f"{kind}-whole", prepared)

    @cache
    def undisturbed() -> Ended:
        ended = forked(whole.run, folder / f"{kind}.log")
        if ended.code:
            raise RuntimeError(f"{kind} fails by itself: {ended.text}")
        return ended

    def trial(number: int) -> list[str]:
        source = random.Random(f"{kind} {number}")
        signum, after = source.choice(choice), source.uniform(0.02, 1) * undisturbed().cpu
        job = Job(kind, folder / f"{kind}-{number}", prepared)
        ended = forked(job.run, folder / f"{kind}-{number}.log", after, signum)
        rules = _rules_of_end(ended, signum)
        if ended.code:
            rules += _rules_of_going_on(job, whole, None if signum == signal.SIGKILL else _told(ended.text))
        for rule in rules:
            print(f"{kind} {number} ({signum.name} after {after:.2f} s): {rule}", file=sys.stderr)
        if not rules:
            shutil.rmtree(job.folder, ignore_errors=True)
        return rules

    return trial


def _rules_of_going_on(job: Job, whole: Job, line: str | None) -> list[str]:
    """Of the command, run again as its line says, or from its checkpoint after a kill."""
    name = "killed" if line is None else "signal"
    again = forked(partial(job.run, *job.resume(line)), job.folder.with_name(f"{job.folder.name}-again.log"))
    if again.code:
        return [f"{name}_lost"]
    return [f"{name}_other"] * (job.result() != whole.result())


def _rules_of_end(ended: Ended, signum: signal.Signals) -> list[str]:
    if signum == signal.SIGKILL or not ended.obeyed:
        return []
    rules = ["signal_code"] * (ended.code != 128 + signum)
    rules += ["signal_lines"] * (ended.text.count("stopped by") != 1 or "Traceback" in ended.text)
    return rules + ["signal_slow"] * (ended.obeyed > 10)


def _told(text: str) -> str:
    return next((line for line in text.splitlines() if line.startswith("stopped by")), "")


def ranks(
    trials: int,
    folder: Path,
    prepared: Path,
    seed: int = 0,
    journal: Journal = Journal(),  # noqa: B008
) -> Counter:
    """Broken rules of so many runs of two processes of which one is killed."""

    def trial(number: int) -> list[str]:
        source = random.Random(f"ranks {number}")
        kind, victim = source.choice(("base", "predict")), source.choice((0, 1))
        job = Job(kind, folder / f"ranks-{number}", prepared)
        options = "--trainer.strategy=ddp --trainer.devices=2"
        options += " --trainer.max_steps=100000" if kind == "base" else " --model.init_args.num_trajectories=30000"
        rules = _lost_rank([*job.arguments(), *options.split()], job.folder, victim)
        for rule in rules:
            print(f"ranks {number} ({kind}, process {victim}): {rule}", file=sys.stderr)
        return rules

    return journal.counts("runs that lose a process", _numbered(trial, seed, trials))


def _lost_rank(arguments: list[str], folder: Path, victim: int) -> list[str]:
    log = folder.with_suffix(".log")
    with open(log, "w") as file:
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        first = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    _wait(lambda: _is_at_work(folder), 600)
    children = [int(name) for name in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
    others = [child for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(first.pid if victim == 0 else others[0], signal.SIGKILL)
    begin = time.monotonic()
    _wait(lambda: first.poll() is not None and not _group_is_alive(first.pid), 120)
    seconds, text = time.monotonic() - begin, log.read_text()
    if _group_is_alive(first.pid):
        os.killpg(first.pid, signal.SIGKILL)
    rules = ["rank_code"] * (first.poll() in (0, None))
    rules += ["rank_lines"] * (text.count("error: ") != 1 or "Traceback" in text)
    return rules + ["rank_slow"] * (seconds > 60)


def _is_at_work(folder: Path) -> bool:
    return any(folder.glob("*.ckpt")) or any(folder.glob("*.tar"))


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
