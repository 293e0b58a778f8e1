"""What a comparison is asked for. Imports next to nothing, so that a command line is there at once."""

from dataclasses import dataclass
from typing import Literal

Metric = Literal["rmse", "fd", "kid", "precision_recall", "inception_score"]


@dataclass(frozen=True)
class CompareArgs:
    """All solvers start from the same noises; image k has seed + k.

    Args:
        denoiser: checkpoint folder.
        solvers: artifacts' paths, name:steps or name@[timesteps]; SOLVER+parataa runs it in parallel rounds.
        reference: the solver that RMSE and PSNR are measured against; default: the teacher that the artifacts were
            fitted to, else ddim:100, or euler:100 for a flow model.
        output: folder to write; it may hold an unfinished run of this comparison, or one with fewer solvers or images.
        num_samples: number of images per solver.
        seed: seed of the first image; must be disjoint from what the artifacts were fitted on.
        batch_size: images per network call.
        guidance_scale: one or more scales; default: the one the artifacts were fitted for, else 1 (none).
        precision: of the network; states stay in float32.
        metrics: default: rmse, and the others as far as the images fit the extractor and are numerous enough.
        extractor: classifier folder, `timm:NAME` or `inception` (the last two need the network once); default: the
            shipped classifier that is named like the model, `fashion-classifier` for `fashion-sit`, else cifar10's.
        statistics: file of the data's statistics, or a folder of image shards; default: those beside the extractor.
        bootstrap: number of resamplings for the 95 % intervals; 0 leaves them out.
        cache: folder that keeps the reference solver's images, computed once, for later comparisons.
        trust: a `denoiser.yaml` may name a class of your own; without, a file never chooses code.
        wandb: also log the table and the pictures to W&B (offline when not logged in).
    Raises:
        ValueError: no solver, the same one twice, or numbers out of their range.
    """

    denoiser: str
    solvers: list[str]
    reference: str | None = None
    output: str = "runs/compare"
    num_samples: int = 512
    seed: int = 0
    batch_size: int = 64
    guidance_scale: float | list[float] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    metrics: list[Metric] | None = None
    extractor: str | None = None
    statistics: str | None = None
    bootstrap: int = 200
    cache: str = "runs/cache/reference"
    trust: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        from solvers.noise import check_seed

        if not self.solvers:
            raise ValueError("no solvers to compare: give at least one artifact's path or name:steps")
        if len(set(self.solvers)) < len(self.solvers):
            raise ValueError(f"a solver is named twice in {', '.join(self.solvers)}: name each once")
        for name, least in (("num_samples", 1), ("batch_size", 1), ("bootstrap", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
        for seed in (self.seeds[0], self.seeds[-1]):
            check_seed(seed)
        if self.guidance_scale == []:
            raise ValueError("guidance_scale is an empty list: give at least one scale, or leave it out")

    @property
    def scales(self) -> list[float] | None:
        """The guidance scales asked for; None: those of the artifacts."""
        scales = self.guidance_scale
        return [scales] if isinstance(scales, int | float) else scales

    @property
    def seeds(self) -> range:
        """Seeds of the images."""
        return range(self.seed, self.seed + self.num_samples)
