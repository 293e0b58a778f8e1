"""report.html: one file that works offline, in light and dark, on a phone."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from evaluation.columns import COLUMNS, HINTS, cell, interval, label, shown_columns, summary
from evaluation.pictures import image_grid
from evaluation.svg import Chart, Series, color_class, heat_map

if TYPE_CHECKING:
    from evaluation.comparison import Entry

_CHART = {"width": 460, "height": 300}
_LARGEST_HEAT_MAP = 24
_FARTHEST = 3
_SHOWN = 12


def report_html(
    entries: Sequence["Entry"], names: Mapping[str, str], settings: Mapping[str, Any], notes: Sequence[str] = ()
) -> str:
    """The page.

    Args:
        entries: rows with pictures; of each guidance scale the reference first.
        names: short names of the solvers.
        settings: what was compared.
        notes: what was left out and why.
    """
    groups = _groups(entries)
    parts = ["<h1>Solver comparison</h1>", f"<p>{escape(' '.join(summary(settings)))}</p>"]
    parts += [_findings(group, names, len(groups) > 1) for group in groups]
    parts += [f"<p class=note>{escape(note)}.</p>" for note in notes]
    parts += ["<h2>Table</h2>", _table(entries, names)]
    for group in groups:
        suffix = f", guidance {group[0].row['guidance']:g}" if len(groups) > 1 else ""
        parts += [f"<h2>Quality against evaluations{suffix}</h2>", _pareto(group, names)]
        parts += [f"<h2>Same noise, same column{suffix}</h2>", _pictures(group, names)]
        parts += [f"<h2>Distance from the reference's trajectory{suffix}</h2>", _trajectories(group, names)]
    parts += ["<h2>The solvers</h2>", "".join(_solver(entry, names) for entry in _distinct(entries))]
    here = Path(__file__).parent
    style, script = (here / "report.css").read_text(), (here / "report.js").read_text()
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1"><title>Solver comparison</title>'
        f"<style>{style}</style></head><body><main>{''.join(parts)}</main><script>{script}</script></body></html>\n"
    )


def _groups(entries: Sequence["Entry"]) -> list[list["Entry"]]:
    scales = dict.fromkeys(entry.row["guidance"] for entry in entries)
    return [[entry for entry in entries if entry.row["guidance"] == scale] for scale in scales]


def _distinct(entries: Sequence["Entry"]) -> list["Entry"]:
    """One entry per solver, whatever the guidance."""
    return list({entry.row["solver"]: entry for entry in reversed(entries)}.values())[::-1]


def _findings(group: Sequence["Entry"], names: Mapping[str, str], several: bool) -> str:
    """The best solvers in a sentence each."""
    rows = [entry.row for entry in group if not entry.row["is_reference"]]
    start = f"Guidance {rows[0]['guidance']:g}: " if several else ""
    lines = []
    for metric, text in (("fd", "closest to the data"), ("rmse", f"closest to {names[group[0].row['solver']]}")):
        measured = [row for row in rows if row[metric] is not None]
        if measured:
            best = min(measured, key=lambda row: row[metric])
            figure = f"({COLUMNS[metric]} {best[metric]:.4g} with {best['nfe']} evaluations)"
            rivals = _rivals(best, measured, metric, names)
            lines.append(f"{start}{text} is <b>{escape(names[best['solver']])}</b> {figure}{rivals}.")
    return "".join(f"<p class=finding>{line[0].upper()}{line[1:]}</p>" for line in lines)


def _rivals(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str, names: Mapping[str, str]) -> str:
    """Solvers whose interval overlaps the best one's."""
    high = best.get(f"{metric}_high")
    if high is None:
        return ""
    close = [names[row["solver"]] for row in rows if row is not best and row[f"{metric}_low"] <= high]
    return f"; the 95 % intervals of {escape(', '.join(close))} overlap with its own" if close else ""


def _table(entries: Sequence["Entry"], names: Mapping[str, str]) -> str:
    rows = [entry.row for entry in entries]
    columns = shown_columns(rows)
    head = "".join(_head(name) for name in columns)
    best = {name: _best(rows, name) for name in ("fd", "kid", "rmse")}
    body = "".join(
        f"<tr{' class=reference' if row['is_reference'] else ''}>"
        + "".join(_cell(row, name, names, best.get(name) is row) for name in columns)
        + "</tr>"
        for row in rows
    )
    hints = "; ".join(f"<b>{escape(COLUMNS[name])}</b> {escape(HINTS[name])}" for name in columns if name in HINTS)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div><p class=note>{hints}.</p>"


