"""Several processes share the rows of a round."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


@contextmanager
def processes(timeout: float = 300.0) -> Iterator[ProcessGroup | None]:
    """The group of the processes that `torchrun` started, set up by Lightning Fabric; None in a process alone.

        with processes() as group:
            images, stats = parallel_sample(denoiser, table, noise, group=group)

    gloo on the CPU, NCCL on GPUs (one per process).

    Args:
        timeout: seconds after which waiting for another process is an error; more than a round takes.
    Raises:
        ValueError: a timeout that is not positive.
    """
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}: it must be a positive number of seconds")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    _launch(timeout)
    yield distributed.group.WORLD
    distributed.destroy_process_group()  # after an error there is nobody to say goodbye to


def _launch(timeout: float) -> None:
    """Fabric reads torchrun's environment; imported here because it takes seconds."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    fabric = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local,
        strategy=DDPStrategy(timeout=timedelta(seconds=timeout)),
    )
    fabric.launch()


def own_share(count: int, group: ProcessGroup | None) -> slice:
    """The rows of `count` that this process evaluates."""
    if group is None:
        return slice(0, count)
    share = -(-count // group.size())
    return slice(min(group.rank() * share, count), min((group.rank() + 1) * share, count))


def gather(own: Tensor, count: int, group: ProcessGroup | None) -> Tensor:
    """All rows from every process's share, (count, *shape), bit for bit the same on all.

    Raises:
        RuntimeError: another process ended or did not answer in time.
    """
    if group is None:
        return own
    share = -(-count // group.size())
    padded = torch.cat([own, own.new_zeros(share - len(own), *own.shape[1:])])
    return torch.cat(_all_gather(padded, group))[:count]


def check_same(group: ProcessGroup | None, device: torch.device, *inputs: object) -> None:
    """Whether every process was given the same tensors and settings.

    Raises:
        ValueError: they differ.
        RuntimeError: another process ended or did not answer in time.
    """
    if group is None:
        return
    digest = hashlib.sha256()
    for value in inputs:
        data = value.detach().cpu().contiguous() if isinstance(value, Tensor) else None
        digest.update(repr(value).encode() if data is None else data.flatten().view(torch.uint8).numpy().tobytes())
    own = torch.tensor(list(digest.digest()), device=device)
    if any(not torch.equal(own, other) for other in _all_gather(own, group)):
        raise ValueError("the processes were given different inputs or settings: start all with the same arguments")


def _all_gather(own: Tensor, group: ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(group.size())]
    try:
        distributed.all_gather(parts, own, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"process {group.rank()} of {group.size()} waited in vain: another one ended or did not answer in time; "
            "its own error says why"
        ) from error
    return parts
