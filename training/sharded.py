"""FSDP2 over all processes, for networks that no single device holds."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from training.checkpoints import verify


class Sharded(ModelParallelStrategy):
    """Shards the networks of a module by its `configure_model`; a checkpoint is one whole file with its checksum.

        --trainer.strategy.class_path training.sharded.Sharded

    The first process gathers the weights in its main memory to write them. A checkpoint goes on with any number of
    processes.

    Args:
        process_group_backend: of torch.distributed; default: what suits the device.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into the networks.

        Raises:
            ValueError: it is missing or altered.
        """
        verify(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only=True)


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes (collective); any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(value: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's `state_dict`; of a sharded one gathered in the first process's main memory (collective)."""
    if not any(isinstance(value, DTensor) for value in network.parameters()):
        return network.state_dict()
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """The inverse of `whole_weights`, or of some of them, which every process has."""
    set_model_state_dict(network, weights, options=StateDictOptions(full_state_dict=True, strict=False))
