"""Samplers, methods and exports on a second device, of which there is none here: see `tests.other_device`.

tests/test_gpu.py does the same on a real one.
"""

import pytest
import torch

from data.shards import Trajectories
from data.trajectories import run_teacher
from denoisers import with_guidance
from olss.fit import Factor
from olss.path import uniform_path
from olss.plan import CallPlan
from olss.run import fit_run
from parataa import parallel_sample
from slam.lines import teacher_points
from slam.objective import Objective, Weights, predictions
from solvers import TableScheduler, named_solver, sample, start_noise
from tests.other_device import OTHER, OtherDevice, module_to_other, to_other, values_of
from tests.test_gpu import VP, dit, tables

SEEDS = [3, 4, 5]
LABELS, NOISE = torch.tensor([0, 1, 2]), start_noise(SEEDS, (1, 8, 8))


def guided(moved: bool = False) -> torch.nn.Module:
    return with_guidance(module_to_other(dit()) if moved else dit(), 2.0)


@pytest.mark.parametrize("name", tables())
@torch.no_grad()
def test_the_sampler_reads_nothing_back(name: str) -> None:
    table = tables()[name]
    expected = sample(guided(), table, NOISE, LABELS, seeds=SEEDS)
    with OtherDevice(reads=0):
        found = sample(guided(moved=True), table, to_other(NOISE), to_other(LABELS), seeds=SEEDS)
    assert found.device == OTHER
    torch.testing.assert_close(values_of(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tables())
@torch.no_grad()
def test_the_parallel_sampler_reads_a_few_numbers_a_round(name: str) -> None:
    table = tables()[name]
    expected = sample(guided(), table, NOISE, LABELS, seeds=SEEDS)
    with OtherDevice() as device:
        found, stats = parallel_sample(guided(moved=True), table, to_other(NOISE), to_other(LABELS), seeds=SEEDS)
        converged = stats.converged
    assert converged
    assert device.reads <= 6 * len(SEEDS) * stats.rounds
    assert float((values_of(found) - expected).abs().max() / expected.abs().max()) < 1e-2


@torch.no_grad()
def test_olss_fits() -> None:
    teacher, plan = named_solver("ddim:8", VP), CallPlan(tuple(uniform_path(8, 3)))
    data = run_teacher(dit(), teacher, range(2**31, 2**31 + 6), torch.float32)
    expected = fit_run(dit(), teacher, [data], plan).fit.table(teacher)
    moved = Trajectories(*(to_other(v) if isinstance(v, torch.Tensor) else v for v in vars(data).values()))
    with OtherDevice():
        found = fit_run(module_to_other(dit()), teacher, [moved], plan).fit.table(teacher)
    torch.testing.assert_close(found.output_coef, expected.output_coef, rtol=1e-3, atol=1e-3)


def test_a_factor_takes_larger_blocks_there() -> None:
    """And finds the same triangle."""
    columns = list(torch.randn(3, 5000, dtype=torch.float64))
    here, there = Factor.empty(3), Factor.empty(3)
    here.add(columns)
    with OtherDevice():
        there.add([to_other(column) for column in columns])
    torch.testing.assert_close(values_of(there.r), here.r)


@torch.no_grad()
def test_slam_predicts() -> None:
    points = teacher_points(VP, 10)[torch.tensor([3, 5, 9])]
    weights = Weights.of(VP, points, torch.tensor([0.2, 0.5, 1.0]).double(), Objective(teacher_points=10))
    data, told = torch.randn(3, 1, 8, 8), Objective().tells_gamma
    student = dit(gamma=True)
    expected = predictions(student, student, guided(), weights.to("cpu", torch.float32), data, NOISE, LABELS, told)
    other, teacher = module_to_other(dit(gamma=True)), guided(moved=True)
    with OtherDevice(reads=0):
        there = weights.to(OTHER, torch.float32)
        found = predictions(other, other, teacher, there, *map(to_other, (data, NOISE, LABELS)), told)
    torch.testing.assert_close([values_of(one) for one in found], list(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_scheduler_reads_nothing_back() -> None:
    table = named_solver("dpmpp:4", VP)
    scheduler = TableScheduler.from_solver(table)
    denoiser, labels, x = guided(moved=True), to_other(LABELS), to_other(NOISE)
    with OtherDevice():
        scheduler.set_timesteps(4, device=OTHER)
    with OtherDevice(reads=0):
        for timestep in scheduler.timesteps:
            x = scheduler.step(denoiser(x, timestep, labels), timestep, x).prev_sample
    torch.testing.assert_close(values_of(x), sample(guided(), table, NOISE, LABELS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_device_itself_catches_what_it_is_for() -> None:
    """A mixture and a value read back."""
    with pytest.raises(RuntimeError, match="mixes the other device with the CPU"), OtherDevice():
        to_other(NOISE) + NOISE
    for read in (lambda x: x.sum().item(), lambda x: x.to("cpu"), lambda x: bool((x > 0).any())):
        with pytest.raises(RuntimeError, match="reads a value back"), OtherDevice(reads=0):
            read(to_other(NOISE))
