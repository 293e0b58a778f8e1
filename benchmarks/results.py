"""Every solver on both base models: docs/results.json, and the tables and the picture of docs/results.md.

    python benchmarks/results.py                                  # or `make results`: hours on a CPU
    python benchmarks/results.py --models cifar10-dit --guidance 1

Compared are the solvers of diffusers and every artifact in checkpoints/solvers (and of students in checkpoints) that
was made for the model and the guidance scale; --solvers adds others, such as a run's. A run that was stopped goes on
where it was; the text of docs/results.md between the tables is left alone. Figures of models or scales that are not
asked for stay as they are.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers import load_denoiser
from evaluation.args import CompareArgs
from evaluation.compare import compare
from solvers import load_solver, resolve_solver
from solvers.files import atomic_write
from solvers.identity import guidance_fits
from training.arguments import guarded

ROOT = Path(__file__).resolve().parent.parent
BASELINES = {
    "cifar10-dit": ("ddim", "dpmpp", "unipc", "deis", "ipndm"),
    "cifar10-sit": ("euler", "heun", "dpmpp", "unipc", "ipndm"),
}
PUBLISHED = {"cifar10-dit": "vp", "cifar10-sit": "flow"}
NFES = (4, 5, 6, 8, 10)
KEPT = tuple(f"{metric}{end}" for metric in ("fd", "kid", "rmse") for end in ("", "_low", "_high"))
END = "<!-- end -->"
TABLES = (("fd", "Frechet distance", 2), ("kid", "KID x 1000", 2), ("rmse", "RMSE to the teacher", 4))


def main(arguments: list[str] | None = None) -> None:
    """Compare, then write."""
    options = _parser().parse_args(arguments)
    text = options.markdown.read_text()
    for model in options.models:
        for scale in options.guidance:
            _section(text, model, scale)  # before hours of work
    for model in options.models:
        for scale in options.guidance:
            rows = _compared(model, scale, options)
            _keep(options.json, model, scale, rows)
            rewrite(options.markdown, json.loads(options.json.read_text()))
    draw(json.loads(options.json.read_text()), options.json.with_suffix(".png"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 1.5])
    parser.add_argument("--nfe", nargs="+", type=int, default=list(NFES))
    parser.add_argument(
        "--solvers", nargs="+", default=[], metavar="PATH", help="further artifacts, of one model and scale"
    )
    parser.add_argument("--num_samples", type=int, default=1000, help="images per row")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--output", type=Path, default=Path("runs/results"), help="folder of the comparisons")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "results.md")
    return parser


def _compared(model: str, scale: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    args = CompareArgs(
        f"checkpoints/{model}",
        [*baselines(model, options.nfe), *artifacts(model, scale, options.nfe), *options.solvers],
        output=str(options.output / f"{model}-g{scale:g}-{options.precision}"),
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        guidance_scale=scale,
        precision=options.precision,
    )
    return compare(args)


def baselines(model: str, nfes: Sequence[int], folder: Path = Path("checkpoints")) -> list[str]:
    """diffusers' solvers with so many evaluations; Heun's, which come in odd numbers, with at most so many."""
    schedule = load_denoiser(folder / model).schedule
    names = [f"{name}:{nfe}" for name in BASELINES[model] for nfe in nfes]
    return list({(family(name), resolve_solver(name, schedule).nfe): name for name in reversed(names)}.values())[::-1]


def artifacts(model: str, scale: float, nfes: Sequence[int], folder: Path = Path("checkpoints")) -> list[str]:
    """Paths of the artifacts for a guidance scale: the model's own, published ones, and its students' at any NFE."""
    own = sorted((folder / "solvers" / model).rglob("*.json"))
    published = sorted((folder / "solvers" / "published").glob(f"{PUBLISHED[model]}-*.json"))
    solvers = [path for path in own + published if load_solver(path).nfe in nfes]
    students = sorted(folder.glob(f"{model}-*/slam-*.json"))
    fitting = [str(path) for path in solvers + students if guidance_fits(_scale(load_solver(path).info), scale)]
    return sorted(fitting, key=lambda path: (Path(path).parent, family(path), load_solver(path).nfe))


def _scale(info: dict[str, Any]) -> Any:
    """The guidance scale that images stand for; a student's is its teacher's."""
    own = info["guidance_scale"]
    return info["fitted_on"].get("guidance_scale", own) if info["student"] else own


def _keep(path: Path, model: str, scale: float, rows: Sequence[dict[str, Any]]) -> None:
    """Replace this model's figures at this scale."""
    known = json.loads(path.read_text()) if path.is_file() else []
    others = [row for row in known if (row["model"], row["guidance"]) != (model, scale)]
    mine = [
        {"model": model, "guidance": scale, "solver": row["solver"], "method": row["method"], "nfe": row["nfe"]}
        | {"num_images": row["num_images"], "is_reference": row["is_reference"]}
        | {name: row.get(name) for name in KEPT}
        for row in rows
    ]
    ordered = sorted(others + mine, key=lambda row: (row["model"], row["guidance"]))
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(ordered, indent=1) + "\n")


