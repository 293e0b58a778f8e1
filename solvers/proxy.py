"""An object that stands in for another one."""

import copy
from typing import Any


class Proxy:
    """Passes for the class of `inner` and hands everything to it that a subclass does not define.

    Args:
        inner: what it stands for.
        own: attributes of the proxy itself, which stay what they are.
    """

    def __init__(self, inner: Any, **own: Any) -> None:
        for name, value in {"inner": inner, "__module__": type(inner).__module__, **own}.items():
            object.__setattr__(self, name, value)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the inner object alone."""
        return copy.deepcopy(self.inner, memo)
