"""Jobs of a cluster: stopped by its signals and started again, they go on by themselves and end as one that was not."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from base.module import BaseModel
from tests.training.test_cli import fit
from tests.training.test_safe_points import interrupted, signalled
from train import main
from training import jobs, safe_points
from training.checkpoints import CheckedCheckpoints
from training.signals import stop

TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.max_steps", "4"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def task_of_two(task: int, restarts: int = 0, port: str = "0") -> dict[str, str]:
    several = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    of_task = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "MASTER_PORT": port}
    return several | of_task | {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "fit", "SLURM_RESTART_COUNT": str(restarts)}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Environment of a task, by its number and the restarts; what is asked of scontrol is in tmp_path/asked."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    here = {"MASTER_ADDR": "127.0.0.1", "STEPS": str(tmp_path / "steps")}
    return lambda *which: task_of_two(*which) | here


def run_task(arguments: list[str], environment: dict[str, str], signum: int | None) -> None:
    """One of the two processes; it is signalled in its third step, the second process in its second."""
    os.environ.update(environment)
    safe_points.GRACE = 1e9
    steps, training_step = [], BaseModel.training_step

    def step(*args):
        steps.append(1)
        if signum is not None and len(steps) == 3 - int(environment["SLURM_PROCID"]):
            signal.raise_signal(signum)
        return training_step(*args)

    BaseModel.training_step = step
    main(arguments)
    Path(environment["STEPS"]).write_text(str(len(steps)))


def job(arguments: list[str], slurm, restarts: int = 0, signum: int | None = None) -> list[int | None]:
    """Exit codes of both processes."""
    context, port = multiprocessing.get_context("fork"), free_port()
    tasks = [
        context.Process(target=run_task, args=(arguments, slurm(task, restarts, port), signum)) for task in range(2)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(120)
    return [task.exitcode for task in tasks]


def test_a_job_is_queued_again_and_goes_on(tmp_path, slurm, monkeypatch, capsys):
    """Of one process."""
    monkeypatch.setattr(safe_points, "GRACE", 0.001)  # SIGUSR1 comes early enough: it waits for the step
    one = slurm(0) | {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        calls = signalled(patch, BaseModel, "training_step", 2, signal.SIGUSR1)
        line = interrupted(fit(tmp_path, "--trainer.max_steps", "4"), capsys, 138)
    path = tmp_path / "last.ckpt"
    assert line == f"stopped by SIGUSR1: go on with --ckpt_path {path}; the job is queued again and goes on by itself"
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert len(calls) == torch.load(path, weights_only=True)["global_step"] == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    calls = signalled(monkeypatch, BaseModel, "training_step", 0)
    main(fit(tmp_path, "--trainer.max_steps", "4"))
    assert len(calls) == 2


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    """What two processes train that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    here = {"MASTER_ADDR": "127.0.0.1", "STEPS": str(folder / "steps")}
    assert job(fit(folder, *TWO), lambda *which: task_of_two(*which) | here) == [0, 0]
    return (folder / "out" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code", "asked"), [(signal.SIGUSR1, 138, ["requeue 77"]), (signal.SIGTERM, 143, [])]
)
def test_a_job_of_two_processes_ends_as_one_that_nothing_stops(tmp_path, slurm, expected, capfd, signum, code, asked):
    """The second process gets the signal first."""
    assert job(fit(tmp_path, *TWO), slurm, 0, signum) == [code, code]
    lines = [line for line in capfd.readouterr().err.splitlines() if "stopped by" in line]
    assert len(lines) == 1
    assert f"{signum.name}: go on with --ckpt_path {tmp_path / 'last.ckpt'}" in lines[0]
    assert ("queued again" in lines[0]) == bool(asked)
    assert ((tmp_path / "asked").read_text().splitlines() if asked else []) == asked
    assert (tmp_path / "asked").exists() == bool(asked)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert job(fit(tmp_path, *TWO), slurm, 1) == [0, 0]
    assert (tmp_path / "steps").read_text() == "2"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def written(folder: Path, name: str, writer: str | None, age: float) -> Path:
    path = folder / name
    CheckedCheckpoints().save_checkpoint({"job": writer}, path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_job_takes_no_checkpoint_but_its_own(tmp_path, slurm, monkeypatch):
    callbacks = [ModelCheckpoint(dirpath=tmp_path)]
    for name, value in slurm(0, 1).items():
        monkeypatch.setenv(name, value)
    assert jobs.own_checkpoint(callbacks) is None
    written(tmp_path, "other.ckpt", "slurm 76", 1)
    written(tmp_path, "none.ckpt", None, 2)
    assert jobs.own_checkpoint(callbacks) is None
    old, new = written(tmp_path, "old.ckpt", "slurm 77", 20), written(tmp_path, "new.ckpt", "slurm 77", 10)
    assert jobs.own_checkpoint(callbacks) == str(new)
    new.write_bytes(new.read_bytes()[:-100])
    assert jobs.own_checkpoint(callbacks) == str(old)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert jobs.own_checkpoint(callbacks) is None


def test_torchrun_restarts_a_job_that_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    path = written(tmp_path, "last.ckpt", "torchrun mine", 1)
    for name, found in (("mine", str(path)), ("none", None), ("other", None)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert jobs.own_checkpoint([ModelCheckpoint(dirpath=tmp_path)]) == found


def test_checkpoints_of_lightnings_own_requeue_are_not_restored(tmp_path, slurm, monkeypatch, capsys):
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    jobs.refuse_foreign(tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    with pytest.raises(SystemExit):
        main(fit(tmp_path))
    assert f"error: Lightning would restore {tmp_path}/hpc_ckpt_1.ckpt" in capsys.readouterr().err


def test_a_job_that_cannot_be_queued_says_so(slurm, monkeypatch):
    for name, value in slurm(0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stop, "asked", signal.SIGUSR1)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "`scontrol requeue 77` failed (" in jobs.ask_again()


@pytest.mark.slow
def test_a_requeued_job_is_the_same_wandb_run(tmp_path, slurm):
    """Launched, with signals from outside, at any step."""
    (tmp_path / "wandb.yaml").write_text(
        f"trainer: {{logger: {{class_path: training.wandb.Wandb, init_args: {{save_dir: {tmp_path}}}}}}}\n"
    )
    arguments = fit(tmp_path, *TWO, "--trainer.max_steps", "400", "--config", str(tmp_path / "wandb.yaml"))

    def start(restarts: int) -> list[subprocess.Popen]:
        port, command = free_port(), [sys.executable, "train.py", *arguments]
        tasks = [os.environ | slurm(task, restarts, port) for task in range(2)]
        return [subprocess.Popen(command, env=one, stderr=subprocess.PIPE, text=True) for one in tasks]

    tasks = start(0)
    while not (tmp_path / "last.ckpt").exists():
        assert tasks[0].poll() is None
        time.sleep(0.05)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    assert [(task.communicate(timeout=120), task.returncode)[1] for task in tasks] == [138, 138]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert [(task.communicate(timeout=300), task.returncode)[1] for task in start(1)] == [0, 0]
    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert set(runs) == {(tmp_path / "wandb_run_id.txt").read_text()}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 400


@pytest.mark.parametrize(("name", "nodes"), [("one_node", "1"), ("several_nodes", "4")])
def test_the_batch_files_start_a_process_for_each_gpu(tmp_path, name, nodes):
    script = Path(f"configs/cluster/{name}.sbatch")
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if "#SBATCH --" in line]
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    assert settings["signal"].startswith("SIGUSR1@")
    assert (settings["nodes"], settings["ntasks-per-node"]) == (nodes, settings["gpus-per-node"])
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    given = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": nodes, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    options = "--config configs/slam/digits.yaml --seed 1"
    command = ["bash", str(script), *options.split()[1:]]
    found = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    started = f"python train.py fit {options} --trainer.devices 8 --trainer.num_nodes {nodes} --trainer.strategy ddp"
    assert found.stdout.split() == ["--kill-on-bad-exit=1", *started.split()]
