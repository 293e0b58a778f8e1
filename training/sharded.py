"""FSDP2 over all processes, for networks that no single device holds."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

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
