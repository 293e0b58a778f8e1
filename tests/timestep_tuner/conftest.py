"""Trajectories that the tests of this folder share."""

import pytest

from tests.solver_search.toys import TwoPoints
from tests.timestep_tuner.runs import SCHEDULE, make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), TwoPoints(SCHEDULE))
