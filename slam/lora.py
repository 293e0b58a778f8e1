"""Low-rank adapters on a student's linear layers, and its weights as those of an ordinary network."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from training.sharded import whole


def add_lora(student: Any, rank: int) -> None:
    """Freeze a student, add adapters of `rank` to the linear layers of its blocks, and train these and its gamma.

    The first factor is random, the second zero, so outputs do not change.

    Raises:
        ValueError: a rank below 1.
    Source: arXiv 2106.09685, alpha = rank.
    """
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}: give at least 1, or null for all weights")
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    inside = {id(module) for block in student.blocks for module in block.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in student.named_modules() if id(module) in inside]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), student)
    student.gamma_embedding.requires_grad_(True)
    for value in student.parameters():
        if value.requires_grad:
            value.data = value.data.float()  # peft takes the format of the layer


def plain_weights(student: nn.Module) -> dict[str, Tensor]:
    """The student's weights by the names they have without adapters, merged; sharded ones are gathered (collective)."""
    weights = {name: whole(value.detach()) for name, value in student.state_dict().items()}
    for name, scale in _adapted(student):
        up, down = (weights.pop(f"{name}.lora_{part}.default.weight") for part in "BA")
        base: dict[str, Any] = {part: weights.pop(f"{name}.base_layer.{part}", None) for part in ("weight", "bias")}
        weights[f"{name}.weight"] = base["weight"] + scale * up @ down
        if base["bias"] is not None:
            weights[f"{name}.bias"] = base["bias"]
    return weights


def adapter_weights(student: nn.Module) -> dict[str, Tensor]:
    """The factors of all adapters, layer.lora_A.weight and layer.lora_B.weight, at scale 1; gathered (collective)."""
    state, found = student.state_dict(), {}
    for name, scale in _adapted(student):
        down, up = (whole(state[f"{name}.lora_{part}.default.weight"].detach()) for part in "AB")
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": scale * up}
    return found


def _adapted(student: nn.Module) -> Iterator[tuple[str, float]]:
    """Names and scales of layers with adapters."""
    modules: list[tuple[str, Any]] = list(student.named_modules())
    for name, module in modules:
        if hasattr(module, "lora_A"):
            yield name, module.scaling["default"]
