"""report.html of a run: what was learned, how near it comes, and how its pictures look."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from torch import Tensor
from torch.nn.functional import avg_pool2d

from data.shards import Trajectories
from evaluation.html import png_address
from evaluation.svg import Chart, Series
from learn.candidates import TITLES
from learn.judge import Choice, Judge, Judged
from learn.subject import Subject
from solvers.files import atomic_write

COLUMNS = (
    "calls",
    "solver",
    "rows",
    "error",
    "best classical",
    "its error",
    "as near as",
    "ms / call",
    "its ms / call",
)
LARGEST = 256  # pixels of a picture
ORDER = ("ddim", "euler", "dpmpp", "unipc", "ipndm")  # colours of the classical solvers


def write_report(
    folder: Path,
    subject: Subject,
    judge: Judge,
    choices: Sequence[Choice],
    rows: Sequence[Mapping[str, Any]],
    spent: str,
    usage: Sequence[str],
) -> None:
    """Write the page, one file that works offline.

    Args:
        folder: of the run.
        subject: the model.
        judge: with the yardstick's errors.
        choices: what is handed out.
        rows: the same as plain figures.
        spent: what the run took, in words.
        usage: lines of Python.
    """
    loader = ChoiceLoader([PackageLoader("learn"), PackageLoader("evaluation")])
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = templates.get_template("learn.html").render(
        name=subject.name,
        about=about(subject, len(judge.reporting)),
        findings=[sentence(row, judge.yardstick_title) for row in rows],
        columns=COLUMNS,
        rows=[_cells(row, judge.yardstick_title) for row in rows],
        chart=error_chart(judge, choices),
        strips=_strips(subject, judge, choices),
        spent=spent,
        usage="\n".join(usage),
    )
    with atomic_write(folder / "report.html") as path:
        path.write_text(text, encoding="utf-8")


def about(subject: Subject, count: int) -> str:
    """What errors are measured on."""
    guidance = "" if subject.guidance_scale == 1 else f" at guidance {subject.guidance_scale:g}"
    return (
        f"{subject.name}{guidance}. The teacher is {subject.teacher_name}, {subject.teacher_calls} network calls an "
        f"image. Errors are root-mean-square differences to its images from the same noise, the mean over {count} "
        "noises that neither a fit nor a choice has seen, \N{PLUS-MINUS SIGN} its standard error."
    )


def sentence(row: Mapping[str, Any], yardstick: str) -> str:
    """What a number of calls is worth."""
    if row["as_near_as"] is None:
        equal = f"nearer to the teacher than as many calls of {yardstick} as the teacher makes"
    else:
        equal = f"as near to the teacher as {row['as_near_as']} of {yardstick}"
    if row["is_learned"]:
        return f"{row['calls']} calls of the learned solver are {equal} (error {_error(row)})."
    return f"With {row['calls']} calls no learned solver is handed out, {TITLES[row['solver']]} is: {row['reason']}."


def error_chart(judge: Judge, choices: Sequence[Choice]) -> str:
    """Errors against network calls."""
    named = {name: index + 1 for index, name in enumerate(ORDER)}
    points: dict[str, dict[int, float]] = {name: {} for name in ORDER}
    points[judge.yardstick_name] |= dict(judge.curve())
    for one in (one for choice in choices for one in choice.judged if not one.candidate.is_learned):
        points[one.candidate.name][one.candidate.calls] = one.error
    series = [
        Series(TITLES[name], *_line(found), named[name], labels=_end(found, TITLES[name]))
        for name, found in points.items()
    ]
    learned = {choice.calls: choice.taken.error for choice in choices if choice.taken.candidate.is_learned}
    series.append(Series("learned", *_line(learned), 0, labels=_end(learned, "learned")))
    values = [value for one in series for value in one.y]
    shown = [Series(s.name, s.x, [max(y, 1e-6) for y in s.y], s.color, labels=s.labels) for s in series if len(s.x)]
    ticks = sorted({calls for found in (*points.values(), learned) for calls in found})
    log = min(values) > 0 and max(values) > 4 * min(values)
    return Chart(shown, "network calls an image", "error to the teacher", log_y=log, x_ticks=_sparse(ticks)).svg()


def _error(row: Mapping[str, Any]) -> str:
    return f"{row['error']:.4f} \N{PLUS-MINUS SIGN} {row['standard_error']:.4f}"


def _line(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    ordered = sorted(points.items())
    return [calls for calls, _ in ordered], [error for _, error in ordered]


def _end(points: Mapping[int, float], title: str) -> list[str]:
    return [""] * (len(points) - 1) + [title] * bool(points)


def _sparse(ticks: Sequence[int]) -> list[int]:
    """At most a dozen of them."""
    return list(ticks[:: -(-len(ticks) // 12)]) if ticks else []


def _cells(row: Mapping[str, Any], yardstick: str) -> list[str]:
    equal = "" if row["as_near_as"] is None else f"{row['as_near_as']} of {yardstick}"
    return [
        str(row["calls"]),
        TITLES[row["solver"]],
        str(row["rows"]),
        _error(row),
        TITLES[row["rival"]],
        f"{row['rival_error']:.4f}",
        equal,
        f"{1000 * row['seconds_per_call']:.3g}",
        f"{1000 * row['rival_seconds_per_call']:.3g}",
    ]


def _strips(subject: Subject, judge: Judge, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Pictures of the same noises: the teacher's, then at each number of calls the yardstick's and the chosen one's."""
    shown = judge.shown()
    compared = [one for choice in choices for one in _shown(choice, judge.yardstick_name)]
    states = [shown.end, *(one.images for one in compared)]
    titles = [("teacher", subject.teacher_calls, "")]
    titles += [(one.candidate.title, one.candidate.calls, f"{one.error:.4f}") for one in compared]
    pictures = _pictures(subject, shown, states)
    return [
        {"title": title, "calls": calls, "error": error, "picture": png_address(part), "count": len(part)}
        for (title, calls, error), part in zip(titles, pictures)
    ]


def _pictures(subject: Subject, shown: Trajectories, states: Sequence[Tensor]) -> Sequence[Tensor]:
    """States as people see them; themselves where a decoder fails, which must not cost the report."""
    try:
        return [small(subject.pictures(shown, part)) for part in states]
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"the report shows latents: {subject.name} could not decode them ({reason})", flush=True)
        return states


def small(pictures: Tensor) -> Tensor:
    """Pictures or videos of at most LARGEST pixels a side, by averages; a page of full size would be hundreds of MB."""
    factor = -(-max(pictures.shape[-2:]) // LARGEST)
    if pictures.ndim < 4 or factor == 1:
        return pictures
    return avg_pool2d(pictures.flatten(0, -4), factor, ceil_mode=True).unflatten(0, pictures.shape[:-3])


def _shown(choice: Choice, yardstick: str) -> list[Judged]:
    """The yardstick and what is handed out."""
    usual = [one for one in choice.judged if one.candidate.name == yardstick]
    return [*usual[:1], *([choice.taken] if choice.taken not in usual[:1] else [])]
