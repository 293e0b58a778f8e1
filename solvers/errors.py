"""Errors of solver artifacts, and how long they may be."""

LONGEST = 300


class SolverError(ValueError):
    """A solver artifact that cannot be used, in one line: what is wrong, what was found, what is allowed, what to do.

    Args:
        message: of any length and with anything that a file may hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, longest: int = LONGEST) -> str:
    """A text without line breaks and control characters; of a long one the beginning and the end."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    half = (longest - 5) // 2
    return plain if len(plain) <= longest else f"{plain[:half]} ... {plain[-half:]}"


def short_path(path: object, longest: int = 100) -> str:
    """A path, or its end where it is long."""
    text = str(path)
    return text if len(text) <= longest else f"...{text[-longest:]}"
