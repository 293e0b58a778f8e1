"""The files of a comparison: report.json, report.md, report.html, comparison.png."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.columns import cell, hint, interval, label, shown_columns, summary, title
from evaluation.comparison import Entry
from evaluation.contenders import display_names
from evaluation.html import report_html
from evaluation.pictures import image_grid, to_uint8
from solvers.files import atomic_write

_COLUMNS = 12  # of the picture


def write_report(
    output: str | Path, entries: Sequence[Entry], settings: Mapping[str, Any], notes: Sequence[str] = ()
) -> None:
    """Write all files of a comparison.

    Args:
        output: folder.
        entries: the rows, the reference first.
        settings: what was compared, for the text.
        notes: what was left out and why.
    """
    output, names = Path(output), display_names([entry.row["solver"] for entry in entries])
    rows = [entry.row for entry in entries]
    with atomic_write(output / "comparison.png") as path:
        comparison_picture(entries, names).save(path)
    with atomic_write(output / "report.md") as path:
        path.write_text(report_markdown(rows, names, settings, notes))
    with atomic_write(output / "report.html") as path:
        path.write_text(report_html(entries, names, settings, notes), encoding="utf-8")
    with atomic_write(output / "report.json") as path:
        path.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")


def report_markdown(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """The table as Markdown."""
    columns = shown_columns(rows)
    lines = ["# Comparison", "", *map(_plain, summary(settings)), ""]
    lines.append("| " + " | ".join(map(title, columns)) + " |")
    lines.append("|" + "|".join("---" if name == "solver" else "---:" for name in columns) + "|")
    for row in rows:
        cells = [_plain(label(row, names)) if name == "solver" else _with_interval(row, name) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    hints = [f"{title(name)}: {hint(name)}" for name in columns if hint(name)]
    return "\n".join([*lines, "", "; ".join(hints) + ".", "", *map(_plain, notes)]).rstrip() + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names of solvers and data come from files."""
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", " ".join(text.split()))


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    around = interval(row, name)
    return f"{cell(row, name)} ({around})" if around else cell(row, name)


def comparison_picture(entries: Sequence[Entry], names: Mapping[str, str]) -> Image.Image:
    """One labelled row of images per solver; each column starts from the same noise."""
    several = len({entry.row["guidance"] for entry in entries}) > 1
    labels = []
    for entry in entries:
        row = entry.row
        second = f"{row['nfe']} network calls" + (f", guidance {row['guidance']:g}" if several else "")
        labels.append(f"{label(row, names)}\n{second}")
    scale = max(1, round(64 / to_uint8(entries[0].images[:1]).shape[1]))
    strips = [image_grid(entry.images[:_COLUMNS], min(_COLUMNS, len(entry.images)), scale) for entry in entries]
    font = ImageFont.load_default(13)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = int(max(probe.multiline_textbbox((0, 0), text, font=font)[2] for text in labels)) + 16
    body = Image.fromarray(np.concatenate(strips))
    picture = Image.new("RGB", (margin + body.width, body.height), "white")
    picture.paste(body, (margin, 0))
    drawing = ImageDraw.Draw(picture)
    for index, text in enumerate(labels):
        middle = (index + 0.5) * body.height / len(labels)
        drawing.multiline_text((8, middle), text, fill="black", font=font, anchor="lm")
    return picture


def log_report(output: str | Path, entries: Sequence[Entry]) -> None:
    """Log the table and the pictures of a written report to W&B, offline when not logged in."""
    import wandb

    rows = [entry.row for entry in entries]
    names = sorted({name for row in rows for name in row})
    project, mode = "learned-diffusion-solvers", None if wandb.api.api_key else "offline"
    with wandb.init(project=project, job_type="compare", name=Path(output).name, mode=mode) as run:
        table = wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in rows])
        html = wandb.Html(Path(output, "report.html").read_text(encoding="utf-8"))
        picture = wandb.Image(str(Path(output, "comparison.png")))
        run.log({"comparison": table, "pictures": picture, "report": html})
