"""The whole command on a pipeline of every class: by its adapter, or recorded, or refused in one line."""

from pathlib import Path

import pytest

from learn import learn
from learn.options import LearnOptions
from learn.pipelines import has_adapter
from tests.bridge.measure import runs
from tests.bridge.rows import ROWS, Row

QUICK = ("DDIMPipeline", "WanPipeline")
MARKS = [() if row.label in QUICK else pytest.mark.slow for row in ROWS]
SMALL = {"calls": [4], "trajectories": 2, "method": "olss", "device": "cpu"}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.label.replace(" ", "-"), marks=marks) for row, marks in zip(ROWS, MARKS)]
)
def test_a_pipeline(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learn.fits.ROUNDS", 0)
    pipe, prompts = row.pipeline(), None if row.prompts is None else list(row.prompts)
    adapted = has_adapter(pipe, LearnOptions(prompts=prompts, call=row.call))
    options = SMALL | {"teacher": "unipc:8" if adapted else "own:8", "call": row.call, "output": tmp_path}
    if row.refused is not None and not adapted:
        with pytest.raises(ValueError, match=row.refused) as refusal:
            learn(pipe, prompts, **options)
        assert "\n" not in str(refusal.value)
        return
    result = learn(pipe, prompts, **options)
    assert result.report.read_text().count("data:image/png") >= 2
    faster = result.pipeline
    assert runs(row, faster, result.table(4).num_rows).isfinite().all()
