"""The solvers published with the paper, as tables: `python -m solver_search.published [FOLDER]` writes the artifacts.

The numbers are the authors' (published_tables.json, coefficient tables released with arXiv 2505.21114); this module
says what they mean. The VP tables were searched on DiT-XL/2, the flow ones on FlowDCN-B/2, both without guidance.
"""

import json
import sys
from pathlib import Path

from solver_search.parameters import PaperParameters
from solvers import DenoiserIdentity, NoiseSchedule, SolverTable, save_solver

NUMBERS = Path(__file__).with_name("published_tables.json")
FOLDER = Path("checkpoints/solvers/published")
GUIDANCE = (1.0, 1.5)  # searched at 1, used by the authors at 1.375
SCHEDULES = {"vp": NoiseSchedule.linear(), "rectified_flow": NoiseSchedule.flow()}
SEARCHED_ON = {"vp": "DiT-XL/2", "rectified_flow": "FlowDCN-B/2"}


def published_nfes(kind: str) -> list[int]:
    """Evaluation counts there are tables of.

    Args:
        kind: `vp` or `rectified_flow`.
    Raises:
        ValueError: another kind.
    """
    return [int(nfe) for nfe in _tables(kind)]


def published_table(kind: str, nfe: int, schedule: NoiseSchedule | None = None, finish: str = "end") -> SolverTable:
    """A published table.

    Args:
        kind: `vp` or `rectified_flow`.
        nfe: network evaluations, one of `published_nfes(kind)`.
        schedule: of the denoiser it is meant for; default: DiT's linear betas, or flow. The nodes are the schedule's
            own; the authors used a continuous VP schedule, from which it differs by at most 0.004.
        finish: `end`, the authors' last noise level, or `data`, see `PaperParameters`.
    Raises:
        ValueError: no such table.
    """
    entries = _tables(kind)
    if str(nfe) not in entries:
        raise ValueError(f"there is no published {kind} table of {nfe} evaluations: there are {', '.join(entries)}")
    entry = entries[str(nfe)]
    parameters = PaperParameters(schedule or SCHEDULES[kind], nfe, finish=finish, reduce_last_rows=False)
    return parameters.table(parameters.theta(entry["timedeltas"], entry["coeffs"]))


def write_artifacts(folder: Path = FOLDER) -> list[Path]:
    """Write every published table as `vp-N.json` or `flow-N.json`."""
    written = []
    for kind, prefix in (("vp", "vp"), ("rectified_flow", "flow")):
        for nfe in published_nfes(kind):
            path = folder / f"{prefix}-{nfe}.json"
            save_solver(
                published_table(kind, nfe),
                path,
                DenoiserIdentity(SCHEDULES[kind], GUIDANCE),
                method="solver_search",
                fitted_on={"model": SEARCHED_ON[kind], "seeds": []},
                config={"source": _read()["source"], "finish": "end"},
            )
            written.append(path)
    return written


def _read() -> dict:
    return json.loads(NUMBERS.read_text())


def _tables(kind: str) -> dict:
    if kind not in SCHEDULES:
        raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(SCHEDULES)}")
    return _read()[kind]


if __name__ == "__main__":
    for artifact in write_artifacts(*map(Path, sys.argv[1:2])):
        print(artifact)
