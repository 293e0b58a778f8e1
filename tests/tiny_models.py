"""Checkpoint folders of small random networks, made on the spot."""

from pathlib import Path

import torch

from denoisers.checkpoint import save_denoiser
from denoisers.dit import DiT
from solvers import NoiseSchedule


def tiny_checkpoint(folder: Path, schedule: NoiseSchedule | None = None, seed: int = 0) -> Path:
    """A class-conditional 8x8 DiT whose output depends on state, timestep and label; returns its folder."""
    torch.manual_seed(seed)
    network = DiT(
        schedule or NoiseSchedule.linear(),
        input_size=8,
        patch_size=4,
        in_channels=3,
        hidden_size=32,
        depth=2,
        num_heads=2,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():  # adaLN-zero starts at zero, where labels and timesteps would not matter
                parameter.normal_(std=0.1)
    save_denoiser(network, folder)
    return Path(folder)
