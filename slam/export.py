"""What a run leaves behind: the student's folder, an artifact for each number of steps, and pictures in the log."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from slam.lora import plain_weights
from solvers import identify, save_solver

STUDENT_NAME = "student"


def export(module: Any, folder: Path) -> list[Path]:
    """Write student/ and slam-<steps>.json into a folder, in the first process; sharded weights need all of them."""
    weights = plain_weights(module.denoiser)
    paths = [folder / f"slam-{count}.json" for count in module.tables]
    if module.global_rank == 0:
        record = fitted_on(module)
        file, digest = module.target.save(
            folder / STUDENT_NAME, record, {name: value.cpu() for name, value in weights.items()}
        )
        identity = identify(module.target, name=STUDENT_NAME, weight_hash=digest)
        for path, table in zip(paths, module.tables.values()):
            save_solver(
                table,
                path,
                identity,
                method="slam",
                fitted_on=record,
                config=config(module),
                student=file.relative_to(folder),
            )
    return paths


def fitted_on(module: Any) -> dict[str, Any]:
    """Teacher, data and cost."""
    teacher = module.identity
    return {
        "teacher": teacher.name,
        "teacher_weight_hash": teacher.weight_hash,
        "guidance_scale": teacher.guidance_scale,
        "teacher_points": module.num_points,
        "method": module.method,
        "iterations": module.global_step,
        "images": module.images,
        "seconds": module.fitting_seconds,
        **data_origin(module.trainer),
    }


def data_origin(trainer: Any) -> dict[str, Any]:
    """What the data module says about itself: `data`, and the `seeds` of what the teacher made."""
    origin = getattr(getattr(trainer, "datamodule", None), "origin", None)
    return {} if origin is None else origin()


def config(module: Any) -> dict[str, Any]:
    """The settings that make a difference."""
    names = ("method", "noise_level", "line_timestep", "weighting", "loss", "huber_c", "target_decay")
    more = ("learning_rate", "warmup_steps", "decay_fraction", "weight_decay", "lora_rank", "seed")
    trainer = module.trainer
    return {
        **{name: getattr(module, name) for name in names + more},
        "betas": list(module.betas),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def log_samples(module: Any, counts: list[int], num_images: int = 40) -> None:
    """Pictures of each number of steps, always from the same noises, where the logger takes pictures."""
    sharded = module.device_mesh is not None
    if not hasattr(module.logger, "log_image") or (module.global_rank != 0 and not sharded):
        return
    from evaluation.generate import as_images, generate
    from evaluation.pictures import image_grid

    network = module.denoiser
    with module.trainer.precision_plugin.forward_context():
        found = [generate(network, module.tables[count], range(num_images), batch_size=num_images) for count in counts]
    _log_images(module.logger, counts, [image_grid(as_images(network, images), columns=10) for images in found])


@rank_zero_only
def _log_images(logger: Any, counts: list[int], grids: list[Any]) -> None:
    for count, grid in zip(counts, grids):
        logger.log_image(f"samples/{count}-step", [grid])


@rank_zero_only
def upload_student(logger: Any, folder: Path) -> None:
    """The whole folder as a W&B artifact, where the logger is W&B's."""
    if hasattr(logger, "log_image"):
        import wandb

        artifact = wandb.Artifact(f"student-{folder.resolve().name}", type="model")
        artifact.add_dir(str(folder))
        logger.experiment.log_artifact(artifact)
