"""What must not happen: to damaged artifacts, and to commands that are interrupted. The last line is one JSON object.

Each mutation is drawn from its own seed, so that one can be made again. Damaged and edited artifacts keep their
checksum; forged ones get a new one, and reach the checks behind it. All counts must be 0:

    other_solver, other_metadata   loaded without an error as another table, or with other fields
    other_error                    anything but a SolverError
    several_lines, too_long        an error of more than one line, or of more than 300 characters
    crashes_later                  a forged artifact loads, and what reads it afterwards fails

The counts of killed and signalled commands and of lost processes are described in `benchmarks/interruptions.py`.

    python benchmarks/robustness.py --mutations 1000000 --kills 50 --signals 20 --ranks 6 --journal robustness.jsonl

Every minute a line in the error stream says how far a part of it is, how long the rest takes, and what was broken so
far. A campaign that was ended goes on from its journal.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import interruptions
from benchmarks.journal import Journal
from evaluation.charts import timesteps_chart
from evaluation.contenders import fitted_seeds
from solvers import Bands, DenoiserIdentity, NoiseSchedule, SolverError, load_solver, named_solver, save_solver
from solvers.artifact import made_for, student_path
from solvers.errors import LONGEST
from solvers.export import describe
from solvers.strict_json import checksum
from solvers.table_json import table_to_dict

BLOCK = 1000  # mutations that the journal counts together
COUNTS = ("other_solver", "other_metadata", "other_error", "several_lines", "too_long", "crashes_later")
STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1e308,
    -0.0,
    10**400,
    int("9" * 4000),
    "",
    "text\nof two lines",
    "x" * 5000,
    "../student/model.safetensors",
    "/etc/passwd",
    "\ud800\0",
    [],
    [[]],
    [[1, 0]],
    {},
    {"a": {"b": []}},
)


def artifacts(folder: Path) -> list[Path]:
    """Small ones of every form: a plain table, one with calls and operators, a tuned one, one with a student."""
    schedule = NoiseSchedule.linear()
    table, guided = named_solver("unipc:3", schedule), named_solver("ddim:2", schedule).guided(2.0)
    bands = Bands((0.5,), 3)
    blocks = {name: bands.embed(getattr(guided, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    student = folder / "student" / "model.safetensors"
    student.parent.mkdir(parents=True)
    student.write_bytes(b"weights")
    fitted = {"original_timesteps": table.timesteps.tolist(), "seeds": [[0, 9]], "seconds": 1.5}
    fitted |= {"evaluations": {"forward": 3, "calls": 3}, "guidance_scale": 2.0}
    identity = DenoiserIdentity(schedule, (1.0, 3.0), {"ratio": 0.99}, "name", "0" * 64)
    flow = NoiseSchedule.flow(3.0, shift_terminal=0.1)
    return [
        save_solver(table, folder / "a.json", identity, method="m", fitted_on=fitted, validation={"rmse": 0.1}),
        save_solver(guided, folder / "b.json", DenoiserIdentity(schedule), method="m", config={"steps": [1, 2]}),
        save_solver(replace(guided, space=bands, **blocks), folder / "c.json", DenoiserIdentity(schedule), method="m"),
        save_solver(
            named_solver("euler:2", flow), folder / "d.json", DenoiserIdentity(flow), method="m", student=student
        ),
    ]


def damaged(text: str, source: random.Random) -> str:
    """Some letters changed, lost, repeated or moved."""
    start = source.randrange(len(text))
    stop = min(len(text), start + source.choice((1, 1, 1, 2, 8, 200)))
    kind = source.randrange(6)
    if kind == 0:
        return text[:start]
    if kind == 1:
        return text[:start] + text[stop:]
    if kind == 2:
        return text[:stop] + text[start:]
    if kind == 3:
        digits = [place for place, letter in enumerate(text) if letter.isdigit()]
        start = source.choice(digits)
        return text[:start] + source.choice("0123456789") + text[start + 1 :]
    if kind == 4:
        return text[:start] + chr(source.choice((0, 9, 10, 34, 44, 45, 48, 93, 101, 125, 0x2028))) + text[stop:]
    other = source.randrange(len(text))
    return text[:start] + text[other : other + stop - start] + text[stop:]


def edited(values: Any, source: random.Random) -> Any:
    """One field or entry replaced, removed, renamed, repeated or changed for another."""
    values = copy.deepcopy(values)
    places = list(_places(values))
    inner, key = source.choice(places)
    kind = source.randrange(5)
    if kind == 0:
        inner[key] = copy.deepcopy(source.choice(STRANGE))
    elif kind == 1:
        del inner[key]
    elif kind == 2 and isinstance(inner, dict):
        inner[source.choice(("extra", "calls", "", "\n"))] = inner.pop(key)
    elif kind == 3 and isinstance(inner[key], int | float):
        inner[key] = inner[key] * source.choice((-1, 1 + 1e-15, 2, 1e5)) + source.choice((0, 1, 1e-12))
    else:
        other, place = source.choice(places)
        inner[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else other[place])
    return values


def forged(values: dict[str, Any], source: random.Random) -> dict[str, Any]:
    """Edited, with a checksum that fits; a schedule's fingerprint, too, where there is a schedule."""
    values = edited(values, source)
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # refused for its schedule
        values["schedule"]["fingerprint"] = NoiseSchedule.from_dict(values["schedule"]).fingerprint()
    values["checksum"] = checksum({name: value for name, value in values.items() if name != "checksum"})
    return values


