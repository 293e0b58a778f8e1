"""SLAM with Lightning: distil a student that needs one to eight evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from data.loader import seed_of
from denoisers import condition_length, load_denoiser
from slam.export import STUDENT_NAME, data_origin, export, log_samples, upload_student
from slam.lines import LINE_TIMESTEPS, NOISE_LEVELS, huber, l2
from slam.lines import teacher_points as spread_points
from slam.networks import follow, load_network, make_student, make_target, make_teacher, shard
from slam.objective import WEIGHTINGS, Weights, predictions
from slam.tables import student_table
from solvers import NoiseSchedule, SolverTable, identify
from solvers.prediction import per_sample
from training.adamw import AdamWModule
from training.ema import averaged_network
from training.record import upload_solver
from training.testing import Evaluation, TableModule

METHODS = ("slam", "consistency")
LOSSES = ("huber", "l2")


class SLAM(AdamWModule, TableModule):
    """Trains a student to map every point between two neighbouring teacher points to the same data.

    Points, gammas and noises of a batch depend only on (seed, epoch, batch, rank), so a resumed run equals an
    uninterrupted one. The student, the target and the optimiser are in checkpoints, the teacher is not.

    Args:
        teacher: the network, or a path for `load_denoiser`; its class must offer students (denoisers/gamma.py).
        output: folder for student/ and slam-<steps>.json.
        method: `slam`, or `consistency`: gamma is 1 always, plain consistency distillation.
        guidance_scale: of the teacher, uncond + guidance_scale (cond - uncond); the student needs none.
        teacher_points: steps of the teacher's DDIM (flow: Euler) between noise and data.
        teacher_dtype: number format of the teacher's weights; default: as they are.
        noise_level: sigma on the line, `paper` or `shared`, see `slam.lines.line_node`.
        line_timestep: what the student is told on the line, `start` or `node`, see `slam.lines.line_call`.
        weighting: of the difference before the loss, `uniform` or `snr`, see `slam.objective.Weights.of`.
        loss: `huber` or `l2`.
        huber_c: where the Huber loss turns from quadratic to linear.
        target_decay: of the target, an exponential moving average of the student.
        learning_rate: peak learning rate of AdamW.
        warmup_steps: steps of linear warm-up.
        decay_fraction: the last part of the steps over which the rate falls linearly to zero.
        betas: AdamW's decay rates.
        weight_decay: AdamW's weight decay.
        lora_rank: train adapters of this rank instead of all weights.
        gradient_checkpointing: recompute the student's blocks in the backward pass.
        steps: numbers of evaluations that artifacts are written for.
        export_every: steps between exports during training; 0: at the end only.
        keep_exports: leave each of those in a folder of its own, `output`/step-<step>, instead of replacing the last.
        sample_every: steps between pictures of 1, 2 and 4 evaluations in the logger; 0 for none.
        upload_student: also upload the student to W&B, at the end.
        seed: seed of points, gammas and noises.
        evaluation: what `train.py test` measures.
    Raises:
        ValueError: an option out of its range, a teacher that cannot be distilled; on set-up: data that do not fit.
    Source: arXiv 2404.13903: learning rate 8e-6, target decay 0.95, Huber with c = 0.001 on Stable Diffusion.
    """

    teacher: Any

    def __init__(
        self,
        teacher: str | nn.Module,
        output: str | None = None,
        method: str = "slam",
        guidance_scale: float = 1.0,
        teacher_points: int = 50,
        teacher_dtype: str | None = None,
        noise_level: str = "paper",
        line_timestep: str = "start",
        weighting: str = "uniform",
        loss: str = "huber",
        huber_c: float = 0.001,
        target_decay: float = 0.95,
        learning_rate: float = 8e-6,
        warmup_steps: int = 0,
        decay_fraction: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        lora_rank: int | None = None,
        gradient_checkpointing: bool = False,
        steps: list[int] = [1, 2, 4, 8],  # noqa: B006 - only read
        export_every: int = 0,
        keep_exports: bool = False,
        sample_every: int = 500,
        upload_student: bool = False,
        seed: int = 0,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.evaluation = evaluation
        _check_options(
            method, noise_level, line_timestep, weighting, loss, huber_c, target_decay, decay_fraction, steps
        )
        network = load_network(teacher)
        self.identity = identify(network, guidance_scale=guidance_scale)  # of weights not yet cast or sharded
        self.schedule: NoiseSchedule = network.schedule
        self.points, self.num_points = spread_points(self.schedule, teacher_points), teacher_points
        self.tables = {count: student_table(self.schedule, count, teacher_points) for count in sorted(set(steps))}
        self.student = make_student(network, lora_rank, gradient_checkpointing, method == "slam")
        self.target = make_target(self.student)
        guided = make_teacher(network, guidance_scale, teacher_dtype)
        object.__setattr__(self, "teacher", guided)  # no submodule: not in checkpoints, and keeps its dtype
        self.output, self.method, self.seed = output, method, seed
        self.noise_level, self.line_timestep, self.weighting = noise_level, line_timestep, weighting
        self.loss, self.huber_c, self.target_decay = loss, huber_c, target_decay
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.warmup_steps, self.decay_fraction, self.lora_rank = warmup_steps, decay_fraction, lora_rank
        self.export_every, self.keep_exports = export_every, keep_exports
        self.sample_every, self.upload_student = sample_every, upload_student
        self.images = 0
        self._exported: Any = None
        self._last_step = 0

    @property
    def denoiser(self) -> Any:
        """What is exported, shown and tested: the EMA callback's average of the student if there is one, or the target.

        Of a run that has finished, and is tested without a checkpoint, the exported student.
        """
        return averaged_network(self.trainer, self.target) if self._exported is None else self._exported

    @property
    def reference_denoiser(self) -> Any:
        """The teacher."""
        return self.teacher

    @property
    def default_reference(self) -> str:
        """The teacher's steps."""
        return f"{'euler' if self.schedule.kind == 'flow' else 'ddim'}:{self.num_points}"

    def current_tables(self) -> dict[str, SolverTable]:
        """The student's samplers, once it has seen an image."""
        return {f"slam-{count}": table for count, table in self.tables.items()} if self.images else {}

    def artifact_paths(self) -> dict[str, Path]:
        """slam-<steps>.json."""
        return {f"slam-{count}": Path(self.output) / f"slam-{count}.json" for count in self.tables if self.output}

    def used_seeds(self) -> Sequence[Sequence[int]]:
        """Those of data that the teacher made."""
        return data_origin(self.trainer).get("seeds", [])

    def tables_to_test(self) -> list[str]:
        """Names of the tables; of a run that is not in memory, those of its artifacts, with the exported student."""
        folder = Path(self.output or "") / STUDENT_NAME
        if not self.images and self.output and folder.is_dir():
            self._exported = load_denoiser(folder).to(self.device)
        return super().tables_to_test()

    def configure_model(self) -> None:
        """Shard all three networks where the strategy has a mesh (ModelParallelStrategy)."""
        if self.device_mesh is not None and not getattr(self, "_sharded", False):
            # over all processes: the strategy's own meshes let those of a machine train apart, each on its gradients
            mesh = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,))
            for network in (self.student, self.target, self.teacher):
                shard(network, mesh)
            self._sharded = True

    def setup(self, stage: str) -> None:
        """Bring the teacher to this process's device; refuse data of another kind before training."""
        self.teacher.to(self.trainer.strategy.root_device)
        check = getattr(getattr(self.trainer, "datamodule", None), "check", None)
        if stage == "fit" and check is not None:
            check(self.teacher)

    def training_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> Tensor:
        """Loss of a batch (data, condition)."""
        data, condition = batch
        _check_batch(data, condition, self.teacher.sample_shape)
        noise = torch.randn(
            data.shape, generator=self._generator("noise", batch_idx, self.device), device=self.device, dtype=data.dtype
        )
        weights = self._weights(len(data), batch_idx).to(self.device, data.dtype)
        told = self.method == "slam"
        networks = self.student, self.target, self.teacher
        found, aim = predictions(*networks, weights, data, noise, condition, told)
        difference = per_sample(weights.loss, found) * (found - aim)
        loss = huber(difference, self.huber_c) if self.loss == "huber" else l2(difference)
        self.images += len(data) * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """A step of the student, then of the target."""
        super().optimizer_step(*args, **options)
        follow(self.target, self.student, self.target_decay)

    def on_train_batch_end(self, *_: Any) -> None:
        """After an optimiser's step: throughput, pictures, export."""
        step = self.global_step
        if step == self._last_step:  # gradients are still being accumulated
            return
        self._last_step = step
        if step % self.trainer.log_every_n_steps == 0:
            self.log("train/images_per_second", self.images / self.clock.seconds, prog_bar=True)
        if self.sample_every and step % self.sample_every == 0:
            log_samples(self, [count for count in self.tables if count <= 4])
        if self.export_every and step % self.export_every == 0 and step < self.trainer.estimated_stepping_batches:
            self.export(f"step-{step:06d}" if self.keep_exports else "")

    def on_train_end(self) -> None:
        """Write the student and its artifacts."""
        paths = self.export()
        for path in paths:
            upload_solver(self.logger, path)
        if paths and self.upload_student:
            upload_student(self.logger, Path(str(self.output)))

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    def export(self, name: str = "") -> list[Path]:
        """Write student/ and the artifacts into a folder of the output, if there is one; a collective operation."""
        if self.output is None:
            return []
        folder = Path(self.output) / name
        paths = export(self, folder)
        rank_zero_info(f"student of {self.global_step} steps, {self.images} images -> {folder}")
        return paths

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was spent."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["slam"] = {"images": self.images}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        super().on_load_checkpoint(checkpoint)
        self.images = checkpoint["slam"]["images"]

    def _weights(self, batch: int, batch_idx: int) -> Weights:
        """Random points, and gammas (1 for plain consistency distillation)."""
        generator = self._generator("line", batch_idx, torch.device("cpu"))
        index = torch.randint(self.num_points, (batch,), generator=generator)
        gamma = torch.rand(batch, generator=generator, dtype=torch.float64)
        if self.method == "consistency":
            gamma = torch.ones_like(gamma)
        return Weights.of(
            self.schedule, self.points[index], gamma, self.noise_level, self.weighting, self.line_timestep
        )

    def _generator(self, what: str, batch_idx: int, device: torch.device) -> torch.Generator:
        seed = seed_of(what, self.current_epoch, batch_idx, self.seed, self.global_rank)
        return torch.Generator(device=device).manual_seed(seed)


