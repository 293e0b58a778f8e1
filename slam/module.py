"""SLAM with Lightning: distil a student that needs one to eight evaluations."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from denoisers import calls_per_row, condition_length, load_denoiser, with_scale
from evaluation.evaluate import shipped_measure
from slam.choice import Shares, choose, distance_of
from slam.export import STUDENT_NAME, Exports, data_origin, export
from slam.lines import teacher_points
from slam.networks import (
    at_one_scale,
    check_precision,
    follow,
    load_network,
    make_student,
    make_target,
    make_teacher,
    shard,
    shared_names,
    shares,
    told_scale,
)
from slam.objective import Objective, Weights, predictions
from slam.tables import student_table
from solvers import NoiseSchedule, SolverTable, default_solver, identify
from solvers.identity import guidance_range, own_guidance
from solvers.prediction import per_sample
from training.ema import averaged_network, averages
from training.network import AdamW, NetworkModule
from training.record import upload_solver
from training.result import recorded
from training.run_card import Origin, RunCard, about_model
from training.testing import Evaluation, TableModule


class SLAM(NetworkModule, TableModule):
    """Trains a student to map every point between two neighbouring teacher points to the same data.

    Points, gammas and noises of a batch depend only on (seed, epoch, batch, rank), so a resumed run equals an
    uninterrupted one. The student, the target and the optimiser are in checkpoints, the teacher is not.

    Args:
        teacher: the network, or a path for `load_denoiser`; its class must offer students (denoisers/gamma.py).
        output: folder for student/ and slam-<steps>.json.
        guidance_scale: of the teacher, uncond + guidance_scale (cond - uncond); the student needs none. A network that
            is told its scale may have a range, of which every sample of the training has one of its own.
        teacher_dtype: number format of the teacher's weights; default: as they are.
        objective: what is minimised.
        optimizer: AdamW and its learning rate; the default is the paper's on Stable Diffusion.
        lora_rank: train adapters of this rank instead of all weights.
        gradient_checkpointing: recompute the student's blocks in the backward pass.
        exports: what is written, and when.
        sample_every: steps between pictures of 1, 2 and 4 evaluations in the logger; 0: at the end.
        seed: seed of points, gammas and noises.
        evaluation: what `train.py test` measures.
        trust_remote_code: a `denoiser.yaml` may name a class of your own, see `load_denoiser`.
    Raises:
        ValueError: an option out of its range, a teacher that cannot be distilled; on set-up: data that do not fit.
    Source: arXiv 2404.13903.
    """

    kind = "slam"
    teacher: Any

    def __init__(
        self,
        teacher: str | nn.Module,
        output: str | None = None,
        guidance_scale: float | tuple[float, float] = 1.0,
        teacher_dtype: str | None = None,
        objective: Objective = Objective(),  # noqa: B008 - frozen
        optimizer: AdamW = AdamW(8e-6),  # noqa: B008
        lora_rank: int | None = None,
        gradient_checkpointing: bool = False,
        exports: Exports = Exports(),  # noqa: B008
        sample_every: int = 500,
        seed: int = 0,
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(output, optimizer, sample_every, seed)
        self.objective, self.exports, self.lora_rank, self.evaluation = objective, exports, lora_rank, evaluation
        network, num_points = load_network(teacher, trust_remote_code), objective.teacher_points
        self.identity = identify(network, guidance_scale=guidance_scale)  # of weights not yet cast or sharded
        self.schedule: NoiseSchedule = network.schedule
        self.points = teacher_points(self.schedule, num_points)
        self.kept = {count: (exports.shares[0],) * (count - 1) for count in sorted(set(exports.steps))}
        self.tables = {count: self._table(count, shares) for count, shares in self.kept.items()}
        told, options = told_scale(network, guidance_scale), (lora_rank, gradient_checkpointing, objective.tells_gamma)
        self.student = make_student(told, *options, shared=shares(network, teacher_dtype))
        self._of_teacher = shared_names(self.student, network)
        self.strict_loading = not self._of_teacher
        self.target = make_target(self.student)
        guided = make_teacher(network, guidance_scale, teacher_dtype)
        object.__setattr__(self, "teacher", guided)  # no submodule: not in checkpoints, and keeps its dtype
        self.images = 0
        self._exported: Any = None

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    @property
    def left_out(self) -> set[str]:
        """With adapters, the teacher's weights around which they stand."""
        return {f"{role}.{name}" for role in ("student", "target") for name in self._of_teacher}

    def made_by(self) -> dict[str, str]:
        """With the teacher, where its weights are not in the checkpoint."""
        return super().made_by() | ({"teacher": str(self.identity.weight_hash)[:12]} if self._of_teacher else {})

    @property
    def result(self) -> Any:
        """The EMA callback's average of the student if there is one, or the target.

        Of a run that has finished, and is tested without a checkpoint, the exported student.
        """
        found = averaged_network(self.trainer, self.target) if self._exported is None else self._exported
        return at_one_scale(found)

    @property
    def decoder(self) -> Any:
        """The teacher."""
        return self.teacher

    @property
    def denoiser(self) -> Any:
        """What is tested."""
        return self.result

    @property
    def reference_denoiser(self) -> Any:
        """The teacher."""
        return at_one_scale(self.teacher)

    @property
    def default_reference(self) -> str:
        """The teacher's steps."""
        return default_solver(self.schedule, self.objective.teacher_points)

    def current_tables(self) -> dict[str, SolverTable]:
        """The student's samplers, once it has seen an image."""
        return {f"slam-{count}": table for count, table in self.tables.items()} if self.images else {}

    def artifact_paths(self) -> dict[str, Path]:
        """slam-<steps>.json."""
        return {f"slam-{count}": self.destination / f"slam-{count}.json" for count in self.tables if self.destination}

    def used_seeds(self) -> Sequence[Sequence[int]]:
        """Those of data that the teacher made."""
        return data_origin(self.trainer).get("seeds", [])

    def tables_to_test(self) -> list[str]:
        """Names of the tables; of a run that is not in memory, those of its artifacts, with the exported student."""
        if not self.images and self.destination and (self.destination / STUDENT_NAME).is_dir():
            scale: Any = own_guidance(self.target)
            self._exported = load_denoiser(self.destination / STUDENT_NAME, scale).to(self.device)
        return super().tables_to_test()

    def configure_model(self) -> None:
        """Shard all networks where the strategy has a mesh (ModelParallelStrategy)."""
        if self.device_mesh is not None and not getattr(self, "_sharded", False):
            # over all processes: the strategy's own meshes let those of a machine train apart, each on its gradients
            mesh = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,))
            for network in (self.student, self.target, self.teacher, *averages(self.trainer)):
                shard(network, mesh)
            self._sharded = True

    def setup(self, stage: str) -> None:
        """Bring the teacher to this process's device; refuse data of another kind before training."""
        self.teacher.to(self.trainer.strategy.root_device)
        check_precision(self.student, str(self.trainer.precision))
        if len(self.exports.shares) > 1 and stage == "fit":  # refused before the training where it cannot be measured
            self._choice = shipped_measure(self.teacher, self.exports.choice_images, ["fd"])
        check = getattr(getattr(self.trainer, "datamodule", None), "check", None)
        if stage == "fit" and check is not None:
            check(self.teacher)

    def training_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> Tensor:
        """Loss of a batch (data, condition)."""
        data, condition = batch
        _check_batch(data, condition, self.teacher.sample_shape)
        generator = self.generator("noise", self.current_epoch, batch_idx, device=self.device)
        noise = torch.randn(data.shape, generator=generator, device=self.device, dtype=data.dtype)
        weights = self._weights(len(data), batch_idx).to(self.device, data.dtype)
        networks, condition = (self.student, self.target, self.teacher), self._scaled(condition, len(data), batch_idx)
        found, aim = predictions(*networks, weights, data, noise, condition, self.objective.tells_gamma)
        loss = self.objective.of(per_sample(weights.loss, found) * (found - aim))
        self.images += len(data) * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """A step of the student, then of the target."""
        super().optimizer_step(*args, **options)
        follow(self.target, self.student, self.objective.target_decay)

    def sample_tables(self) -> dict[str, SolverTable]:
        """Up to 4 evaluations."""
        return {f"slam-{count}": table for count, table in self.tables.items() if count <= 4}

    def show(self, step: int, num_images: int = 40) -> None:
        """With the errors of all numbers of evaluations."""
        super().show(step, num_images)
        each = 2 + self.objective.teacher_evaluations * calls_per_row(self.teacher)  # student, target and teacher
        for name, table in self.current_tables().items():
            self.examine(name, table, self.images * each)

    @property
    def card(self) -> RunCard:
        """By the teacher."""
        model = self.identity.name or type(self.teacher).__name__
        return RunCard(self.kind, model, [f"slam-{count}" for count in self.tables])

    def about(self) -> dict[str, Any]:
        """With the teacher and its steps."""
        return super().about() | about_model(self.identity, self.default_reference)

    def origins(self) -> list[Origin]:
        """With the teacher."""
        return [*super().origins(), Origin.of_model(self.identity)]

    def after_step(self, step: int) -> None:
        """Throughput and exports."""
        if step % self.trainer.log_every_n_steps == 0:
            self.log("train/images_per_second", self.images / self.clock.seconds, prog_bar=True)
        self._export(step)

    def on_train_start(self) -> None:
        """Make up for an export that a kill after the checkpoint prevented."""
        super().on_train_start()
        self._export(self.global_step, again=False)

    def _export(self, step: int, again: bool = True) -> None:
        """Write what is due at a step; what a longer training has left stays until this one is longer."""
        every = self.exports.every
        if self.destination and step and every and step % every == 0 and step < self.trainer.estimated_stepping_batches:
            folder = self.destination / (f"step-{step:06d}" if self.exports.keep else "")
            written = self.written_steps(folder) or 0
            if self.overwrite or written < step or (again and written == step):
                self.write(folder)

    def write(self, folder: Path) -> None:
        """Write student/ and the artifacts; a collective operation."""
        export(self, folder)
        rank_zero_info(f"student of {self.global_step} steps, {self.images} images -> {folder}")

    def written_steps(self, folder: Path) -> float | None:
        """The most of all artifacts."""
        found = [recorded(folder / f"slam-{count}.json", "fitted_on", "iterations") for count in self.tables]
        return max((steps for steps in found if steps is not None), default=None)

    def finish(self) -> None:
        """Choose what the samplers keep, write the output, upload it, and show how good it is."""
        if len(self.exports.shares) > 1:
            self._choose_shares()
        super().finish()
        for path in self.artifact_paths().values():
            student = path.parent / STUDENT_NAME if self.exports.upload_student else None
            upload_solver(self.logger, path, self.card.model, self.origins(), student)
        self.show_results()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was spent."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["slam"] = {"images": self.images}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        super().on_load_checkpoint(checkpoint)
        self.images = checkpoint["slam"]["images"]

    def _table(self, count: int, shares: float | Shares) -> SolverTable:
        return student_table(self.schedule, count, self.objective.teacher_points, shares)

    def _choose_shares(self) -> None:
        for count in [count for count in self.tables if count > 1]:
            rank_zero_info(f"slam-{count}: choosing the share of its noise that each step keeps")
            with self.trainer.precision_plugin.forward_context():
                distance = partial(self._distance, count)
                best, found = choose(distance, self.exports.shares, count - 1, self.global_rank == 0)
            self.kept[count], self.tables[count] = best, self._table(count, best)
            told = ", ".join(f"{share:g}" for share in best)
            common = ", ".join(f"{one[0]:g}: {value:.3f}" for one, value in found.items() if len(set(one)) == 1)
            rank_zero_info(f"it is {told}, Frechet distance {found[best]:.3f}; one share for all steps: {common}")

    def _distance(self, count: int, shares: Shares) -> float:
        return distance_of(self.result, self._table(count, shares), self.exports.choice_images, self._choice)

    def _scaled(self, condition: Any, batch: int, batch_idx: int) -> Any:
        """With random guidance scales of a range."""
        low, high = guidance_range(own_guidance(self.teacher))
        generator = self.generator("scale", self.current_epoch, batch_idx)
        share = torch.rand(batch, generator=generator, dtype=torch.float64)
        return with_scale(self.teacher, condition, (low + (high - low) * share).float().to(self.device))

    def _weights(self, batch: int, batch_idx: int) -> Weights:
        """Random points, and gammas (1 for plain consistency distillation)."""
        generator = self.generator("line", self.current_epoch, batch_idx)
        index = torch.randint(len(self.points.start), (batch,), generator=generator)
        gamma = torch.rand(batch, generator=generator, dtype=torch.float64)
        if not self.objective.tells_gamma:
            gamma = torch.ones_like(gamma)
        return Weights.of(self.schedule, self.points[index], gamma, self.objective)


def _check_batch(data: Tensor, condition: Any, shape: tuple[int, ...]) -> None:
    if tuple(data.shape[1:]) != tuple(shape):
        raise ValueError(
            f"the training data have shape {tuple(data.shape[1:])}, the teacher takes {tuple(shape)}: give data of its "
            "size, latents of its autoencoder for a latent model"
        )
    if condition_length(condition) not in (None, len(data)):
        raise ValueError(f"{len(data)} samples have {condition_length(condition)} conditions: each needs one")
