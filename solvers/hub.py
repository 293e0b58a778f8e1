"""Share solver artifacts on the Hugging Face Hub, with a generated model card."""

from pathlib import Path
from typing import Any

from solvers.artifact import load_folder
from solvers.errors import SolverError, short_path
from solvers.export import describe
from solvers.files import atomic_write
from solvers.online import hub
from solvers.student import student_files
from solvers.table import SolverTable

PICTURE = "comparison.png"


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    report: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload solvers",
) -> str:
    """Upload the artifacts of a folder, with the students they name and a model card.

    Args:
        folder: holds `*.json` artifacts; every one must load. Its README.md is written, other files are left out.
        repo_id: `owner/name`; created if it does not exist.
        report: the folder that `sample.py compare` wrote: its figures and pictures go into the card.
        base_model: the Hub's name of the model that they were made for.
        license: of the solvers, the Hub's word; None takes that of `base_model`.
        private, token, commit_message: as in huggingface_hub.
    Returns:
        The address of the commit.
    Raises:
        SolverError: no artifact in the folder, one that cannot be loaded, no report, or a Hub that cannot be reached.
    """
    folder, repo_id = Path(folder), str(repo_id)
    tables = load_folder(folder)
    figures = None if report is None else read_figures(Path(report))
    with hub(token) as api:
        if license is None and base_model is not None:
            license = getattr(api.model_info(base_model).card_data, "license", None)
        if report is not None:
            _write(folder / PICTURE, Path(report, PICTURE).read_bytes())
        header = {"base_model": base_model, "license": license}
        _write(folder / "README.md", model_card(tables, repo_id, header, figures).encode())
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files = sorted({"README.md", *tables, *_beside(folder, tables), *([PICTURE] if figures else [])})
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message=commit_message
        )
    return str(done.commit_url)


def read_figures(report: Path) -> str:
    """The table of a comparison as Markdown; raises SolverError where there is no comparison."""
    try:
        if not (report / PICTURE).is_file():
            raise FileNotFoundError(f"no {PICTURE}")
        return report.joinpath("report.md").read_text(encoding="utf-8").partition("\n")[2].strip()
    except OSError as error:
        raise SolverError(f"{short_path(report)} is no report of `sample.py compare` ({error}): make one") from error


def _beside(folder: Path, tables: dict[str, SolverTable]) -> set[str]:
    """Files of the students that artifacts name."""
    students = [table.info["student"]["path"] for table in tables.values() if table.info["student"] is not None]
    return {file.relative_to(folder).as_posix() for name in students for file in student_files(folder, name)}


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def model_card(
    tables: dict[str, SolverTable],
    repo_id: str,
    header: dict[str, str | None] | None = None,
    figures: str | None = None,
) -> str:
    """Markdown with the Hub's header: what the solvers are, how they were made and measured, how to use them."""
    first = next(iter(tables))
    known = [f"{name}: {value}\n" for name, value in (header or {}).items() if value is not None]
    rows = [f"| `{name}` | {_row(table)} |" for name, table in tables.items()]
    sources = [f"- `{name}`: {_source(table)}" for name, table in tables.items()]
    return _CARD.format(
        name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        first=first,
        lines="\n".join(f"- {describe(table)}" for table in tables.values()),
        rows="\n".join(rows),
        sources="\n".join(sources),
        header="".join(known),
        figures="" if figures is None else _FIGURES.format(figures=figures, picture=PICTURE),
    )


def _row(table: SolverTable) -> str:
    info = table.info
    figures = ", ".join(f"{name} {_short(value)}" for name, value in info["validation"].items() if _is_plain(value))
    return " | ".join(
        [
            info["method"],
            str(table.nfe),
            info["denoiser"]["name"] or "any of its schedule",
            str(info["guidance_scale"]),
            figures or "none recorded",
        ]
    )


def _source(table: SolverTable) -> str:
    info = table.info
    fitted = ", ".join(f"{name} {_short(value)}" for name, value in info["fitted_on"].items()) or "nothing recorded"
    schedule = f"{info['schedule']['kind']} {info['schedule']['parameters']}"
    made = f"{info['created']['time']}, commit {info['created']['git_commit']}"
    return f"fitted on {fitted}; schedule {schedule}; made {made}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_FIGURES = """## How good they are

{figures}

![the same noises, solver by solver]({picture})

"""

_CARD = """---
library_name: diffusers
{header}tags:
- diffusion
- solver
- scheduler
---

# {name}

Learned diffusion solvers: tables of numbers that say which timesteps a network is told and how its outputs are
combined.

{lines}

| file | method | evaluations | model | guidance scale | validation |
|---|---|---|---|---|---|
{rows}

{figures}## Use

```python
from huggingface_hub import hf_hub_download
from solvers import TableScheduler

path = hf_hub_download("{repo_id}", "{first}")
pipe.scheduler = TableScheduler.for_pipeline(path, pipe)  # refuses a pipeline the solver was not made for
```

Call the pipeline with `num_inference_steps` equal to the evaluations above and with the same guidance scale.

## How they were made

{sources}
"""
