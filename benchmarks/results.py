"""Every solver on the base models: docs/results.json, and the tables and the picture of docs/results.md.

    python benchmarks/results.py                                  # or `make results`: hours on a CPU
    python benchmarks/results.py --models fashion-sit --guidance 1

At equal numbers of network calls are compared the solvers of diffusers, the grids of other works, and every artifact in
checkpoints/solvers (and of students in checkpoints) that was made for the model and the guidance scale; --solvers adds
others, such as a run's, and --only measures some beside the figures that stand. A run that was stopped goes on where it
was; the text of docs/results.md between the tables is left alone. Figures of models, scales or numbers of calls that
are not asked for stay as they are.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers import calls_per_row, load_denoiser, network_calls
from evaluation.args import CompareArgs
from evaluation.compare import compare
from solvers import NoiseSchedule, load_solver, resolve_solver
from solvers.files import atomic_write
from solvers.identity import guidance_fits
from training.arguments import guarded

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """A model at a guidance scale.

    Args:
        teacher: solver whose images errors are measured against.
        calls: numbers of network calls that are compared.
    """

    teacher: str
    calls: tuple[int, ...]


GUIDED = (4, 6, 8, 10, 16)
CASES = {
    ("fashion-sit", 1.0): Case("unipc:30", (3, 4, 5, 6, 8, 10)),
    ("fashion-sit", 2.0): Case("unipc:30", (1, 2, *GUIDED)),
    ("fashion-sit", 4.0): Case("unipc:30", GUIDED[1:]),
    ("fashion-dit", 1.0): Case("unipc:30", (3, 4, 5, 6, 8, 10)),
    ("fashion-dit", 2.0): Case("unipc:30", GUIDED),
    ("fashion-dit", 4.0): Case("unipc:30", GUIDED[1:]),
    ("cifar10-dit", 1.0): Case("unipc:30", (4, 5, 6, 8, 10)),
    ("cifar10-dit", 1.5): Case("unipc:30", GUIDED),
    ("cifar10-dit", 4.0): Case("unipc:30", GUIDED[1:]),
    ("cifar10-sit", 1.0): Case("unipc:30", (4, 5, 6, 8, 10)),
    ("cifar10-sit", 1.5): Case("unipc:30", (1, 2, *GUIDED)),
    ("cifar10-sit", 4.0): Case("unipc:30", GUIDED[1:]),
}
MODELS = list(dict.fromkeys(model for model, _ in CASES))
GRIDS = ("ipndm@karras", "ipndm@ays", "ipndm@dmn", "unipc@dmn")
BASELINES = {
    "discrete_vp": ("ddim", "dpmpp", "unipc", "deis", *GRIDS),
    "flow": ("euler", "dpmpp", "unipc", "ipndm", *GRIDS),
}
PUBLISHED = {"discrete_vp": "vp", "flow": "flow"}
FIGURES = ("fd", "kid", "rmse", "median", "p99", "worst", "seconds")
ENDS = ("", "_low", "_high")
LEARNED = ("olss", "solver_search", "timestep_tuner")
CLASSICAL = ("baseline", "gits")
TARGETS, END = "<!-- targets -->", "<!-- end -->"
TABLES = (
    ("Frechet distance", ("fd",), 3),
    ("KID x 1000", ("kid",), 2),
    ("RMSE to the teacher", ("rmse",), 4),
    ("Median, 99th percentile, worst image", ("median", "p99", "worst"), 3),
)


def main(arguments: list[str] | None = None) -> None:
    """Compare, then write."""
    options = _parser().parse_args(arguments)
    text = options.markdown.read_text()
    cases = [case for case in CASES if case[0] in options.models and case[1] in (options.guidance or [case[1]])]
    if not cases:
        raise ValueError(f"no case of {options.models} has a guidance scale of {options.guidance}")
    for model, scale in cases:
        _section(text, _marker(model, scale))  # before hours of work
        if options.only or options.calls:
            _check_images(options, model, scale)
    for number, (model, scale) in enumerate(cases, 1):
        print(f"{model}, guidance {scale:g}: {number} of {len(cases)}", flush=True)
        rows = _compared(model, scale, options)
        _keep(options, model, scale, rows)
        rewrite(options.markdown, json.loads(options.json.read_text()))
    draw(json.loads(options.json.read_text()), options.json.with_suffix(".png"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--guidance", nargs="+", type=float, help="scales; default: all that a model has here")
    parser.add_argument("--calls", nargs="+", type=int, help="numbers of network calls; default: those of the case")
    parser.add_argument(
        "--solvers", nargs="+", default=[], metavar="PATH", help="further artifacts, of one model and scale"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SOLVER", help="measure these alone; all other figures stay"
    )
    parser.add_argument("--num_samples", type=int, default=5000, help="images per row")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--output", type=Path, default=Path("runs/results"), help="folder of the comparisons")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "results.md")
    return parser


def _compared(model: str, scale: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    case = CASES[model, scale]
    calls = options.calls or case.calls
    denoiser = load_denoiser(f"checkpoints/{model}", scale)
    args = CompareArgs(
        f"checkpoints/{model}",
        options.only
        or [
            *baselines(denoiser.schedule, calls, calls_per_row(denoiser)),
            *artifacts(model, scale, calls, denoiser),
            *options.solvers,
        ],
        reference=case.teacher,
        output=str(options.output / f"{model}-g{scale:g}-{options.precision}{_chosen(options)}"),
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        guidance_scale=scale,
        precision=options.precision,
    )
    return compare(args)


def _chosen(options: argparse.Namespace) -> str:
    """A folder of their own for some calls or some rows: a comparison that is there does not get fewer solvers."""
    chosen = [*(options.calls or ()), *sorted(options.only)]
    return f"-{hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]}" if chosen else ""


def baselines(schedule: NoiseSchedule, calls: Sequence[int], each: int = 1) -> list[str]:
    """Solvers by name of so many network calls.

    Args:
        schedule: of the model.
        calls: numbers of network calls.
        each: calls of an evaluation; what they do not divide is left out.
    """
    found = []
    for name in BASELINES[schedule.kind]:
        for rows in (count // each for count in calls if count % each == 0):
            try:
                found += [f"{name}:{rows}"] * (resolve_solver(f"{name}:{rows}", schedule).nfe == rows)
            except ValueError:  # a solver or a grid that has no such number
                continue
    return found


def artifacts(
    model: str, scale: float, calls: Sequence[int], denoiser: Any, folder: Path = Path("checkpoints")
) -> list[str]:
    """Paths of the artifacts for a guidance scale: the model's own, published ones, and its students'."""
    own = sorted((folder / "solvers" / model).rglob("*.json"))
    published = sorted((folder / "solvers" / "published").glob(f"{PUBLISHED[denoiser.schedule.kind]}-*.json"))
    students = sorted(folder.glob(f"{model}-*/slam-*.json"))
    found = {}
    for path in own + published + students:
        table = load_solver(path)
        count = table.nfe if table.info["student"] else network_calls(table, denoiser)
        if count in calls and guidance_fits(_scale(table.info), scale):
            found[str(path)] = count
    return sorted(found, key=lambda path: (Path(path).parent, family(path), found[path]))


def _scale(info: dict[str, Any]) -> Any:
    """The guidance scale that images stand for; a student's is its teacher's."""
    own = info["guidance_scale"]
    return info["fitted_on"].get("guidance_scale", own) if info["student"] else own


def _check_images(options: argparse.Namespace, model: str, scale: float) -> None:
    """Figures of other numbers of images cannot stand in one table."""
    known = [row for row in _known(options.json) if (row["model"], row["guidance"]) == (model, scale)]
    counts = {row["num_images"] for row in known if row["is_reference"]}
    if counts != {options.num_samples} and (counts or options.only):
        there = f"figures of {', '.join(map(str, counts))} images" if counts else "none of them"
        raise ValueError(
            f"{'--only' if options.only else '--calls'} adds to the figures of {model} at guidance {scale:g}, but "
            f"{options.json} has {there}, and --num_samples is {options.num_samples}"
        )


def _known(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def _keep(options: argparse.Namespace, model: str, scale: float, rows: Sequence[dict[str, Any]]) -> None:
    """Replace this model's figures at this scale: all of them, those of the same solvers, or those of some calls."""
    known = _known(options.json)
    there = [row for row in known if (row["model"], row["guidance"]) == (model, scale)]
    others = [row for row in known if row not in there]
    if options.only or options.calls:
        if any(row["is_reference"] for row in there):
            rows = [row for row in rows if not row["is_reference"]]
        measured = {row["solver"] for row in rows}
        there = [row for row in there if row["solver"] not in measured]
        others += [row for row in there if options.only or row["is_reference"] or row["nfe"] not in options.calls]
    mine = [
        {"model": model, "guidance": scale, "solver": row["solver"], "method": row["method"], "nfe": row["nfe"]}
        | {"num_images": row["num_images"], "is_reference": row["is_reference"]}
        | {f"{name}{end}": row[f"{name}{end}"] for name in FIGURES for end in ENDS if f"{name}{end}" in row}
        for row in rows
    ]
    ordered = sorted(others + mine, key=lambda row: (row["model"], row["guidance"]))
    with atomic_write(options.json) as temporary:
        temporary.write_text(json.dumps(ordered, indent=1) + "\n")


