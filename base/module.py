"""Train a DiT to predict noise (VP schedules) or velocity (rectified flow)."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from denoisers import load_denoiser
from denoisers.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_weights, save_denoiser
from denoisers.dit import DiT
from solvers.identity import identify
from solvers.named import default_solver, named_solver
from solvers.prediction import per_sample, to_output
from solvers.table import SolverTable
from training.arguments import check_choice
from training.ema import averaged_network
from training.network import AdamW, NetworkModule
from training.record import log_origin, takes_pictures
from training.result import recorded
from training.run_card import Origin

TIME_SAMPLING = ("uniform", "logit_normal")


class BaseModel(NetworkModule):
    """Regression of a network's output at random nodes: E |network(alpha data + sigma noise, t, label) - target|^2.

    Timesteps, noises and dropped labels of a batch depend only on (seed, epoch, batch, rank), so a resumed run equals
    an uninterrupted one. The EMA callback's weights, if there is one, are validated and written at the end.

    Args:
        network: the DiT to train; its schedule says what is predicted.
        output: checkpoint folder written at the end of training.
        optimizer: AdamW and its learning rate.
        time_sampling: `uniform` over the timesteps, or `logit_normal` (arXiv 2403.03206), for flow schedules.
        class_dropout: probability that a label becomes the null class.
        init_from: checkpoint folder whose weights to start from (same network, any schedule).
        compile: compile the network for training.
        sample_every: steps between pictures of samples in the logger (20 steps of DDIM or Euler); 0: at the end.
        seed: seed of timesteps, noises and dropped labels.
    Raises:
        ValueError: an option out of its range, or weights that do not fit.
    """

    kind = "base"

    def __init__(
        self,
        network: DiT,
        output: str | None = None,
        optimizer: AdamW = AdamW(1e-3, warmup_steps=200, decay_fraction=1.0, betas=(0.9, 0.95)),  # noqa: B008 - frozen
        time_sampling: str = "uniform",
        class_dropout: float = 0.1,
        init_from: str | None = None,
        compile: bool = False,
        sample_every: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(output, optimizer, sample_every, seed)
        _check_options(network, time_sampling, class_dropout)
        self.network = network
        self.time_sampling, self.class_dropout, self.init_from = time_sampling, class_dropout, init_from
        if init_from:
            load_weights(network, _read_weights(Path(init_from)), init_from)
        self._predict = torch.compile(network.forward) if compile else network.forward

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch (images, labels) at random nodes."""
        images, labels = batch
        generator = self.generator("train", self.current_epoch, batch_idx, device=self.device)
        dropped = torch.rand(len(labels), generator=generator, device=self.device) < self.class_dropout
        labels = labels.masked_fill(dropped, self.network.num_classes)
        position = torch.rand(len(images), generator=generator, device=self.device)
        loss = self._loss(self._predict, images, labels, position, generator)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss of the averaged weights, always at the same nodes and noises, evenly spread over the timesteps."""
        images, labels = batch
        position = (torch.arange(len(images), device=self.device) + 0.5) / len(images)
        generator = self.generator("val", batch_idx, device=self.device)
        loss = self._loss(self.result, images, labels, position, generator)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(images))

    def _loss(
        self, predict: Any, images: Tensor, labels: Tensor, position: Tensor, generator: torch.Generator
    ) -> Tensor:
        schedule = self.network.schedule
        timestep = self.timestep(position)
        alpha, sigma = (per_sample(value, images) for value in schedule.alpha_sigma(timestep.double()))
        noise = torch.randn(images.shape, generator=generator, device=self.device, dtype=images.dtype)
        output = predict(alpha * images + sigma * noise, timestep, labels)
        target = to_output(schedule.prediction_type, images, noise, alpha.flatten(), sigma.flatten())
        return mse_loss(output.float(), target.float())

    def timestep(self, position: Tensor) -> Tensor:
        """Timesteps at the given quantiles, (batch,) in [0, 1), of their training distribution."""
        schedule = self.network.schedule
        if schedule.kind == "discrete_vp":
            return (position * (schedule.t_max + 1)).floor()
        if self.time_sampling == "logit_normal":
            position = torch.special.ndtri(position.clamp(1e-6, 1 - 1e-6)).sigmoid()
        return schedule.t_min + position * (schedule.t_max - schedule.t_min)

    @property
    def trained(self) -> nn.Module:
        """The network."""
        return self.network

    @property
    def result(self) -> Any:
        """The averaged network, or the network itself."""
        return averaged_network(self.trainer, self.network)

    def sample_tables(self) -> dict[str, SolverTable]:
        """20 steps of DDIM or Euler."""
        schedule = self.network.schedule
        return {"base": named_solver(default_solver(schedule, 20), schedule)}

    @rank_zero_only
    def write(self, folder: Path) -> None:
        """Write the checkpoint folder."""
        save_denoiser(self.result, folder, self._training_record())

    def finish(self) -> None:
        """Write the output, and say which network others will come from."""
        super().finish()
        if self.output is not None and self.global_rank == 0 and takes_pictures(self.logger):
            log_origin(self.logger, Origin.of_model(identify(load_denoiser(self.destination)), self.destination))

    def written_steps(self, folder: Path) -> float | None:
        """Of the checkpoint folder."""
        return recorded(folder / CONFIG_NAME, "training", "steps")

    def _training_record(self) -> dict[str, Any]:
        """What a reader of the checkpoint should know about its training."""
        figures = self.figures()
        return {
            "steps": self.trainer.global_step,
            "images": self.trainer.global_step * self._images_per_step(),
            "learning_rate": self.adamw.learning_rate,
            "betas": list(self.adamw.betas),
            "class_dropout": self.class_dropout,
            "time_sampling": self.time_sampling,
            "precision": str(self.trainer.precision),
            "init_from": Path(self.init_from).name if self.init_from else None,
            **{name: figures[name] for name in ("train/loss", "val/loss") if name in figures},
        }

    def _images_per_step(self) -> int:
        batch_size = self.trainer.train_dataloader.batch_sampler.batch_size
        return batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches


def _check_options(network: DiT, time_sampling: str, class_dropout: float) -> None:
    check_choice("time_sampling", time_sampling, TIME_SAMPLING)
    if time_sampling == "logit_normal" and network.schedule.kind != "flow":
        raise ValueError(f"time_sampling logit_normal is for flow schedules, this one is {network.schedule.kind}")
    if not 0 <= class_dropout <= 1:
        raise ValueError(f"class_dropout {class_dropout} must lie in [0, 1]")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"init_from {folder} is no checkpoint folder: it has no {WEIGHTS_NAME}")
    return {name: value.float() for name, value in load_file(path).items()}
