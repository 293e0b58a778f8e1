"""Every row: its own scheduler as a table, and a learned solver that beats plain sampling, or the line that refuses."""

import json
import re
from pathlib import Path

import pytest

from tests.bridge.measure import measure
from tests.bridge.page import MEASURED, PAGE, page
from tests.bridge.rows import ROWS, Row

QUICK = ("DDIMPipeline", "DDPMPipeline", "CogVideoXPipeline DPM", "WanPipeline")
MARKS = [() if row.label in QUICK else pytest.mark.slow for row in ROWS]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.label.replace(" ", "-"), marks=marks) for row, marks in zip(ROWS, MARKS)]
)
def test_a_pipeline(row: Row, tmp_path: Path) -> None:
    found = measure(row, tmp_path)
    assert ("refused" in found) == (row.refused is not None), found
    if row.refused is not None:
        assert re.search(row.refused, found["refused"])
        assert "\n" not in found["refused"]
    else:
        assert found["own"] < 1e-4
        assert found["learned"] < found["plain"]


def test_the_page_is_current() -> None:
    """`python -m tests.bridge.page` makes it; rows and what they expect are those of the table."""
    measured = json.loads(MEASURED.read_text())
    assert list(measured) == [row.label for row in ROWS]
    assert PAGE.read_text() == page(measured)
    for row in ROWS:
        found = measured[row.label]
        assert re.search(row.refused or "^$", found.get("refused", ""))
        assert row.refused or (found["own"] < 1e-4 and found["learned"] < found["plain"])


def test_there_are_rows_of_every_kind() -> None:
    assert len({row.name for row in ROWS}) >= 25
    kinds = " ".join(row.kind for row in ROWS)
    for kind in ("image of a class", "unconditional", "video", "image to image", "inpaint", "ControlNet"):
        assert kind in kinds
