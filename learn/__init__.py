"""From a model to faster solvers of it: `learn(model, calls=[4, 8])`, or `python learn.py MODEL --calls 4 8`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learn.run import Result, learn

__all__ = ["Result", "learn"]


def __getattr__(name: str) -> Any:
    """On first use: what it takes is imported in seconds, which a command line's help need not wait for."""
    if name in __all__:
        from learn import run

        return getattr(run, name)
    raise AttributeError(f"module 'learn' has no attribute {name!r}")
