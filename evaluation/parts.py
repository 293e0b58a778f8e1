"""Long tensors that are read part by part, so that memory does not grow with the number of images."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

PART = 8192  # rows in memory


class Parts:
    """The rows of a long tensor, read anew at every pass.

    Args:
        read: gives its blocks (k, ...) in their order, as often as it is called.
        count: rows of all blocks.
    """

    def __init__(self, read: Callable[[], Iterable[Tensor]], count: int) -> None:
        self.read, self.count = read, count

    @classmethod
    def of(cls, rows: Tensor) -> "Parts":
        """Of a tensor in memory."""
        return cls(lambda: [rows], len(rows))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        """Parts of PART rows; the last one is shorter."""
        held: Tensor | None = None
        for block in self.read():
            held = block if held is None else torch.cat([held, block])
            while len(held) >= PART:
                yield held[:PART]
                held = held[PART:]
        if held is not None and len(held):
            yield held

    def spread(self, limit: int) -> Tensor:
        """At most `limit` of the rows, evenly spread."""
        chosen = evenly(len(self), limit)
        starts = range(0, len(self), PART)
        return torch.cat([part[chosen[(chosen >= s) & (chosen < s + PART)] - s] for s, part in zip(starts, self)])

    def whole(self) -> Tensor:
        """All rows at once: of what is small."""
        return torch.cat(list(self))


def evenly(count: int, limit: int) -> Tensor:
    """Indices of at most `limit` of `count` rows, evenly spread, int64."""
    return torch.linspace(0, count - 1, min(limit, count)).round().long()
