"""A network that counts its calls and gets by with the memory there is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.load import resolve_device
from denoisers.protocol import DenoiserWrapper
from solvers.conditions import index_condition


class CountedNetwork(DenoiserWrapper):
    """A network that counts its calls, one for each sample, and halves its batch when memory does not suffice.

    Args:
        denoiser: the network, without guidance around it.
        batch_size: samples it sees at once; smaller after it ran out of memory.
    """

    def __init__(self, denoiser: nn.Module, batch_size: int) -> None:
        super().__init__(denoiser)
        self.batch_size, self.calls = batch_size, 0

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The network's output, (batch, *shape), computed in as many pieces as memory needs."""

        def evaluate(part: slice) -> Tensor:
            told = timestep[part] if timestep.ndim else timestep
            return self.denoiser(x[part], told, index_condition(condition, part), **options)

        output = torch.cat(in_pieces(evaluate, len(x), self))
        self.calls += len(x)
        return output


def present_device(name: str) -> torch.device:
    """A device by its name; ValueError where torch does not know it, or does not find it here."""
    device = resolve_device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name} is not here ({reason}): use --device cpu, or one that is") from error
    return device


def in_pieces(evaluate: Callable[[slice], Tensor], count: int, sized: Any) -> list[Tensor]:
    """Results of pieces of `sized.batch_size`, which is halved as often as memory runs out.

    Raises:
        ValueError: there is too little memory for a single sample.
    """
    results: list[Tensor] = []
    done = 0
    while done < count:
        size = min(sized.batch_size, count - done)
        try:
            results.append(evaluate(slice(done, done + size)))
            done += size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sized.batch_size = halved(size, error)
    return results


def halved(size: int, error: BaseException) -> int:
    """Half of a batch that was too large; ValueError where that was one sample."""
    if size == 1:
        raise ValueError(
            f"there is too little memory for a single sample ({str(error).splitlines()[0]}): use --dtype bfloat16, "
            "another --device, or a smaller sample; what is recorded is kept"
        ) from error
    print(f"out of memory with {size} samples: going on with {size // 2}", flush=True)
    return size // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or here."""
    told = str(error)
    known = "out of memory" in told or "not enough memory" in told or "can't allocate memory" in told
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or known
