"""Logs without advertisements, and without what libraries say about each other or about what is meant here."""

import logging
import re
import warnings

HINTS = re.compile(r"💡 Tip|TPU available|`weights_only` was not set")
MEANT = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning on PyTorch
    r"Found \d+ module\(s\) in eval mode",  # frozen networks are
    r"`max_epochs` was not set",
    r"Checkpoint directory .* exists and is not empty",  # a run goes on in its folder
    r"Using ModelCheckpoint with manual optimization",  # methods step by themselves
    r"The '\w+' does not have many workers",  # data lie in memory
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)


def be_quiet() -> None:
    """Leave out the hints of Lightning and the warnings that concern no user; for a command, not for a library."""
    for pattern in MEANT:
        warnings.filterwarnings("ignore", rf"(?s)\s*{pattern}")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|timm|diffusers|lightning)\b")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        for handler in logging.getLogger(name).handlers:
            if _no_hint not in handler.filters:
                handler.addFilter(_no_hint)


def _no_hint(record: logging.LogRecord) -> bool:
    return not HINTS.search(record.getMessage())
