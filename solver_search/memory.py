"""What a search needs in memory: gradient checkpointing per network evaluation, and an estimate before the run."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from denoisers import index_condition
from denoisers.protocol import DenoiserWrapper


class Checkpointed(DenoiserWrapper):
    """Recomputes each network evaluation in the backward pass, so that only its input is kept."""

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The denoiser's output."""
        return checkpoint(self.denoiser, x, timestep, condition, use_reentrant=False, **options)


def activation_bytes(denoiser: Any, x: Tensor, timestep: Tensor, condition: Any = None) -> int:
    """Bytes autograd keeps for the backward pass of one evaluation, each storage once, weights left out."""
    parameters = denoiser.parameters() if isinstance(denoiser, torch.nn.Module) else ()
    weights = {value.untyped_storage().data_ptr() for value in parameters}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    alive = []  # storages must not be reused while they are counted
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        alive.append(denoiser(x.detach().requires_grad_(), timestep, condition))
    return sum(kept.values())


def estimate(denoiser: Any, x: Tensor, timestep: Tensor, condition: Any, nfe: int, checkpointing: bool) -> int:
    """Bytes a backward pass through a run of `nfe` evaluations needs for the batch `x`: activations, states, outputs.

    Without checkpointing every evaluation's activations are kept until the end, with it one evaluation's.
    """
    single, pair = (
        activation_bytes(denoiser, x[:1].expand(n, *x.shape[1:]), timestep, index_condition(condition, [0] * n))
        for n in (1, 2)
    )
    one = single + (pair - single) * (len(x) - 1)
    trajectory = 2 * nfe * x.numel() * torch.promote_types(x.dtype, torch.float32).itemsize
    return one * (1 if checkpointing else nfe) + trajectory


def estimate_tangents(x: Tensor, nfe: int, size: int) -> int:
    """Bytes of the tangents of all states and outputs of a linearised run, the network's own apart."""
    return 2 * nfe * size * x.numel() * torch.promote_types(x.dtype, torch.float32).itemsize


def readable(size: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GB"


def describe(
    denoiser: Any, condition: Any, batch: int, nfe: int, checkpointing: bool, tangents: int | None = None
) -> str:
    """One line that says what a run needs beside the weights: by so many `tangents`, or by backpropagation."""
    noise = torch.zeros(batch, *denoiser.sample_shape)
    if tangents:
        needed = estimate_tangents(noise, nfe, tangents)
        return f"memory: at most {readable(needed)} for {tangents} tangents of {nfe} evaluations, micro-batch {batch}"
    device = next((value.device for value in denoiser.parameters()), noise.device)
    timestep = torch.tensor(denoiser.schedule.t_max / 2, device=device)
    needed = estimate(denoiser, noise.to(device), timestep, condition, nfe, checkpointing)
    kept = "one evaluation, recomputed" if checkpointing else f"{nfe} evaluations; see gradient_checkpointing"
    return f"memory: about {readable(needed)} for the activations of {kept}, micro-batch {batch}"
