"""Training of the evaluation classifier: `python train.py fit --config configs/base/cifar10_classifier.yaml`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from data.loader import seed_of
from evaluation.classifier import CONFIG_NAME, Classifier, save_classifier
from training.result import ResultModule, recorded, refuse_shorter


class ClassifierModule(ResultModule):
    """Cross entropy with label smoothing, random crops, one learning-rate cycle.

    Args:
        network: the classifier.
        output: folder to write at the end of the training; none by default.
        learning_rate: peak of the cycle, per batch mean loss (SGD with Nesterov momentum).
        momentum: of SGD.
        weight_decay: of the weights of convolutions and of the linear layer.
        label_smoothing: in [0, 1).
        crop: images are shifted by up to this many pixels, with reflection at the edges.
        rise: fraction of the steps in which the learning rate grows.
        seed: seed of the crops.
    """

    kind = "classifier"

    def __init__(
        self,
        network: Classifier,
        output: str | None = None,
        learning_rate: float = 0.2,
        momentum: float = 0.85,
        weight_decay: float = 1e-3,
        label_smoothing: float = 0.1,
        crop: int = 2,
        rise: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(output)
        self.network = network.to(memory_format=torch.channels_last)
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.label_smoothing, self.crop, self.rise, self.seed = label_smoothing, crop, rise, seed

    def on_fit_start(self) -> None:
        """Whiten the first layer on the first training images, unless a checkpoint brought it."""
        super().on_fit_start()
        if self.trainer.ckpt_path is None:
            images, _ = self.trainer.datamodule.train_dataloader().dataset.__getitems__(list(range(2000)))
            self.network.fit_whitening(images.to(self.device))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch (images in [-1, 1], labels)."""
        images, labels = batch
        seed = seed_of("crop", self.seed, self.global_rank, self.current_epoch, batch_idx)
        images = random_crop(images, self.crop, torch.Generator().manual_seed(seed))
        loss = cross_entropy(self.network(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the held-out images, without and with the mirrored image averaged in."""
        images, labels = batch
        scores = self.network(images)
        both = scores.softmax(1) + self.network(images.flip(-1)).softmax(1)
        for name, value in (("val/accuracy", scores), ("val/accuracy_mirrored", both)):
            correct = (value.argmax(1) == labels).float().mean()
            self.log(name, correct, prog_bar=True, sync_dist=True, batch_size=len(images))

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD; weight decay on matrices and kernels only; the rate rises, then falls linearly to zero."""
        trained = [value for value in self.network.parameters() if value.requires_grad]
        groups = [
            {"params": [value for value in trained if value.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [value for value in trained if value.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Learning rate at a step over its peak."""
        total = self.trainer.estimated_stepping_batches
        rise = max(1.0, self.rise * total)
        return min((step + 1) / rise, max(0.0, (total - step) / max(1.0, total - rise)))

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop where the network is lost."""
        if self.global_step % self.trainer.log_every_n_steps == 0:
            self.check_finite(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Never of a network that is lost."""
        self.check_finite(self.network)
        super().on_save_checkpoint(checkpoint)

    def finish(self) -> None:
        """Write the classifier folder."""
        self.check_finite(self.network)
        self.check_output(self.global_step)
        if self.destination is not None and self.global_rank == 0:
            names = ("train/loss", "val/accuracy", "val/accuracy_mirrored")
            found = self.figures()
            record = {name: found[name] for name in names if name in found}
            save_classifier(self.network, self.destination, {"steps": self.trainer.global_step, **record})

    def claims(self) -> list[Path]:
        """The output."""
        return [] if self.destination is None else [self.destination]

    def check_output(self, steps: float) -> None:
        """By the steps of the optimiser."""
        if self.destination is not None and not self.overwrite:
            before = recorded(self.destination / CONFIG_NAME, "training", "steps")
            refuse_shorter(self.destination, before, steps, "steps")


def random_crop(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by its own random offset of at most `crop` pixels, the edges reflected."""
    batch, _, height, width = images.shape
    padded = pad(images, (crop,) * 4, mode="reflect")
    tops, lefts = torch.randint(0, 2 * crop + 1, (2, batch), generator=generator).to(images.device)
    rows = (tops[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (lefts[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
    samples = torch.arange(batch, device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[samples, channels, rows, columns]
