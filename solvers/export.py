"""Solvers for people without this project: a diffusers scheduler, a ComfyUI node, one NumPy file."""

import json
import pprint
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from solvers import strict_json
from solvers.errors import SolverError
from solvers.files import atomic_write
from solvers.prediction import data_weights
from solvers.schedule import NoiseSchedule
from solvers.table import SolverTable
from solvers.table_json import table_to_dict

Solver = str | Path | SolverTable
TARGETS = ("diffusers", "comfyui", "numpy")
LARGEST = 1e9  # beyond it, a sigma stands for alpha = 0
SOURCES = Path(__file__).parent / "standalone"


def export_solver(
    solver: Solver | Sequence[Solver],
    to: str,
    output: str | Path,
    *,
    pipeline: str | Path | None = None,
    allow_mismatch: str | Sequence[str] = (),
) -> Path:
    """Write a solver for another tool.

    Args:
        solver: an artifact's path, a SolverTable, or, with different numbers of steps, a folder of artifacts or a list
            (diffusers, comfyui).
        to: `diffusers` (a scheduler folder with its own code), `comfyui` (a custom-node folder), or `numpy` (one file).
        output: the folder to write; for `numpy` a folder, or the `.py` file itself.
        pipeline: for `diffusers`, the folder of a saved pipeline that shall load this scheduler: the solver is checked
            against it, put into its `scheduler/` and named in its model_index.json.
        allow_mismatch: names of the checks to leave out, as in `TableScheduler.for_pipeline`.
    Returns:
        The folder or file written.
    Raises:
        SolverError: an unknown target, a solver that cannot be loaded, does not fit, or that the target cannot run.
    """
    if to not in TARGETS:
        raise SolverError(f"cannot export to {to!r}: use one of {', '.join(TARGETS)}")
    if to != "diffusers" and (pipeline is not None or allow_mismatch):
        raise SolverError(f"an export to {to} belongs to no pipeline: leave these options out, or export to diffusers")
    tables, output = _load(solver), Path(output)
    if to == "diffusers":
        return _diffusers(tables, output, None if pipeline is None else Path(pipeline), allow_mismatch)
    return _comfyui(tables, output) if to == "comfyui" else _numpy(tables, output)


def _load(solver: Solver | Sequence[Solver]) -> list[SolverTable]:
    from solvers.scheduler import load_tables

    tables = load_tables(solver)
    steps = [table.num_rows for table in tables]
    if not tables or len(set(steps)) < len(steps):
        raise SolverError(f"solvers have {steps} steps: export at least one, each with another number of steps")
    return tables


