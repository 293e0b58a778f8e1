"""From the shell: two processes that are killed at once, and started again, end as two that were not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.interruptions import Job, prepare

DDP = ["--trainer.strategy=ddp", "--trainer.devices=2"]
SHARDED = [
    "--trainer.strategy.class_path=training.sharded.Sharded",
    "--trainer.strategy.init_args.process_group_backend=gloo",
    "--trainer.devices=2",
]
CASES = {
    "base, ddp": ("base", [*DDP, "--trainer.max_steps=40"]),
    "slam, sharded": ("slam", [*SHARDED, "--trainer.max_steps=20"]),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A model and its trajectories."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder)
    return folder


def start(job: Job, *options: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *job.arguments(), *options]
    log = open(job.folder.with_suffix(".log"), "w")  # noqa: SIM115
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_are_killed_go_on(tmp_path, prepared, name):
    kind, options = CASES[name]
    whole, broken = (Job(kind, tmp_path / which, prepared) for which in ("whole", "broken"))
    undisturbed = start(whole, *options)
    assert undisturbed.wait(600) == 0, whole.folder.with_suffix(".log").read_text()
    process = start(broken, *options)
    while process.poll() is None and not (broken.folder / "last.ckpt").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert broken.result() != whole.result()
    assert start(broken, *options, *broken.resume()).wait(600) == 0, broken.folder.with_suffix(".log").read_text()
    assert broken.result() == whole.result()
