"""What a comparison is asked for. Imports next to nothing, so that a command line is there at once."""

from dataclasses import dataclass
from typing import Literal

Metric = Literal["rmse", "fd", "kid", "precision_recall", "density_coverage", "inception_score", "lpips", "clip_score"]


@dataclass(frozen=True)
class EvaluateArgs:
    """Pictures are a folder that `generate` wrote, a folder of picture files or webdataset shards, or an .npz file.

    Args:
        samples: the pictures.
        output: folder of evaluation.json.
        metrics: default: of fd, kid, precision_recall and inception_score what the pictures fit and are numerous enough
            for.
        extractor: as in `compare`; default: the shipped classifier that is named like the model of a generated folder.
        statistics: of the data, as in `compare`.
        reference: pictures to compare the samples with, one by one: RMSE, and LPIPS where it is asked for.
        prompts: text file of one prompt a line, one for each picture, for the CLIP score.
        lpips: network of LPIPS, alex, vgg or squeeze, or NAME:FILE.
        clip: network of the CLIP score, a model of the hub or its folder.
        batch_size: pictures per network call.
        bootstrap: number of resamplings for the 95 % intervals; 0 leaves them out.
    Raises:
        ValueError: numbers out of their range.
    """

    samples: str
    output: str = "runs/evaluate"
    metrics: list[Metric] | None = None
    extractor: str | list[str] | None = None
    statistics: str | list[str] | None = None
    reference: str | None = None
    prompts: str | None = None
    lpips: str = "alex"
    clip: str = "openai/clip-vit-large-patch14"
    batch_size: int = 64
    bootstrap: int = 200

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.bootstrap < 0:
            raise ValueError(f"batch_size is {self.batch_size}, at least 1, and bootstrap {self.bootstrap}, at least 0")


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
        metrics: default: rmse, and of fd, kid, precision_recall and inception_score what the images fit and are
            numerous enough for.
        extractor: one or more feature spaces: classifier folder, `inception`, `efficientnet-lite0`, `timm:NAME`,
            `clip:NAME`, each also `NAME@LAYER`; default: the shipped classifier that is named like the model,
            `fashion-classifier` for `fashion-sit`, else cifar10's.
        statistics: of the data, for all extractors or one for each: a file of ours or of ADM, EDM, clean-fid or
            torch-fidelity, or pictures (folder, shards, npz); default: those beside the extractor.
        lpips: network of LPIPS, alex, vgg or squeeze, or NAME:FILE.
        clip: network of the CLIP score, a model of the hub or its folder.
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
    extractor: str | list[str] | None = None
    statistics: str | list[str] | None = None
    lpips: str = "alex"
    clip: str = "openai/clip-vit-large-patch14"
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