def broken_rules(path: Path, original: tuple[str, str] | None) -> list[str]:
    """What loading a mutated artifact does that it must not.

    Args:
        path: the artifact.
        original: what was there before, see `content`; None where another one may load.
    """
    try:
        table = load_solver(path)
    except SolverError as error:
        text = str(error)
        return ["several_lines"] * (not text.isprintable()) + ["too_long"] * (len(text) > LONGEST)
    except Exception:
        return ["other_error"]
    if original is not None:
        names = ("other_solver", "other_metadata")
        return [name for name, found, wanted in zip(names, content(table), original) if found != wanted][:1]
    try:
        made_for(table), fitted_seeds(table), describe(table), timesteps_chart(table), student_path(table)
    except Exception:
        return ["crashes_later"]
    return []


def content(table: Any) -> tuple[str, str]:
    """Checksums of a loaded table and of its metadata."""
    info = {name: value for name, value in table.info.items() if name != "path"}
    return checksum(table_to_dict(table)), checksum(info)


def campaign(mutations: int, seed: int = 0, journal: Journal = Journal()) -> dict[str, int]:  # noqa: B008
    """Counts of broken rules; each case is named in the error stream."""
    with tempfile.TemporaryDirectory() as name:
        sources = [(path, path.read_text(), content(load_solver(path))) for path in artifacts(Path(name))]

        def block(first: int, last: int) -> list[str]:
            return [rule for number in range(first, last) for rule in _mutation(number, sources)]

        end = seed + mutations
        edges = [(first, min(first + BLOCK, end)) for first in range(seed, end, BLOCK)]
        trials = {f"{first}-{last}": partial(block, first, last) for first, last in edges}
        found = journal.counts(f"mutations, blocks of {BLOCK}", trials)
    return dict.fromkeys(COUNTS, 0) | found


def _mutation(number: int, sources: Sequence[tuple[Path, str, tuple[str, str]]]) -> list[str]:
    """Broken rules of one mutation."""
    source = random.Random(number)
    path, text, original = source.choice(sources)
    kind = source.choice(("damaged", "edited", "forged"))
    mutated = damaged(text, source) if kind == "damaged" else _dumped(text, kind, source)
    path.write_text(mutated, encoding="utf-8", errors="surrogatepass")
    rules = broken_rules(path, None if kind == "forged" else original)
    path.write_text(text)
    for rule in rules:
        print(f"mutation {number} ({kind} {path.name}): {rule}", file=sys.stderr)
    return rules


def _dumped(text: str, kind: str, source: random.Random) -> str:
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps({"edited": edited, "forged": forged}[kind](json.loads(text), source))
    finally:
        sys.set_int_max_str_digits(4300)


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys or indices."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield values, key
        if isinstance(value, dict | list):
            yield from _places(value)


def interrupted(
    kills: int,
    signals: int,
    ranks: int,
    seed: int = 0,
    kinds: Sequence[str] = (),
    journal: Journal = Journal(),  # noqa: B008
) -> dict[str, int]:
    """Counts of broken rules of commands; each case is named in the error stream.

    Args:
        kills, signals: runs of each kind.
        ranks: runs of two processes.
        seed: of the first run.
        kinds: some of `interruptions.KINDS`, default all.
        journal: of what was done before.
    """
    counts = Counter(dict.fromkeys(interruptions.COUNTS, 0))
    with tempfile.TemporaryDirectory() as name:
        folder, prepared = Path(name) / "runs", Path(name) / "prepared"
        folder.mkdir()
        prepared.mkdir()
        interruptions.prepare(prepared)
        for kind in kinds or interruptions.KINDS:
            for trial, trials in ((interruptions.kills, kills), (interruptions.signals, signals)):
                counts.update(trial(kind, trials, folder, prepared, seed, journal))
        counts.update(interruptions.ranks(ranks, folder, prepared, seed, journal))
    return dict(counts)


def main() -> None:
    """Run the campaigns; exit code 1 where a count is not 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1_000_000, help="of artifacts")
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--signals", type=int, default=20, help="to each command")
    parser.add_argument("--ranks", type=int, default=6, help="runs of which a process is killed")
    parser.add_argument("--kinds", nargs="+", default=interruptions.KINDS, choices=interruptions.KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation and run")
    parser.add_argument("--journal", type=Path, help="file that keeps what was done; it goes on from there")
    options = parser.parse_args()
    journal = Journal(options.journal)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts = campaign(options.mutations, options.seed, journal)
    if options.kills or options.signals or options.ranks:
        numbers = options.kills, options.signals, options.ranks
        counts |= interrupted(*numbers, options.seed, options.kinds, journal)
    print(json.dumps({name: getattr(options, name) for name in ("mutations", "kills", "signals", "ranks")} | counts))
    sys.exit(any(counts.values()))


if __name__ == "__main__":
    main()
