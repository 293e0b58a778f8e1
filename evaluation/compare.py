"""`sample.py compare`: solvers side by side on the same noises. Imports what it needs only when called."""

from collections.abc import Callable, Mapping
from typing import Any, Literal


def compare(
    denoiser: str,
    solvers: list[str],
    reference: str = "ddim:100",
    output: str = "runs/compare",
    num_samples: int = 512,
    seed: int = 0,
    batch_size: int = 64,
    guidance_scale: float | list[float] | None = None,
    precision: Literal["float32", "bf16"] = "float32",
    metrics: list[Literal["rmse", "fd", "kid", "precision_recall", "inception_score"]] | None = None,
    extractor: str | None = None,
    statistics: str | None = None,
    bootstrap: int = 200,
    cache: str = "runs/cache/reference",
    wandb: bool = False,
    samplers: Mapping[str, Callable] | None = None,
) -> list[dict[str, Any]]:
    """Compare solvers: report.json, report.md, report.html and comparison.png. A killed comparison continues.

    All solvers start from the same noises; image k has seed + k. The reference solver's images are computed once,
    kept in `cache` and used again by later comparisons. Several processes: `torchrun --nproc_per_node N sample.py ...`.

    Args:
        denoiser: checkpoint folder.
        solvers: artifacts' paths or name:steps; SOLVER+parataa runs it in parallel rounds.
        reference: the solver that RMSE and PSNR are measured against.
        output: folder to write; it may hold an unfinished run of this comparison, or one with fewer solvers or images.
        num_samples: number of images per solver.
        seed: seed of the first image; must be disjoint from what the artifacts were fitted on.
        batch_size: images per network call.
        guidance_scale: one or more scales; default: the one the artifacts were fitted for, else 1 (none).
        precision: of the network; states stay in float32.
        metrics: default: rmse, and the others as far as the images fit the extractor and are numerous enough.
        extractor: classifier folder, `timm:NAME` or `inception` (the last two need the network once); default: the
            shipped classifier that is named like the model, `fashion-classifier` for `fashion-sit`, else cifar10's.
        statistics: reference statistics file, or a folder of image shards; default: those beside the extractor.
        bootstrap: number of resamplings for the 95 % intervals; 0 leaves them out.
        cache: folder that keeps the reference solver's images.
        wandb: also log the table and the pictures to W&B (offline when not logged in).
        samplers: other samplers than the sequential one, by name, see `evaluation.contenders.Contender`.
    Returns:
        The rows of report.json: the reference, then the solvers, per guidance scale.
    Raises:
        ValueError: an unknown solver, a solver that does not fit the model, overlapping seeds, too few images for a
            metric that was asked for, images that are not finite, statistics of another extractor, or an output
            folder of something else.
    """
    from evaluation.comparison import compare_paths

    return compare_paths(
        denoiser,
        solvers,
        reference,
        output=output,
        num_samples=num_samples,
        seed=seed,
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        precision=precision,
        metrics=metrics,
        extractor=extractor,
        statistics=statistics,
        bootstrap=bootstrap,
        cache=cache,
        log_to_wandb=wandb,
        samplers=samplers,
    )