def _head(name: str) -> str:
    return f'<th scope=col title="{escape(HINTS.get(name, ""))}"><button>{escape(COLUMNS[name])}</button></th>'


def _best(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    measured = [row for row in rows if row.get(name) is not None and not row["is_reference"]]
    return min(measured, key=lambda row: row[name]) if len(measured) > 1 else None


def _cell(row: Mapping[str, Any], name: str, names: Mapping[str, str], is_best: bool) -> str:
    if name == "solver":
        return f'<th scope=row data-value="{escape(row["solver"])}">{escape(label(row, names))}</th>'
    value, around = row.get(name), interval(row, name)
    small = f"<small>{around}</small>" if around else ""
    mark = " class=best" if is_best else ""
    return f'<td data-value="{"" if value is None else value}"{mark}>{escape(cell(row, name))}{small}</td>'


def _pareto(group: Sequence["Entry"], names: Mapping[str, str]) -> str:
    figures = "".join(_pareto_figure(group, names, metric) for metric in ("fd", "rmse"))
    return f"<div class=charts>{figures}</div>"


def _pareto_figure(group: Sequence["Entry"], names: Mapping[str, str], metric: str) -> str:
    """The chart; Frechet distances far above the reference's are named below it, or they would flatten the others."""
    measured = [entry.row for entry in group if not entry.row["is_reference"] and entry.row[metric] is not None]
    if not measured:
        return ""
    floor = group[0].row["fd"] if metric == "fd" else None
    near = [row for row in measured if not floor or row[metric] <= _FARTHEST * floor]
    far = [row for row in measured if near and row not in near]
    chart = _pareto_chart(group, near or measured, names, metric)
    listed = ", ".join(f"{names[row['solver']]} ({row[metric]:.3g})" for row in far)
    caption = f"<figcaption>Above {_FARTHEST} times the reference: {escape(listed)}</figcaption>" if far else ""
    return f"<figure>{chart}{caption}</figure>"


def _pareto_chart(
    group: Sequence["Entry"], rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], metric: str
) -> str:
    values = [row[metric] for row in rows]
    log_y = min(values) > 0 and max(values) / min(values) > 8
    series = [_frontier(rows, metric)]
    floor = group[0].row[metric]
    nfes = sorted({row["nfe"] for row in rows})
    if metric == "fd" and floor:
        ends = (min(nfes), max(nfes)) if len(nfes) > 1 else (nfes[0] - 1, nfes[0] + 1)
        text = f"{names[group[0].row['solver']]}: {floor:.4g}"
        series.append(Series(text, ends, (floor, floor), None, labels=("", text), dots=False, dashed=True))
    colors = _colors(group, names)
    for family, color in colors.items():
        members = sorted((row for row in rows if _family(names[row["solver"]]) == family), key=lambda row: row["nfe"])
        series.append(_family_series(members, metric, names, color))
    title = "FD to the data (lower is better)" if metric == "fd" else f"RMSE to {names[group[0].row['solver']]}"
    return Chart(series, "network evaluations", title, log_y=log_y, x_ticks=nfes, **_CHART).svg()


def _family_series(rows: Sequence[Mapping[str, Any]], metric: str, names: Mapping[str, str], color: int) -> Series:
    """One solver with several numbers of evaluations as a line, its name at the end."""
    title = [names[row["solver"]] for row in rows]
    text = [""] * (len(rows) - 1) + [title[0] if len(rows) == 1 else _family(title[0])] if rows else []
    has_bars = all(row.get(f"{metric}_low") is not None for row in rows)
    low = [max(row[f"{metric}_low"], 1e-3 * row[metric]) for row in rows] if has_bars else []
    high = [row[f"{metric}_high"] for row in rows] if has_bars else []
    values = [row["nfe"] for row in rows], [row[metric] for row in rows]
    return Series(_family(title[0]) if rows else "", *values, color, low, high, text)


def _family(name: str) -> str:
    """A solver's name without its number of evaluations."""
    return re.sub(r"[:-]\d+$", "", name)


