"""Texts that people wrote with any editor: UTF-8, with a byte-order mark or without, and UTF-16 or UTF-32 with one."""

import codecs
from pathlib import Path

MARKS = (  # the longer first: that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(content: bytes) -> str:
    """A text file's text, without a byte-order mark.

    Raises:
        ValueError: it is in another encoding, or not a text.
    """
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not {encoding.upper()} at byte {error.start}: save it as UTF-8") from error
    if "\0" in text:  # UTF-16 without its mark is UTF-8 with a zero beside each letter
        raise ValueError(f"the text has a zero at letter {text.index(chr(0))}: save it as UTF-8")
    return text


def split_lines(text: str) -> list[str]:
    """Lines as editors show them; `str.splitlines` also splits at letters that people write inside a line."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        ValueError: see `decode_text`; the file is named.
    """
    try:
        return decode_text(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
