"""A second device without one: tensors of the meta device that hold their values on the CPU.

Under `OtherDevice` every operation checks that its tensors lie on one device (numbers, 0-dimensional CPU tensors, may
go anywhere, as in CUDA), runs on the values, and counts values that are read back (`item`, `tolist`, `cpu`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

OTHER = torch.device("meta")
_READS = (torch.ops.aten._local_scalar_dense.default,)
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Held(Tensor):
    """A tensor that says it is on the other device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Held":
        held = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=OTHER, requires_grad=False
        )
        held.values = values
        return held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("a tensor of the other device is used outside OtherDevice")


class OtherDevice(TorchDispatchMode):
    """Runs what is inside as with a second device.

    Args:
        reads: how often values may be read back; None for no limit.
    """

    def __init__(self, reads: int | None = None) -> None:
        super().__init__()
        self.limit, self.reads = reads, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        held = [value for value in tensors if isinstance(value, Held)]
        wanted = kwargs.get("device")
        self._check(function, tensors, held)
        if "device" in kwargs and wanted is not None and torch.device(wanted) == OTHER:
            kwargs["device"] = torch.device("cpu")
        result = function(*tree_map(_opened, args), **tree_map(_opened, kwargs))
        goes = torch.device(wanted) == OTHER if wanted is not None else bool(held)
        if held and (function in _READS or (wanted is not None and not goes)):
            self._count(function)
        if function in _MOVES[1:]:
            goes = isinstance(args[0], Held)
        if not goes:
            return result
        if result is not None and tensors and any(result is one for one in map(_opened, tensors)):
            return next(one for one in tensors if _opened(one) is result)  # in place
        return tree_map(lambda value: Held(value) if isinstance(value, Tensor) else value, result)

    def _check(self, function: Any, tensors: list[Tensor], held: list[Held]) -> None:
        strangers = [value for value in tensors if not isinstance(value, Held) and value.ndim]
        if held and strangers and function not in _MOVES:
            raise RuntimeError(f"{function} mixes the other device with the CPU: {[tuple(v.shape) for v in strangers]}")

    def _count(self, function: Any) -> None:
        self.reads += 1
        if self.limit is not None and self.reads > self.limit:
            raise RuntimeError(f"{function} reads a value back from the other device")


def _opened(value: Any) -> Any:
    return value.values if isinstance(value, Held) else value


def values_of(value: Tensor) -> Tensor:
    """What a tensor of the other device holds, on the CPU."""
    return value.values if isinstance(value, Held) else value


def to_other(value: Tensor) -> Tensor:
    """The tensor on the other device."""
    return Held(value.detach().clone())


def module_to_other(module: torch.nn.Module) -> torch.nn.Module:
    """A module whose parameters and buffers are moved there, frozen."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                part._parameters[name] = to_other(value)
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = to_other(value)
    return module
