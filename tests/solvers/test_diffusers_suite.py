"""diffusers' own tests of every scheduler, on ours: set DIFFUSERS_CHECKOUT to a checkout of its repository.

They ask for 50 steps and for the sixth timestep, so the tables have 50 rows and more.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from solvers import NoiseSchedule, SolverTable, TableScheduler, tabulate
from solvers.standalone.table_scheduler import TableScheduler as StandaloneScheduler
from tests.solvers.test_scheduler import operators

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
CANNOT_HOLD = {
    "test_trained_betas": "a scheduler whose betas are changed when it is made: the numbers of a table hold for one "
    "noise schedule alone",
}
SCHEDULES = {"flow": NoiseSchedule.flow(shift=3.0)}
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="DIFFUSERS_CHECKOUT names no checkout of diffusers")


def tables(kind: str) -> list[SolverTable]:
    spacing = {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}
    if kind == "flow":
        return [tabulate(FlowMatchEulerDiscreteScheduler(shift=3.0), 50)]
    if kind == "stochastic":
        return [tabulate(EulerAncestralDiscreteScheduler(**spacing), 50)]
    if kind == "bands":
        return [operators(3, (0.2,), 50)]
    return [tabulate(UniPCMultistepScheduler(**spacing), steps) for steps in (4, 50)]


@pytest.fixture(scope="module")
def suite() -> Any:
    """The class of diffusers' tests, from a package of another name than ours."""
    folder = Path(CHECKOUT or "", "tests")
    spec = importlib.util.spec_from_file_location(
        "diffusers_suite", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules["diffusers_suite"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("diffusers_suite.schedulers.test_schedulers").SchedulerCommonTest


NAMES = (
    "test_from_save_pretrained",
    "test_compatibles",
    "test_from_pretrained",
    "test_step_shape",
    "test_scheduler_outputs_equivalence",
    "test_scheduler_public_api",
    "test_add_noise_device",
    "test_deprecated_kwargs",
    "test_trained_betas",
    "test_getattr_is_correct",
)


def test_all_of_its_tests_are_known(suite):
    assert {name for name in dir(suite) if name.startswith("test_")} == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CANNOT_HOLD])
@pytest.mark.parametrize("scheduler", [TableScheduler, StandaloneScheduler])
@pytest.mark.parametrize("kind", ["vp", "stochastic", "flow", "bands"])
def test_diffusers_own_tests_pass(suite, kind, scheduler, name):
    made = TableScheduler.from_solver(tables(kind), schedule=SCHEDULES.get(kind, NoiseSchedule.linear()))
    config = {key: made.config[key] for key in ("tables", "schedule", "prediction_type")}

    class Case(suite):
        scheduler_classes = (scheduler,)
        forward_default_kwargs = (("num_inference_steps", 50),)

        def get_scheduler_config(self) -> dict[str, Any]:
            return config

    getattr(Case(name), name)()
