"""The id of a run folder in W&B: a run that is resumed goes on in the same place."""

import uuid
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from solvers.files import atomic_write

RUN_ID_NAME = "wandb_run_id.txt"


def run_id(folder: str | Path) -> str:
    """The id kept in a run folder; made on first use."""
    path = Path(folder) / RUN_ID_NAME
    return path.read_text().strip() if path.exists() else new_run_id(folder)


def new_run_id(folder: str | Path) -> str:
    """Let the next run in this folder be a new one; the first process keeps its id."""
    new = uuid.uuid4().hex[:8]
    if rank_zero_only.rank == 0:
        with atomic_write(Path(folder) / RUN_ID_NAME) as temporary:
            temporary.write_text(new)
    return new