def _colors(group: Sequence["Entry"], names: Mapping[str, str]) -> dict[str, int]:
    """Colour of each family of solvers, the same in all charts."""
    families = dict.fromkeys(_family(names[entry.row["solver"]]) for entry in group if not entry.row["is_reference"])
    return {family: index for index, family in enumerate(families)}


def _frontier(rows: Sequence[Mapping[str, Any]], metric: str) -> Series:
    """Rows that no row of as few evaluations beats."""
    best, points = float("inf"), []
    for row in sorted(rows, key=lambda row: (row["nfe"], row[metric])):
        if row[metric] < best:
            best = row[metric]
            points.append((row["nfe"], best))
    return Series("best so far", [x for x, _ in points], [y for _, y in points], None, dots=False, dashed=True)


def _pictures(group: Sequence["Entry"], names: Mapping[str, str]) -> str:
    rows = []
    for entry in group:
        figures = f"{entry.row['nfe']} evaluations"
        if not entry.row["is_reference"]:
            figures += f"<br>RMSE {entry.row['rmse']:.3g}"
        images = entry.images[:_SHOWN]
        name = escape(label(entry.row, names))
        rows.append(
            f"<div class=strip><div><b>{name}</b><small>{figures}</small></div>"
            f'<img src="{_png(images)}" alt="{len(images)} samples of {name}"></div>'
        )
    return f"<div class='scroll strips'>{''.join(rows)}</div>"


def _png(images: Tensor) -> str:
    """A data address of the images in one row; the browser enlarges them."""
    content = io.BytesIO()
    Image.fromarray(image_grid(images, len(images), scale=1)).save(content, "png")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _trajectories(group: Sequence["Entry"], names: Mapping[str, str]) -> str:
    traced = [entry for entry in group if entry.trajectory is not None]
    colors = _colors(group, names)
    series = [
        Series(name, _noise_level(entry).tolist(), entry.trajectory.tolist(), colors[_family(name)])
        for entry, name in ((entry, names[entry.row["solver"]]) for entry in traced)
    ]
    chart = Chart(series, "noise level sigma / sqrt(alpha² + sigma²)", "RMS distance", reverse_x=True, **_CHART).svg()
    keys = "".join(
        f'<span><i class="{color_class(color)}"></i>{escape(family)}</span>' for family, color in colors.items()
    )
    text = "Each state against the reference's at the same noise level, over the first images; noise left, image right."
    return f"<p class=note>{text}</p><figure class=wide>{chart}</figure><p class=legend>{keys}</p>"


def _noise_level(entry: "Entry") -> Tensor:
    table = entry.contender.table
    return (table.sigma / (table.alpha**2 + table.sigma**2).sqrt()).detach()


def _solver(entry: "Entry", names: Mapping[str, str]) -> str:
    table, row = entry.contender.table.detach(), entry.row
    facts = [f"{row['nfe']} evaluations", str(row["method"])]
    facts += [f"{row['unused_evaluations']} of them unused"] * bool(row["unused_evaluations"])
    facts += ["stochastic"] * row["stochastic"]
    rows = list(range(table.nfe))
    series = [Series("told to the network", rows, table.timesteps.tolist(), 0, dots=table.nfe <= 40)]
    original = table.info.get("fitted_on", {}).get("original_timesteps")
    if original is not None:
        series.append(Series("before tuning", rows, torch.as_tensor(original).tolist(), None, dashed=True))
    ticks = list(range(0, table.nfe, max(1, table.nfe // 8)))
    steps = Chart(series, "evaluation", "timestep", x_ticks=ticks, **_CHART).svg()
    return (
        f"<details{' open' * (row['method'] != 'baseline')}><summary><b>{escape(label(row, names))}</b> "
        f"<small>{escape(', '.join(facts))}</small></summary><div class=charts>"
        f"<figure>{_coefficients(table)}</figure><figure>{steps}</figure></div></details>"
    )


def _coefficients(table: Any) -> str:
    if table.nfe > _LARGEST_HEAT_MAP:
        return f"<p class=note>{table.nfe} rows are too many to draw the coefficients.</p>"
    states, outputs = [str(i + 1) for i in range(table.nfe)], [str(i) for i in range(table.nfe)]
    caption = "<figcaption>Canonical coefficients: state (down) in outputs (across)</figcaption>"
    return heat_map(table.canonical().output.tolist(), states, outputs) + caption
