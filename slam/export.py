"""What a run leaves behind: the student's folder, and an artifact for each number of steps."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slam.choice import choice_seeds
from slam.lora import adapter_weights, plain_weights
from solvers import identify, save_solver

if TYPE_CHECKING:
    from slam.module import SLAM

STUDENT_NAME = "student"
LORA_NAME = "lora/pytorch_lora_weights.safetensors"  # as diffusers names it


@dataclass(frozen=True)
class Exports:
    """What is written, and when.

    Args:
        steps: numbers of evaluations that artifacts are written for.
        every: training steps between exports; 0: at the end only.
        keep: leave each of those in a folder of its own, `output`/step-<step>, instead of replacing the last.
        upload_student: the student goes to W&B too, with each artifact.
        kept_noise: share of a step's noise that is the one implied by its own prediction, see `student_table`. Of
            several those are taken, for each number of evaluations and each of its steps, whose images are nearest to
            the data (Frechet distance in the features of the model's classifier) when the training ends; before, the
            first.
        choice_images: images that they are told apart by.
    Raises:
        ValueError: no steps, no share or one out of range, or too few images.
    """

    steps: tuple[int, ...] = (1, 2, 4, 8)
    every: int = 0
    keep: bool = False
    upload_student: bool = False
    kept_noise: float | tuple[float, ...] = 0.0
    choice_images: int = 512

    @property
    def shares(self) -> tuple[float, ...]:
        """What `kept_noise` names."""
        return tuple(self.kept_noise) if isinstance(self.kept_noise, Sequence) else (self.kept_noise,)

    def __post_init__(self) -> None:
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"kept_noise {self.kept_noise} must be one or several shares in [0, 1]")
        if self.choice_images < 2:
            raise ValueError(f"choice_images {self.choice_images} must be at least 2")
        if not self.steps:
            raise ValueError("steps is empty: give the numbers of evaluations to export, such as 1, 2, 4, 8")


def export(module: "SLAM", folder: Path) -> None:
    """Write student/ and slam-<steps>.json into a folder, in the first process; sharded weights need all of them.

    Of a student with adapters that can be one, also a LoRA file.
    """
    weights = {name: value.cpu() for name, value in plain_weights(module.result).items()}
    adapters = {name: value.cpu() for name, value in adapter_weights(module.result).items()}
    if module.global_rank != 0:
        return
    record = fitted_on(module)
    file, digest = module.target.save(folder / STUDENT_NAME, record, weights)
    if adapters and hasattr(module.target, "save_lora"):
        module.target.save_lora(folder / LORA_NAME, adapters, weights)
    identity = identify(module.target, name=STUDENT_NAME, weight_hash=digest)
    for count, table in module.tables.items():
        save_solver(
            table,
            folder / f"slam-{count}.json",
            identity,
            method="slam",
            fitted_on=record,
            config={**config(module), "kept_noise": list(module.kept[count])},
            student=file.relative_to(folder),
        )


def fitted_on(module: "SLAM") -> dict[str, Any]:
    """Teacher, data and cost."""
    teacher, data = module.identity, data_origin(module.trainer)
    if len(module.exports.shares) > 1:
        data["seeds"] = [*data.get("seeds", []), choice_seeds(module.exports.choice_images)]
    return {
        "teacher": teacher.name,
        "teacher_weight_hash": teacher.weight_hash,
        "guidance_scale": teacher.guidance_scale,
        "teacher_points": module.objective.teacher_points,
        "method": module.objective.method,
        "iterations": module.global_step,
        "images": module.images,
        "seconds": module.fitting_seconds,
        **data,
    }


def data_origin(trainer: Any) -> dict[str, Any]:
    """What the data module says about itself: `data`, and the `seeds` of what the teacher made."""
    origin = getattr(getattr(trainer, "datamodule", None), "origin", None)
    return {} if origin is None else origin()


def config(module: "SLAM") -> dict[str, Any]:
    """The settings that make a difference and are not in `fitted_on`."""
    trainer = module.trainer
    return {
        **{name: value for name, value in asdict(module.objective).items() if name != "teacher_points"},
        **asdict(module.adamw),
        "betas": list(module.adamw.betas),
        "lora_rank": module.lora_rank,
        "seed": module.seed,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }
