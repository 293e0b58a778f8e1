"""The Hugging Face Hub, or one line that says why it cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from solvers.errors import SolverError


@contextmanager
def hub(token: str | None = None) -> Iterator[Any]:
    """A `huggingface_hub.HfApi` to write with; nothing is sent where it cannot be.

    Args:
        token: None takes that of the login.
    Raises:
        SolverError: offline mode, no token, or a request that failed.
    """
    from huggingface_hub import HfApi, constants, errors, get_token

    if constants.HF_HUB_OFFLINE:
        raise SolverError("nothing was uploaded, offline mode is on: unset HF_HUB_OFFLINE")
    if not (token or get_token()):
        raise SolverError("nothing was uploaded, there is no token: log in with `hf auth login`, or pass token=")
    try:
        yield HfApi(token=token)
    except (OSError, errors.HTTPError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SolverError(f"the Hub does not take it ({reason}): check connection, token and name") from error
