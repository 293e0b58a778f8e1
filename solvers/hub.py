"""Share solver artifacts on the Hugging Face Hub, with a generated model card."""

from pathlib import Path
from typing import Any

from solvers.artifact import load_folder
from solvers.export import describe
from solvers.files import atomic_write
from solvers.student import student_files
from solvers.table import SolverTable


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload solvers",
) -> str:
    """Upload the artifacts of a folder, with the students they name and a model card.

    Args:
        folder: holds `*.json` artifacts; every one must load. Its README.md is written, other files are left out.
        repo_id: `owner/name`; created if it does not exist.
        private, token, commit_message: as in huggingface_hub.
    Returns:
        The address of the commit.
    Raises:
        SolverError: no artifact in the folder, or one that cannot be loaded.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    tables = load_folder(folder)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(model_card(tables, repo_id), encoding="utf-8")
    students = [table.info["student"]["path"] for table in tables.values() if table.info["student"] is not None]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    beside = {file.relative_to(folder).as_posix() for name in students for file in student_files(folder, name)}
    files = sorted({"README.md", *tables, *beside})
    done = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message=commit_message)
    return str(done.commit_url)


def model_card(tables: dict[str, SolverTable], repo_id: str) -> str:
    """Markdown with the Hub's header: what the solvers are, how they were made and measured, how to use them."""
    first = next(iter(tables))
    rows = [f"| `{name}` | {_row(table)} |" for name, table in tables.items()]
    sources = [f"- `{name}`: {_source(table)}" for name, table in tables.items()]
    return _CARD.format(
        name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        first=first,
        lines="\n".join(f"- {describe(table)}" for table in tables.values()),
        rows="\n".join(rows),
        sources="\n".join(sources),
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


_CARD = """---
library_name: diffusers
tags:
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

## Use

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