def _diffusers(tables: list[SolverTable], output: Path, pipeline: Path | None, allow_mismatch: Any) -> Path:
    from solvers.scheduler import TableScheduler, saved_parts
    from solvers.standalone.table_scheduler import check_keeps_scheduler

    if any(table.has_own_calls for table in tables):
        raise SolverError(
            "a scheduler alone cannot run this solver, which has network calls of its own: use "
            "solvers.accelerate_pipeline(pipe, solver), solvers.sample or the NumPy export"
        )
    if pipeline is None:
        scheduler = TableScheduler.from_solver(tables, allow_mismatch=allow_mismatch)
    else:
        check_keeps_scheduler(saved_parts(pipeline)[1])
        scheduler = TableScheduler.for_pipeline(tables, pipeline, allow_mismatch=allow_mismatch)
    files = {
        "scheduler_config.json": scheduler.to_json_string(),
        "table_scheduler.py": (SOURCES / "table_scheduler.py").read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        _write(output / name, text)
    _write(output / "README.md", _DIFFUSERS_README.format(summary=_summary(tables)))
    if pipeline is not None:
        _install(files, pipeline)
    return output


def _install(files: dict[str, str], pipeline: Path) -> None:
    """Make a saved pipeline load the exported scheduler."""
    for name, text in files.items():
        _write(pipeline / "scheduler" / name, text)
    index = pipeline / "model_index.json"
    entries = json.loads(index.read_text(encoding="utf-8")) | {"scheduler": ["table_scheduler", "TableScheduler"]}
    _write(index, json.dumps(entries, indent=2) + "\n")


def _comfyui(tables: list[SolverTable], output: Path) -> Path:
    solvers = {_name(table): comfyui_numbers(table) for table in tables}
    _write(output / "solvers.json", strict_json.dumps(solvers))
    _write(output / "__init__.py", (SOURCES / "comfyui_nodes.py").read_text(encoding="utf-8"))
    _write(output / "README.md", _COMFYUI_README.format(folder=output.name, summary=_summary(tables)))
    return output


def comfyui_numbers(table: SolverTable) -> dict[str, Any]:
    """What the ComfyUI node needs of a table: its numbers and how to call ComfyUI's model at each row.

    The network is told timestep t, whose node on the schedule is (a, s). ComfyUI takes x = state / a and sigma = s / a
    (flow: x = state, sigma = s) and returns the data d = w_x state + w_o output, so output = (d - w_x state) / w_o.

    Raises:
        SolverError: a table that carries no schedule, or a node without data (alpha = 0), which ComfyUI cannot express.
    """
    schedule = _schedule(table)
    flow = schedule.kind == "flow"
    try:
        alpha, sigma = schedule.alpha_sigma(table.timesteps.detach())
        on_state, on_output = data_weights(table.prediction_type, alpha, sigma)
    except ValueError as error:
        raise SolverError(f"ComfyUI cannot run this solver: {error}") from error
    node_alpha, node_sigma = table.alpha.detach()[:-1], table.sigma.detach()[:-1]
    node_scale, scale = (1 / (node_alpha + node_sigma), torch.ones_like(alpha)) if flow else (1 / node_alpha, 1 / alpha)
    numbers = {
        "sigmas": [*(node_sigma * node_scale).tolist(), 0.0],
        "call_scale": scale.tolist(),
        "call_sigma": (sigma * scale).tolist(),
        "from_state": (-on_state / on_output).tolist(),
        "from_denoised": (1 / on_output).tolist(),
    }
    if not all(abs(number) < LARGEST for values in numbers.values() for number in values):
        raise SolverError(
            "ComfyUI cannot run this solver: a row is at pure noise (alpha = 0) or without any (sigma = 0), where its "
            "sigma says nothing; use the diffusers export"
        )
    return _numbers(table) | {"kind": schedule.kind, "stochastic": table.is_stochastic} | numbers


def _numbers(table: SolverTable) -> dict[str, Any]:
    return {name: value for name, value in table_to_dict(table).items() if not name.endswith("support")}


def _numpy(tables: list[SolverTable], output: Path) -> Path:
    if len(tables) != 1:
        raise SolverError(f"a NumPy file holds one solver, {len(tables)} were given: export them one by one")
    table = tables[0]
    numbers = _numbers(table) | {name: table.info.get(name) for name in ("method", "guidance_scale", "schedule")}
    source = (SOURCES / "numpy_sampler.py").read_text(encoding="utf-8")
    literal = "TABLE = " + pprint.pformat(numbers, width=118, compact=True, sort_dicts=False)
    return _write(
        output if output.suffix == ".py" else output / "solver.py", source.replace("TABLE: dict = {}", literal)
    )


def _schedule(table: SolverTable) -> NoiseSchedule:
    if "schedule" not in table.info:
        raise SolverError("this table carries no noise schedule: save it with save_solver and export the artifact")
    return NoiseSchedule.from_dict(table.info["schedule"])


def _name(table: SolverTable) -> str:
    return f"{table.info.get('method', 'table')}-{table.num_rows}"


def _summary(tables: list[SolverTable]) -> str:
    return "\n".join(f"- {describe(table)}" for table in tables)


def describe(table: SolverTable) -> str:
    """One line about a loaded solver: method, steps, what it was made for."""
    info = table.info
    parts = [f"{_name(table)}: {table.nfe} network evaluations", f"{table.prediction_type} outputs"]
    if info:
        parts.append(f"guidance scale {info['guidance_scale']}")
        parts.append(f"made for {info['denoiser']['name'] or 'any model of its schedule'}")
    return ", ".join(parts)


def _write(path: Path, text: str) -> Path:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


_DIFFUSERS_README = """# A learned diffusion solver for diffusers

{summary}

`table_scheduler.py` needs torch and diffusers only; every number is in `scheduler_config.json`. In code:

    import sys
    sys.path.insert(0, "THIS_FOLDER")
    from table_scheduler import TableScheduler
    pipe.scheduler = TableScheduler.from_pretrained("THIS_FOLDER")

As part of a saved pipeline: copy both files into its `scheduler/` folder, set the entry "scheduler" of its
`model_index.json` to ["table_scheduler", "TableScheduler"], and load it with

    DiffusionPipeline.from_pretrained("PIPELINE", trust_remote_code=True)

Call the pipeline with `num_inference_steps` equal to the number of evaluations above and with the guidance scale the
solver was made for. A solver with fresh noise takes `pipe.scheduler.seed = 0` in pipelines that pass no generator.
"""

_COMFYUI_README = """# A learned diffusion solver for ComfyUI

{summary}

Copy this folder to `ComfyUI/custom_nodes/{folder}` and restart. The node "Learned solver" (in
sampling/custom_sampling/samplers) gives a SAMPLER and its SIGMAS: connect both to SamplerCustom or
SamplerCustomAdvanced, with the cfg the solver was made for and a full denoise. A solver that makes its own
unconditional calls has guidance inside: the node "Learned solver with guidance" (in sampling/custom_sampling/guiders)
takes the model and both conditions and gives a GUIDER too, for SamplerCustomAdvanced. A model of another kind or noise
schedule is refused. Under an inpaint mask the kept area ends as it was. ComfyUI rounds the timesteps of models with a
discrete schedule to whole numbers; a solver whose timesteps are fractional then differs slightly from the original.
"""
