"""Captions of pictures in one table: csv, tsv, json or jsonl, in any text encoding with a byte-order mark."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solvers.errors import one_line
from solvers.text import read_text, split_lines

NAMES = ("file_name", "file", "path", "image")
TEXTS = ("caption", "text", "prompt")


def read_captions(path: str | Path) -> dict[str, str]:
    """Caption of each picture, by the name of its file as the table has it.

    Args:
        path: a table with a column (or key) of NAMES and one of TEXTS; .json may also map names to captions.
    Raises:
        ValueError: another kind of file, one that cannot be read, a row without name or caption, or two captions of
            one picture.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path} is no table of captions: give one that ends in {', '.join(_READERS)}")
    text = read_text(path)
    try:
        rows = _READERS[path.suffix.lower()](text)
        return _by_name(rows)
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as captions: {one_line(str(error))}") from error


def _by_name(rows: Iterable[Any]) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        name, text = _entry(row, number)
        if captions.setdefault(name, text) != text:
            raise ValueError(f"row {number} is another caption of {name}: give one of each picture")
    return captions


def _entry(row: Any, number: int) -> tuple[str, str]:
    keys = row if isinstance(row, Mapping) else {}
    name, text = (next((keys[key] for key in known if keys.get(key)), None) for known in (NAMES, TEXTS))
    if not isinstance(name, str) or not isinstance(text, str):
        found = ", ".join(map(str, keys)) or type(row).__name__
        raise ValueError(
            f"row {number} ({found}) needs one of {', '.join(NAMES)} and one of {', '.join(TEXTS)}, both texts"
        )
    return name, text


def _json(text: str) -> Iterable[Any]:
    content = json.loads(text)
    if isinstance(content, dict):
        return ({"file_name": name, "caption": caption} for name, caption in content.items())
    return content if isinstance(content, list) else [content]


def _lines(text: str) -> Iterable[Any]:
    return (json.loads(line) for line in split_lines(text) if line.strip())


def _columns(text: str, delimiter: str = ",") -> Iterable[Any]:
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)


_READERS = {".csv": _columns, ".tsv": lambda text: _columns(text, "\t"), ".json": _json, ".jsonl": _lines}