def rewrite(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the tables between their markers, `<!-- table MODEL GUIDANCE -->` and `<!-- end -->`."""
    text = path.read_text()
    for model, scale in dict.fromkeys((row["model"], row["guidance"]) for row in rows):
        part = tables([row for row in rows if (row["model"], row["guidance"]) == (model, scale)])
        text = text.replace(_section(text, model, scale), f"{_marker(model, scale)}\n{part}\n{END}")
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def _marker(model: str, scale: float) -> str:
    return f"<!-- table {model} {scale:g} -->"


def _section(text: str, model: str, scale: float) -> str:
    """The part of a document from a marker to the next end."""
    marker = _marker(model, scale)
    found = re.search(re.escape(marker) + f".*?{END}", text, re.DOTALL)
    if found is None:
        raise ValueError(f"there is no {marker} ... {END} in the document: add it where the tables should stand")
    return found[0]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each metric: a line per solver, a column per number of evaluations; the best of several is bold."""
    reference = next(row for row in rows if row["is_reference"])
    others = [row for row in rows if not row["is_reference"]]
    counts = sorted({row["nfe"] for row in others})
    families = list(dict.fromkeys(family(row["solver"]) for row in others))
    cells_of = {(family(row["solver"]), row["nfe"]): row for row in others}
    parts = [f"{reference['num_images']} images per row; the teacher is {reference['solver']}."]
    for metric, title, digits in TABLES:
        if reference.get(metric) is None:
            continue
        lines = [f"| {title} | {' | '.join(f'NFE {count}' for count in counts)} |", "|---|" + "---:|" * len(counts)]
        values = {count: _values(others, metric, count) for count in counts}
        best = {count: min(found) if len(found) > 1 else None for count, found in values.items()}
        for name in families:
            cells = [_cell(cells_of.get((name, count)), metric, digits, best[count]) for count in counts]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if metric != "rmse":
            shown = _cell(reference, metric, digits, None)
            lines.append(f"| teacher, {reference['nfe']} evaluations | {shown} |" + " |" * (len(counts) - 1))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def family(solver: str) -> str:
    """A solver's name without its number of evaluations."""
    if not solver.endswith(".json"):
        return re.sub(r"(@\w+)?:\d+$", r"\1", solver)
    path = Path(solver)
    parent = path.parent.name
    if parent in BASELINES or parent.startswith("guidance-"):
        parent = ""
    return f"{parent}/{re.sub('-[0-9]+$', '', path.stem)}".lstrip("/")


def _values(rows: Iterable[dict[str, Any]], metric: str, count: int) -> list[float]:
    return [row[metric] for row in rows if row["nfe"] == count and row[metric] is not None]


def _cell(row: dict[str, Any] | None, metric: str, digits: int, best: float | None) -> str:
    if row is None or row[metric] is None:
        return ""
    scale = 1000 if metric == "kid" else 1
    text = f"{row[metric] * scale:.{digits}f}"
    text = f"**{text}**" if row[metric] == best else text
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    return text if low is None else f"{text} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Frechet distance against evaluations, a panel per model and scale, cut off at three times the teacher's."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["model"], row["guidance"]) for row in rows))
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(7.2 * columns, 5.2 * lines), layout="constrained")
    for index, (model, scale) in enumerate(groups):
        axes = figure.add_subplot(lines, columns, index + 1)
        mine = [row for row in rows if (row["model"], row["guidance"]) == (model, scale) and row["fd"] is not None]
        solvers = [row for row in mine if not row["is_reference"]]
        for color, name in enumerate(dict.fromkeys(family(row["solver"]) for row in solvers)):
            points = sorted((row["nfe"], row["fd"], row["method"]) for row in solvers if family(row["solver"]) == name)
            style = ("x", ":") if points[0][2] == "baseline" else ("o", "-")
            counts, distances, _ = zip(*points)
            axes.plot(counts, distances, *style[:1], linestyle=style[1], label=name, color=colormaps["tab20"](color))
        for row in (row for row in mine if row["is_reference"]):
            axes.axhline(row["fd"], color="black", linewidth=1, label=f"teacher, {row['nfe']} evaluations")
            axes.set_ylim(0.9 * row["fd"], 3 * row["fd"])
        axes.set(xlabel="network evaluations", ylabel="Frechet distance", title=f"{model}, guidance {scale:g}")
        axes.set_xticks(sorted({row["nfe"] for row in solvers}))
        axes.grid(alpha=0.3)
        if mine:
            axes.legend(fontsize=8, ncols=2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    guarded(main)
