"""The networks of a run: the teacher in its own number format, the student, and its average, the target."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from denoisers import load_denoiser, map_condition, with_guidance
from denoisers.gamma import with_gamma
from denoisers.protocol import DenoiserWrapper
from slam.lora import add_lora
from solvers.identity import Guidance, own_guidance
from solvers.schedule import NoiseSchedule
from training.ema import average_of
from training.sharded import own_part

DTYPES = ("float32", "bfloat16", "float16")


class OwnDtype(DenoiserWrapper):
    """A frozen denoiser whose weights keep their number format, outside autocast's and the run's choice."""

    def __init__(self, denoiser: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__(denoiser.to(dtype) if dtype else denoiser)
        self.own = widest(denoiser)

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None, **options: Any) -> Tensor:
        """The output in the dtype of the state, (batch, *sample_shape)."""
        condition = map_condition(lambda value: value.to(self.own) if value.is_floating_point() else value, condition)
        with self._precision(x.device.type):
            return self.denoiser(x.to(self.own), timestep, condition, **options).to(x.dtype)

    def _precision(self, device: str) -> Any:
        """No autocast where it has another half precision: one network cannot mix the two."""
        mixes = self.own.itemsize == 2 and self.own != torch.get_autocast_dtype(device)
        return torch.autocast(device, enabled=False) if mixes else nullcontext()


def load_network(teacher: str | nn.Module, trust_remote_code: bool = False) -> Any:
    """The teacher's network, not yet guided.

    Raises:
        ValueError: a teacher that cannot be loaded, or without noise schedule.
    """
    network: Any = teacher
    if isinstance(teacher, str):
        network = load_denoiser(teacher, trust_remote_code=trust_remote_code)
    if not isinstance(getattr(network, "schedule", None), NoiseSchedule):
        raise ValueError(f"the teacher {type(network).__name__} has no `schedule`: give it a solvers.NoiseSchedule")
    return network


def make_teacher(network: nn.Module, guidance_scale: Guidance, dtype: str | None) -> Any:
    """The network guided, frozen, in evaluation mode and in its number format; `network` itself changes its format.

    Raises:
        ValueError: an unknown dtype, or guidance that the network does not have.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown teacher_dtype {dtype!r}: use one of {', '.join(DTYPES)}, or null for its own")
    own = OwnDtype(network, getattr(torch, dtype) if dtype else None)
    return with_guidance(own.eval().requires_grad_(False), guidance_scale)


def make_student(
    network: nn.Module, lora_rank: int | None, gradient_checkpointing: bool, told: bool, shared: bool = False
) -> Any:
    """A student with a network's weights; its embedding of gamma is frozen where it is not told gamma.

    Args:
        network: the denoiser to start from, not guided.
        lora_rank: of adapters; None: all weights are trained.
        gradient_checkpointing: of the student.
        told: whether it is told gamma.
        shared: weights beside the adapters are the network's own, not copies of them.
    Raises:
        ValueError: a teacher that offers no student, or a rank below 1.
    """
    student = with_gamma(network)
    student.gradient_checkpointing = gradient_checkpointing
    if lora_rank is not None:
        if shared:
            share(student, network)
        add_lora(student, lora_rank)
    student.gamma_embedding.requires_grad_(told)
    return student


def share(student: nn.Module, network: nn.Module) -> None:
    """Give a student the very weights of the network that it starts from, by their names."""
    theirs = dict(network.named_parameters())
    for name in [name for name, _ in student.named_parameters() if name in theirs]:
        owner, _, last = name.rpartition(".")
        setattr(student.get_submodule(owner), last, theirs[name])


def shared_names(student: nn.Module, network: nn.Module) -> set[str]:
    """Names of a student's weights that are the network's own, with its buffers; none where it has copies."""
    theirs, own = {id(value) for value in network.parameters()}, dict(student.named_parameters())
    if not any(id(value) in theirs for value in own.values()):
        return set()
    return {name for name in student.state_dict() if name not in own or id(own[name]) in theirs}


def told_scale(network: Any, guidance_scale: Guidance) -> Any:
    """What a student starts from: the network, told the scale where it is one that is.

    Raises:
        ValueError: a range of scales for a network that is told none.
    """
    if getattr(network, "is_told_guidance", False):
        return network.told(guidance_scale)
    if isinstance(guidance_scale, Sequence):
        name = getattr(network, "name", None) or type(network).__name__
        raise ValueError(
            f"guidance_scale is {list(guidance_scale)}: a student of {name} is told no scale and learns one: give it"
        )
    return network


def at_one_scale(denoiser: Any) -> Any:
    """A denoiser that is told a range of scales, at its middle; any other as it is."""
    scale = own_guidance(denoiser)
    return denoiser.told(sum(scale) / 2) if isinstance(scale, tuple) else denoiser


def widest(network: nn.Module) -> torch.dtype:
    """The widest number format of a network's weights."""
    floats = {value.dtype for value in network.parameters() if value.is_floating_point()}
    return max(floats, key=lambda one: one.itemsize, default=torch.get_default_dtype())


def make_target(student: Any) -> Any:
    """A frozen copy of what is trained, around the same other weights."""
    target = average_of(student)
    target.gradient_checkpointing = False
    return target


@torch.no_grad()
def follow(target: nn.Module, student: nn.Module, decay: float) -> None:
    """target = decay target + (1 - decay) student, in what is trained; on each process's own shard."""
    pairs = zip(target.parameters(), student.parameters())
    trained = [(own_part(mean), own_part(value)) for mean, value in pairs if value.requires_grad]
    means, values = (list(column) for column in zip(*trained))
    torch._foreach_lerp_(means, values, 1 - decay)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: each block and the rest of a network over the processes of a mesh."""
    from torch.distributed.fsdp import fully_shard

    for block in getattr(network, "blocks", []):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)  # else what a backward pass never visits stays whole


def shares(network: nn.Module, teacher_dtype: str | None) -> bool:
    """Whether adapters can stand around the teacher's own weights: autocast in bf16 takes none in float16."""
    own = {str(value.dtype).removeprefix("torch.") for value in network.parameters()}
    return "float16" not in ({teacher_dtype} if teacher_dtype else own)


def check_precision(student: nn.Module, precision: str) -> None:
    """Refuse to train around frozen weights in bf16 without autocast.

    Raises:
        ValueError: the trainer's precision is another.
    """
    frozen = {value.dtype for value in student.parameters() if not value.requires_grad}
    if torch.bfloat16 in frozen and not precision.startswith("bf16"):
        raise ValueError(
            f"the student's frozen weights are the teacher's, in bfloat16, and trainer.precision is {precision}: train "
            "with --trainer.precision bf16-mixed, or the teacher with --model.teacher_dtype float32"
        )