def rewrite(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the tables between their markers, `<!-- table MODEL GUIDANCE -->` and `<!-- end -->`; and the targets."""
    text = path.read_text()
    parts = {_marker(model, scale): tables(mine) for (model, scale), mine in grouped(rows).items()}
    if TARGETS in text:
        parts[TARGETS] = targets(rows)
    for marker, part in parts.items():
        text = text.replace(_section(text, marker), f"{marker}\n{part}\n{END}")
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Rows by model and guidance scale."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["guidance"]), []).append(row)
    return found


def _marker(model: str, scale: float) -> str:
    return f"<!-- table {model} {scale:g} -->"


def _section(text: str, marker: str) -> str:
    """The part of a document from a marker to the next end."""
    found = re.search(re.escape(marker) + f".*?{END}", text, re.DOTALL)
    if found is None:
        raise ValueError(f"there is no {marker} ... {END} in the document: add it where the tables should stand")
    return found[0]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Some tables: a line per solver, a column per number of network calls; the best of several is bold."""
    reference = next(row for row in rows if row["is_reference"])
    others = [row for row in rows if not row["is_reference"]]
    counts = sorted({row["nfe"] for row in others})
    families = list(dict.fromkeys(family(row["solver"]) for row in others))
    cells_of = {(family(row["solver"]), row["nfe"]): row for row in others}
    parts = [f"{reference['num_images']} images per row; the teacher is {reference['solver']}."]
    for title, metrics, digits in TABLES:
        if reference.get(metrics[0]) is None:
            continue
        lines = [f"| {title} | {' | '.join(f'{n} calls' for n in counts)} |", "|---|" + "---:|" * len(counts)]
        known = [row for row in others if row.get(metrics[0]) is not None]
        values = {n: [row[metrics[0]] for row in known if row["nfe"] == n] for n in counts}
        best = {n: min(found) if len(found) > 1 and len(metrics) == 1 else None for n, found in values.items()}
        for name in families:
            cells = [_cell(cells_of.get((name, n)), metrics, digits, best[n]) for n in counts]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if metrics[0] in ("fd", "kid"):
            shown = _cell(reference, metrics, digits, None)
            lines.append(f"| teacher, {reference['nfe']} calls | {shown} |" + " |" * (len(counts) - 1))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def targets(rows: Sequence[dict[str, Any]]) -> str:
    """What is asked of learned solvers, a line for each model and scale; what is reached is bold.

    Asked are: a Frechet distance of 5 evaluations no higher than that of any classical solver of 8; of 10 calls at most
    3 % above the teacher's; and at each number of calls a worst image, of the learned solver with the lowest error, no
    farther from the teacher's than UniPC's.
    """
    lines = [
        "| model, guidance | learned, 5 evaluations | best classical, 8 | 10 calls over the teacher | worst image |",
        "|---|---:|---:|---:|---|",
    ]
    return "\n".join(lines + [_target_line(*case, mine) for case, mine in grouped(rows).items()])


def _target_line(model: str, scale: float, rows: Sequence[dict[str, Any]]) -> str:
    each = 1 if scale == 1 else 2
    teacher = next(row for row in rows if row["is_reference"])
    learned = [row for row in rows if row["method"] in LEARNED and f"/{model}/" in row["solver"]]
    classical = [row for row in rows if row["method"] in CLASSICAL and not row["is_reference"]]
    mine, other, ten = _lowest(learned, 5 * each), _lowest(classical, 8 * each), _lowest(learned, 10)
    reached = mine["fd"] if mine and other and mine["fd"] <= other["fd"] else None
    named = f"{_cell(other, ('fd',), 3, None)}, {family(other['solver'])}" if other else ""
    over = f"{100 * (ten['fd'] / teacher['fd'] - 1):+.1f} %" if ten else ""
    over = f"**{over}**" if ten and ten["fd"] <= 1.03 * teacher["fd"] else over
    return f"| {model}, {scale:g} | {_cell(mine, ('fd',), 3, reached)} | {named} | {over} | {_tail(learned, rows)} |"


def _tail(learned: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of calls at which the learned worst image is no farther than UniPC's, and those at which it is."""
    nearer, farther = [], []
    for unipc in (row for row in rows if family(row["solver"]) == "unipc" and not row["is_reference"]):
        mine = _lowest(learned, unipc["nfe"], "rmse")
        if mine is None or "worst" not in mine:
            continue
        if mine["worst"] <= unipc["worst"]:
            nearer.append(f"{unipc['nfe']}")
        else:
            farther.append(f"{unipc['nfe']} ({mine['worst']:.3f} against {unipc['worst']:.3f})")
    if not farther:
        return f"**nearer with {', '.join(nearer)}**" if nearer else ""
    return f"nearer with {', '.join(nearer) or 'none'}, not with {', '.join(farther)}"


def _lowest(rows: Sequence[dict[str, Any]], nfe: int, metric: str = "fd") -> dict[str, Any] | None:
    """The best row of so many network calls."""
    found = [row for row in rows if row["nfe"] == nfe and row.get(metric) is not None]
    return min(found, key=lambda row: row[metric], default=None)


def family(solver: str) -> str:
    """A solver's name without its number of evaluations."""
    if not solver.endswith(".json"):
        return re.sub(r"(@\w+)?:\d+$", r"\1", solver)
    path = Path(solver)
    parent = path.parent.name
    if parent in MODELS or parent.startswith("guidance-"):
        parent = ""
    return f"{parent}/{re.sub('-[0-9]+$', '', path.stem)}".lstrip("/")


def _cell(row: dict[str, Any] | None, metrics: Sequence[str], digits: int, best: float | None) -> str:
    """One figure with its interval, or several."""
    if row is None or row.get(metrics[0]) is None:
        return ""
    scale = 1000 if metrics[0] == "kid" else 1
    digits -= metrics[0] == "fd" and row["fd"] >= 1
    text = " / ".join(f"{row[name] * scale:.{digits}f}" for name in metrics)
    text = f"**{text}**" if row[metrics[0]] == best else text
    low, high = (row.get(f"{metrics[0]}{end}") for end in ENDS[1:])
    if low is None or len(metrics) > 1:
        return text
    return f"{text} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Frechet distance against network calls, a panel per model and scale, cut off at three times the teacher's.

    A family of solvers has one color in all panels.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = grouped(rows)
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    families = dict.fromkeys(family(row["solver"]) for row in rows if not row["is_reference"])
    colors = {name: colormaps["tab20"](index % 20) for index, name in enumerate(families)}
    figure = Figure(figsize=(7.2 * columns, 5.2 * lines), layout="constrained")
    for index, ((model, scale), group) in enumerate(groups.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        mine = [row for row in group if row.get("fd") is not None]
        solvers = [row for row in mine if not row["is_reference"]]
        for name in dict.fromkeys(family(row["solver"]) for row in solvers):
            points = sorted((row["nfe"], row["fd"], row["method"]) for row in solvers if family(row["solver"]) == name)
            style = ("x", ":") if points[0][2] == "baseline" else ("o", "-")
            counts, distances, _ = zip(*points)
            axes.plot(counts, distances, *style[:1], linestyle=style[1], label=name, color=colors[name])
        for row in (row for row in mine if row["is_reference"]):
            axes.axhline(row["fd"], color="black", linewidth=1, label=f"teacher, {row['nfe']} calls")
            axes.set_ylim(0.9 * min(other["fd"] for other in mine), 3 * row["fd"])
        axes.set(xlabel="network calls", ylabel="Frechet distance", title=f"{model}, guidance {scale:g}")
        axes.set_xticks(sorted({row["nfe"] for row in solvers}))
        axes.grid(alpha=0.3)
        if mine:
            axes.legend(fontsize=8, ncols=2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    guarded(main)
