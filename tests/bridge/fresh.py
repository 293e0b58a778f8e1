"""Runs saved pipelines without this project: folders are read from stdin, a line each, and named when they are done.

A folder holds a pipeline and call.pt, the arguments of its calls and their seeds; images.pt is written into it.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def seeded(seed: int) -> torch.Generator:
    """A generator, and torch's own, which some pipelines draw a picture's latents from."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    for folder in map(Path, map(str.strip, sys.stdin)):
        index = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name, kind in index.items() if kind == [None, None]}
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **absent)
        pipe.set_progress_bar_config(disable=True)
        call = torch.load(folder / "call.pt", weights_only=True)
        made = [pipe(**call["arguments"], generator=seeded(seed))[0] for seed in call["seeds"]]
        assert "solvers" not in sys.modules
        torch.save(torch.stack([torch.as_tensor(one).double() for one in made]), folder / "images.pt")
        print(folder, flush=True)
