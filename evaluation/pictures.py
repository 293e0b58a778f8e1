"""Pictures of samples and of solver tables, shared by the command line, reports and training logs."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from solvers import SolverTable
from solvers.calls import CONDITIONAL
from solvers.files import atomic_write

FRAMES = 4  # of a video that are shown
LONGEST, LOWEST = 256, 8  # pixels of a table


def to_uint8(images: Tensor) -> np.ndarray:
    """Samples of any shape as pictures (n, height, width, 3) of bytes; values outside [-1, 1] are cut off.

    One channel becomes grey; of four or more (latents) the first three are shown. Of a video (n, channels, frames,
    height, width) a few frames stand side by side; packed latents (n, tokens, channels), sound (n, channels, samples)
    and vectors (n, length) are grey tables, long ones averaged to fit.
    """
    pixels = _as_planes(images.detach().float().cpu())
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else _three(pixels)
    return rearrange(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte(), "n c h w -> n h w c").numpy()


def _as_planes(samples: Tensor) -> Tensor:
    """(n, channels, height, width) of samples of any shape."""
    if samples.ndim == 5:
        chosen = torch.linspace(0, samples.shape[2] - 1, min(FRAMES, samples.shape[2])).round().long()
        return rearrange(samples[:, :, chosen], "n c f h w -> n c h (f w)")
    if samples.ndim == 4:
        return samples
    table = samples.reshape(len(samples), 1, *([1] * (samples.ndim < 3)), *samples.shape[1:])
    height, width = (min(length, LONGEST) for length in table.shape[-2:])
    table = torch.nn.functional.adaptive_avg_pool2d(table, (height, width))
    return table.repeat_interleave(-(-LOWEST // height), dim=2)


def _three(pixels: Tensor) -> Tensor:
    """Three channels; of two the second stands for the third, too."""
    return pixels[:, [0, 1, 1]] if pixels.shape[1] == 2 else pixels[:, :3]


def image_grid(images: Tensor, columns: int, scale: int = 2) -> np.ndarray:
    """Images side by side, `columns` per row with a white margin, each pixel `scale` wide: (height, width, 3) bytes."""
    pixels = to_uint8(images)
    rows = -(-len(pixels) // columns)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.pad(pixels, ((0, rows * columns - len(pixels)), (1, 1), (1, 1), (0, 0)), constant_values=255)
    return rearrange(pixels, "(r c) h w k -> (r h) (c w) k", c=columns)


def save_grid(images: Tensor, path: str | Path) -> None:
    """Write a PNG of up to 256 images."""
    with atomic_write(path) as temporary:
        Image.fromarray(image_grid(images[:256], columns=8)).save(temporary)


def draw_table(table: SolverTable, title: str = "", original: Tensor | None = None) -> Figure:
    """Canonical coefficients as a heat map beside the timesteps the network is told.

    Args:
        table: any solver table.
        title: written above.
        original: (N,) timesteps before tuning, drawn beside the table's own.
    Returns:
        A matplotlib figure, not shown and not registered with pyplot.
    """
    table = table.detach()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    heat, line = figure.subplots(1, 2)
    _draw_coefficients(figure, heat, table)
    _draw_timesteps(line, table, original)
    figure.suptitle(title)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def call_names(table: SolverTable) -> list[str]:
    """The row of each network call, and the first letter of a branch other than the conditional one: 0, 0u, 1."""
    return [f"{call.row}{'' if call.branch == CONDITIONAL else call.branch[0]}" for call in table.calls]


def canonical_outputs(table: SolverTable) -> Tensor:
    """Canonical output coefficients as numbers, (N, K), NaN where a call comes after the row."""
    later = table.call_rows > torch.arange(table.num_rows)[:, None]
    return table.scalar_part().canonical().output.detach().masked_fill(later, torch.nan)


def _draw_coefficients(figure: Figure, axes, table: SolverTable) -> None:
    coefficients = np.ma.masked_invalid(canonical_outputs(table).numpy())
    limit = float(np.abs(coefficients).max()) or 1.0
    image = axes.imshow(coefficients, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if table.num_rows <= 12:
        for (i, j), value in np.ma.ndenumerate(coefficients):
            color = "w" if abs(value) > 0.6 * limit else "k"
            axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="network output", ylabel="next state", title="canonical output coefficients")
    rows, columns = (np.arange(0, count, max(1, count // 10)) for count in coefficients.shape)
    axes.set_xticks(columns, np.array(call_names(table))[columns])
    axes.set_yticks(rows, rows + 1)
    figure.colorbar(image, ax=axes, shrink=0.9)


def _draw_timesteps(axes, table: SolverTable, original: Tensor | None) -> None:
    rows = torch.arange(table.num_rows)
    if original is not None:
        axes.plot(rows, original, "o--", color="0.6", label="original")
    axes.plot(rows, table.timesteps, "o-", label="told to the network")
    axes.set(xlabel="evaluation", ylabel="timestep", title="timesteps and noise level")
    level = axes.twinx()
    level.plot(table.sigma / (table.alpha**2 + table.sigma**2).sqrt(), "k:", label="sigma")
    level.set(ylabel="sigma / sqrt(alpha² + sigma²)", ylim=(-0.02, 1.02))
    handles = axes.get_legend_handles_labels()[0] + level.get_legend_handles_labels()[0]
    axes.legend(handles=handles)
