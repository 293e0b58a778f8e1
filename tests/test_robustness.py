"""A short campaign of mutated artifacts, and that a campaign finds what it looks for."""

import pytest

from benchmarks.robustness import COUNTS, campaign
from solvers import artifact


@pytest.mark.filterwarnings("ignore:solver artifacts of format 1")
def test_mutated_artifacts_are_refused_in_one_line():
    assert campaign(1500) == dict.fromkeys(COUNTS, 0)


@pytest.mark.parametrize(
    ("name", "replacement", "found"),
    [
        ("_check_sum", lambda values: None, {"other_solver", "other_metadata"}),
        ("check_metadata", lambda values, num_rows: None, {"crashes_later"}),
        ("SolverError", OSError, {"other_error"}),
    ],
)
@pytest.mark.filterwarnings("ignore:solver artifacts of format 1")
def test_a_campaign_finds_what_is_not_checked(monkeypatch, name, replacement, found):
    monkeypatch.setattr(artifact, name, replacement)
    counts = campaign(1500)
    assert {rule for rule, count in counts.items() if count} >= found
