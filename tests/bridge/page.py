"""docs/pipelines.md from the rows.

python -m tests.bridge.page             measure all rows, write docs/pipelines.json and the page
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from solvers.files import atomic_write
from tests.bridge.measure import STEPS, TEACHER_STEPS, TRAJECTORIES, fresh_process, measure
from tests.bridge.rows import ROWS, Row

DOCS = Path(__file__).parent.parent.parent / "docs"
MEASURED, PAGE = DOCS / "pipelines.json", DOCS / "pipelines.md"
HEAD = f"""# Pipelines

Pipelines of diffusers that solvers were tried in, each tiny and of random weights. `python -m tests.bridge.page` makes
this page.

* own: the pipeline's own scheduler of {STEPS} steps as a table, in the pipeline;
* plain: that scheduler with {STEPS} steps, against {TEACHER_STEPS};
* learned: a solver of {STEPS} steps, fitted to {TRAJECTORIES} recorded runs of {TEACHER_STEPS}, on other seeds;
* saved: the pipeline saved with that solver, in a fresh process without this project
  (`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`), against itself.

Errors are root mean squares, in standard deviations of the pipeline's latents or picture. Random weights say what
works, and nothing about how much real models gain. What is refused is refused before anything is written.

| pipeline | makes | own | plain | learned | saved |
|---|---|---|---|---|---|
"""


def page(measured: dict[str, Any]) -> str:
    """The page of measurements by the rows' labels."""
    return HEAD + "".join(_line(row, measured[row.label]) for row in ROWS)


def _line(row: Row, found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"| {row.label} | {row.kind} | refused: {found['refused']} | | | |\n"
    saved = f"refused: {found['unsaved']}" if "unsaved" in found else f"{found['saved']:.0e}"
    figures = f"{found['own']:.0e} | {found['plain']:.3f} | {found['learned']:.3f} | {saved}"
    return f"| {row.label} | {row.kind} | {figures} |\n"


def main() -> None:
    """Measure every row."""
    measured = {}
    with tempfile.TemporaryDirectory() as home, fresh_process(Path(home)) as again:
        for row in ROWS:
            with tempfile.TemporaryDirectory() as folder:
                measured[row.label] = measure(row, Path(folder), again)
            print(row.label, measured[row.label], file=sys.stderr)
    for path, text in ((MEASURED, json.dumps(measured, indent=1) + "\n"), (PAGE, page(measured))):
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
