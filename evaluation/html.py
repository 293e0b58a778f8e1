"""report.html: one file that works offline, in light and dark, on a phone. The page itself is templates/report.html."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from evaluation.charts import coefficients_chart, family_colors, quality_chart, timesteps_chart, trajectory_chart
from evaluation.columns import cell, hint, interval, label, shown_columns, summary, title
from evaluation.comparison import Entry
from evaluation.pictures import image_grid
from evaluation.svg import color_class

_FARTHEST = 3
_SHOWN = 12


def report_html(
    entries: Sequence[Entry], names: Mapping[str, str], settings: Mapping[str, Any], notes: Sequence[str] = ()
) -> str:
    """The page.

    Args:
        entries: rows with pictures; of each guidance scale the reference first.
        names: short names of the solvers.
        settings: what was compared.
        notes: what was left out and why.
    """
    groups = _groups(entries)
    templates = Environment(
        loader=PackageLoader("evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("report.html").render(
        summary=" ".join(summary(settings)),
        notes=notes,
        table=_table([entry.row for entry in entries], names),
        groups=[_group(group, names, len(groups) > 1) for group in groups],
        solvers=[_solver(entry, names) for entry in _distinct(entries)],
    )


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    scales = dict.fromkeys(entry.row["guidance"] for entry in entries)
    return [[entry for entry in entries if entry.row["guidance"] == scale] for scale in scales]


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """One entry per solver, whatever the guidance."""
    return list({entry.row["solver"]: entry for entry in reversed(entries)}.values())[::-1]


def _table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any]:
    columns = shown_columns(rows)
    best = {name: _best(rows, name) for name in columns if name.partition("@")[0] in ("fd", "kid", "rmse")}
    return {
        "columns": [{"title": title(name), "hint": hint(name)} for name in columns],
        "rows": [
            {
                "is_reference": row["is_reference"],
                "solver": row["solver"],
                "label": label(row, names),
                "cells": [_cell(row, name, best.get(name) is row) for name in columns if name != "solver"],
            }
            for row in rows
        ],
    }


def _best(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    measured = [row for row in rows if row.get(name) is not None and not row["is_reference"]]
    return min(measured, key=lambda row: row[name]) if len(measured) > 1 else None


def _cell(row: Mapping[str, Any], name: str, is_best: bool) -> dict[str, Any]:
    value = "" if row.get(name) is None else row[name]
    return {"value": value, "text": cell(row, name), "interval": interval(row, name), "is_best": is_best}


def _group(group: Sequence[Entry], names: Mapping[str, str], is_one_of_several: bool) -> dict[str, Any]:
    scale = f"guidance {group[0].row['guidance']:g}" if is_one_of_several else ""
    return {
        "suffix": f", {scale}" if scale else "",
        "findings": _findings(group, names, scale),
        "quality": [figure for metric in ("fd", "rmse") if (figure := _quality(group, names, metric))],
        "strips": [_strip(entry, names) for entry in group],
        "trajectories": trajectory_chart(group, names),
        "legend": [(family, color_class(color)) for family, color in family_colors(group, names).items()],
    }


def _findings(group: Sequence[Entry], names: Mapping[str, str], scale: str) -> list[dict[str, Any]]:
    """The best solver by each metric, and whose intervals overlap its own."""
    found = []
    for metric, target in (("fd", "the data"), ("rmse", names[group[0].row["solver"]])):
        measured = _measured(group, metric)
        if not measured:
            continue
        best = min(measured, key=lambda row: row[metric])
        claim = f"{scale}: closest to {target}" if scale else f"closest to {target}"
        figure = f"{title(metric)} {best[metric]:.4g} with {best['nfe']} evaluations"
        rivals = [names[row["solver"]] for row in _rivals(best, measured, metric)]
        found.append(
            {"claim": claim[0].upper() + claim[1:], "solver": names[best["solver"]], "figure": figure, "rivals": rivals}
        )
    return found


def _measured(group: Sequence[Entry], metric: str) -> list[dict[str, Any]]:
    return [entry.row for entry in group if not entry.row["is_reference"] and entry.row[metric] is not None]


def _rivals(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """Solvers whose interval overlaps the best one's."""
    high = best.get(f"{metric}_high")
    return [] if high is None else [row for row in rows if row is not best and row[f"{metric}_low"] <= high]


def _quality(group: Sequence[Entry], names: Mapping[str, str], metric: str) -> dict[str, str] | None:
    """The chart; Frechet distances far above the reference's are named below it, or they would flatten the others."""
    measured = _measured(group, metric)
    if not measured:
        return None
    floor = group[0].row["fd"] if metric == "fd" else None
    near = [row for row in measured if not floor or row[metric] <= _FARTHEST * floor]
    far = [f"{names[row['solver']]} ({row[metric]:.3g})" for row in measured if near and row not in near]
    caption = f"Above {_FARTHEST} times the reference: {', '.join(far)}" if far else ""
    return {"chart": quality_chart(group, near or measured, names, metric), "far": caption}


def _strip(entry: Entry, names: Mapping[str, str]) -> dict[str, Any]:
    row, images = entry.row, entry.images[:_SHOWN]
    return {
        "label": label(row, names),
        "evaluations": row["nfe"],
        "rmse": "" if row["is_reference"] else f"{row['rmse']:.3g}",
        "picture": png_address(images),
        "count": len(images),
    }


def png_address(images: Tensor) -> str:
    """A data address of the images in one row; the browser enlarges them."""
    content = io.BytesIO()
    Image.fromarray(image_grid(images, len(images), scale=1)).save(content, "png")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _solver(entry: Entry, names: Mapping[str, str]) -> dict[str, Any]:
    table, row = entry.contender.table.detach(), entry.row
    facts = [f"{row['nfe']} evaluations", str(row["method"])]
    facts += [f"{row['unused_evaluations']} of them unused"] * bool(row["unused_evaluations"])
    facts += ["stochastic"] * row["stochastic"]
    return {
        "label": label(row, names),
        "facts": facts,
        "is_open": row["method"] != "baseline",
        "num_rows": table.num_rows,
        "coefficients": coefficients_chart(table),
        "timesteps": timesteps_chart(table),
    }
