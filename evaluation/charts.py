"""The charts of a comparison, as inline SVG: quality, trajectories, and what each solver is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.comparison import Entry
from evaluation.pictures import call_names, canonical_outputs
from evaluation.svg import Chart, Series, heat_map
from solvers import SolverTable

_SIZE = {"width": 460, "height": 300}
_LARGEST_HEAT_MAP = 24


def family(name: str) -> str:
    """A solver's name without its number of evaluations."""
    return re.sub(r"[:-]\d+$", "", name)


def family_colors(group: Sequence[Entry], names: Mapping[str, str]) -> dict[str, int]:
    """Colour of each family of solvers, the same in all charts."""
    families = dict.fromkeys(family(names[entry.row["solver"]]) for entry in group if not entry.row["is_reference"])
    return {name: index for index, name in enumerate(families)}


def quality_chart(
    group: Sequence[Entry], rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], metric: str
) -> str:
    """A metric of some rows against their evaluations, a line per family of solvers.

    Args:
        group: the entries of a guidance scale, the reference first.
        rows: what is drawn.
        names: short names of the solvers.
        metric: fd or rmse.
    """
    reference = group[0].row
    values, nfes = [row[metric] for row in rows], sorted({row["nfe"] for row in rows})
    series = [_frontier(rows, metric)]
    if metric == "fd" and reference["fd"]:
        series.append(_level(f"{names[reference['solver']]}: {reference['fd']:.4g}", reference["fd"], nfes))
    for name, color in family_colors(group, names).items():
        members = sorted((row for row in rows if family(names[row["solver"]]) == name), key=lambda row: row["nfe"])
        series.append(_family_series(members, metric, names, color))
    title = "FD to the data (lower is better)" if metric == "fd" else f"RMSE to {names[reference['solver']]}"
    log_y = min(values) > 0 and max(values) / min(values) > 8
    return Chart(series, "network calls", title, log_y=log_y, x_ticks=nfes, **_SIZE).svg()


def _frontier(rows: Sequence[Mapping[str, Any]], metric: str) -> Series:
    """Rows that no row of as few evaluations beats."""
    best, points = float("inf"), []
    for row in sorted(rows, key=lambda row: (row["nfe"], row[metric])):
        if row[metric] < best:
            best = row[metric]
            points.append((row["nfe"], best))
    return Series("best so far", [x for x, _ in points], [y for _, y in points], None, dots=False, dashed=True)


def _level(text: str, value: float, nfes: Sequence[int]) -> Series:
    """A dashed line across the chart."""
    ends = (nfes[0], nfes[-1]) if len(nfes) > 1 else (nfes[0] - 1, nfes[0] + 1)
    return Series(text, ends, (value, value), None, labels=("", text), dots=False, dashed=True)


def _family_series(rows: Sequence[Mapping[str, Any]], metric: str, names: Mapping[str, str], color: int) -> Series:
    """One solver with several numbers of evaluations as a line, its name at the end."""
    if not rows:
        return Series("", [], [], color)
    title = names[rows[0]["solver"]]
    text = [""] * (len(rows) - 1) + [title if len(rows) == 1 else family(title)]
    has_bars = all(row.get(f"{metric}_low") is not None for row in rows)
    low = [max(row[f"{metric}_low"], 1e-3 * row[metric]) for row in rows] if has_bars else []
    high = [row[f"{metric}_high"] for row in rows] if has_bars else []
    values = [row["nfe"] for row in rows], [row[metric] for row in rows]
    return Series(family(title), *values, color, low, high, text)


def trajectory_chart(group: Sequence[Entry], names: Mapping[str, str]) -> str:
    """Distance of each solver's states from the reference's against the noise level."""
    colors = family_colors(group, names)
    series = [
        Series(name, _noise_level(entry).tolist(), entry.trajectory.tolist(), colors[family(name)])
        for entry in group
        if entry.trajectory is not None and (name := names[entry.row["solver"]])
    ]
    return Chart(series, "noise level sigma / sqrt(alpha² + sigma²)", "RMS distance", reverse_x=True, **_SIZE).svg()


def _noise_level(entry: Entry) -> Tensor:
    table = entry.contender.table
    return (table.sigma / (table.alpha**2 + table.sigma**2).sqrt()).detach()


def coefficients_chart(table: SolverTable) -> str:
    """Canonical coefficients as a heat map; empty for a table of too many rows."""
    if table.num_rows > _LARGEST_HEAT_MAP:
        return ""
    rows = [row[~row.isnan()].tolist() for row in canonical_outputs(table)]
    return heat_map(rows, [str(i + 1) for i in range(table.num_rows)], call_names(table))


def timesteps_chart(table: SolverTable) -> str:
    """Timesteps the network is told, and those before tuning."""
    rows = list(range(table.num_rows))
    series = [Series("told to the network", rows, table.timesteps.tolist(), 0, dots=table.num_rows <= 40)]
    original = table.info.get("fitted_on", {}).get("original_timesteps")
    if original is not None:
        series.append(Series("before tuning", rows, torch.as_tensor(original).tolist(), None, dashed=True))
    ticks = rows[:: max(1, table.num_rows // 8)]
    return Chart(series, "evaluation", "timestep", x_ticks=ticks, **_SIZE).svg()
