"""The time a fit took counts on over a resume, in every module that makes solvers."""

import time

import pytest
from lightning.pytorch import Trainer

from olss.method import OLSS
from slam.module import SLAM
from slam.objective import Objective
from tests.olss.toy import Toy
from tests.slam.tiny import network
from training.clock import Clock
from training.solver_training import SolverTraining
from training.testing import TableModule

METHODS = {
    "solver_training": lambda: SolverTraining(Toy(), OLSS(calls=[3])),
    "slam": lambda: SLAM(network(), objective=Objective(teacher_points=10)),
}


def test_seconds_are_those_before_and_those_since():
    clock = Clock(100.0)
    time.sleep(0.02)
    assert 100.02 <= clock.seconds < 200
    clock.start()
    assert clock.seconds < 100.02


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_fit_counts_on(method):
    first, second = METHODS[method](), METHODS[method]()
    for module in (first, second):
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    checkpoint = {}
    first.on_save_checkpoint(checkpoint)
    assert 0 <= checkpoint["fitting_seconds"] < 100
    second.on_load_checkpoint(checkpoint | {"fitting_seconds": 1000.0})
    TableModule.on_fit_start(second)
    assert 1000 <= second.fitting_seconds < 1100
    second.restart_clock()
    assert second.fitting_seconds < 100
