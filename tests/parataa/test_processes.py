import multiprocessing
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from parataa import parallel_sample, processes
from parataa.processes import own_share
from solvers import NoiseSchedule, sample, start_noise
from tests.parataa.problems import SHAPE, euler_table, mixing_denoiser

VP = NoiseSchedule.linear()
TABLE = euler_table(VP, 9, noisy=0.3)


def run(group=None, denoiser=None, seeds=(0, 1, 2)):
    noise = start_noise(seeds, SHAPE, torch.float64)
    return parallel_sample(denoiser or mixing_denoiser(VP), TABLE, noise, seeds=seeds, tolerance=1e-11, group=group)


def _sample(rank):
    images, stats = run(distributed.group.WORLD)
    return images.numpy(), stats.sample_rounds, stats.evaluations


def _die_on_rank_1(rank):
    inner, calls = mixing_denoiser(VP), []

    def denoiser(x, timestep, condition):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            os._exit(3)
        return inner(x, timestep, condition)

    run(distributed.group.WORLD, denoiser)


def _hang_on_rank_1(rank):
    inner, calls = mixing_denoiser(VP), []

    def denoiser(x, timestep, condition):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            time.sleep(20)
        return inner(x, timestep, condition)

    run(distributed.group.WORLD, denoiser)


def _different_seeds(rank):
    run(distributed.group.WORLD, seeds=(rank, 5))


def _main(function, rank, world, store, timeout, queue):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    try:
        queue.put((rank, function(rank)))
    except (RuntimeError, ValueError) as error:
        queue.put((rank, error))
    queue.close()
    queue.join_thread()
    os._exit(0)  # a peer may be gone: no orderly farewell


def launch(function, tmp_path, world=2, timeout=30.0, answers=None):
    """What each rank returns or raises, in forked processes."""
    context = multiprocessing.get_context("fork")
    queue, store = context.Queue(), tmp_path / "store"
    children = [
        context.Process(target=_main, args=(function, rank, world, store, timeout, queue)) for rank in range(world)
    ]
    for child in children:
        child.start()
    try:
        return dict(queue.get(timeout=60) for _ in range(answers or world))
    finally:
        for child in children:
            child.kill()
            child.join()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(tmp_path, world):
    alone, stats = run()
    answers = launch(_sample, tmp_path, world)
    for images, rounds, evaluations in answers.values():
        assert torch.allclose(torch.from_numpy(images), alone, rtol=0, atol=1e-12)
        assert (images == answers[0][0]).all()
        assert rounds == stats.sample_rounds
        assert evaluations == stats.evaluations
    noise = start_noise((0, 1, 2), SHAPE, torch.float64)
    assert torch.allclose(alone, sample(mixing_denoiser(VP), TABLE, noise, seeds=(0, 1, 2)), rtol=0, atol=1e-9)


def test_a_process_that_dies_ends_the_others(tmp_path):
    begin = time.monotonic()
    error = launch(_die_on_rank_1, tmp_path, answers=1)[0]
    assert isinstance(error, RuntimeError)
    assert "process 0 of 2 waited in vain: another one ended or did not answer in time" in str(error)
    assert time.monotonic() - begin < 25


def test_a_process_that_hangs_ends_the_others_after_the_timeout(tmp_path):
    error = launch(_hang_on_rank_1, tmp_path, timeout=2.0, answers=1)[0]
    assert isinstance(error, RuntimeError)
    assert "waited in vain" in str(error)


def test_processes_with_different_inputs_say_so(tmp_path):
    for error in launch(_different_seeds, tmp_path).values():
        assert isinstance(error, ValueError)
        assert "different inputs or settings" in str(error)


class _Group:
    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("count", [0, 1, 2, 7, 9])
def test_shares_are_disjoint_and_complete(count):
    shares = [list(range(count))[own_share(count, _Group(rank, 3))] for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) == -(-count // 3)


def test_alone_there_is_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes() as group:
        assert group is None


def test_a_timeout_must_be_positive():
    with pytest.raises(ValueError, match="timeout is 0: it must be a positive number of seconds"), processes(0):
        pass


SCRIPT = """
import torch
from parataa import processes
from tests.parataa.test_processes import run
with processes(timeout=120) as group:
    images, stats = run(group)
    alone, _ = run()
    assert group.size() == 2 and torch.allclose(images, alone, rtol=0, atol=1e-12)
    if group.rank() == 0:
        print("rounds", stats.rounds)
"""


@pytest.mark.slow
def test_torchrun_through_fabric(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("rounds") == 1