def _check_batch(data: Tensor, condition: Any, shape: tuple[int, ...]) -> None:
    if tuple(data.shape[1:]) != tuple(shape):
        raise ValueError(
            f"the training data have shape {tuple(data.shape[1:])}, the teacher takes {tuple(shape)}: give data of its "
            "size, latents of its autoencoder for a latent model"
        )
    if condition_length(condition) not in (None, len(data)):
        raise ValueError(f"{len(data)} samples have {condition_length(condition)} conditions: each needs one")


def _check_options(
    method: str,
    noise_level: str,
    line_timestep: str,
    weighting: str,
    loss: str,
    huber_c: float,
    target_decay: float,
    decay_fraction: float,
    steps: list[int],
) -> None:
    for name, value, allowed in (
        ("method", method, METHODS),
        ("noise_level", noise_level, NOISE_LEVELS),
        ("line_timestep", line_timestep, LINE_TIMESTEPS),
        ("weighting", weighting, WEIGHTINGS),
        ("loss", loss, LOSSES),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(allowed)}")
    if huber_c <= 0:
        raise ValueError(f"huber_c {huber_c} must be positive")
    if not 0 <= target_decay < 1 or not 0 <= decay_fraction <= 1:
        raise ValueError(f"target_decay {target_decay} must lie in [0, 1), decay_fraction {decay_fraction} in [0, 1]")
    if not steps:
        raise ValueError("steps is empty: give the numbers of evaluations to export, such as 1, 2, 4, 8")
