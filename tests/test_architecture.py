"""docs/architecture.md names files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+(?:\.py|\.toml|/))`", TEXT)))


@pytest.mark.parametrize("name", NAMED)
def test_what_the_page_names_is_there(name):
    assert (ROOT / name).exists()


def test_every_room_is_on_the_page():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert {room for room in rooms if f"`{room}/`" in TEXT or f"[{room}](" in TEXT} == rooms


def test_names_are_found():
    assert {"solvers/space.py", "solvers/executor.py", "evaluation/metrics.py", "base/"} <= set(NAMED)
