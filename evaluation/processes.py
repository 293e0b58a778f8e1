"""The processes that share a comparison or an evaluation."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import distributed


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes) of the running process group; (0, 1) where there is none."""
    running = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if running else (0, 1)


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(rank, number of processes): of a running process group, of `torchrun`, or this one alone."""
    starts = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if starts:
        distributed.init_process_group("gloo", timeout=timedelta(days=30))  # shares of an hours-long run may differ
    try:
        yield rank_and_size()
    finally:
        if starts:
            distributed.destroy_process_group()


def first_alone(action: Callable[[], None]) -> None:
    """The first process acts; where it is refused, all processes are, each with the same error."""
    refusal = [""]
    rank, world_size = rank_and_size()
    if rank == 0:
        try:
            action()
        except ValueError as error:
            refusal = [str(error)]
    if world_size > 1:
        distributed.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise ValueError(refusal[0])


def barrier() -> None:
    """Wait for all processes."""
    if rank_and_size()[1] > 1:
        distributed.barrier()
