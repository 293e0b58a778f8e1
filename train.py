"""Train anything in this repository: `python train.py fit --config configs/<method>/<experiment>.yaml`."""

import sys
from collections.abc import Sequence

from training.arguments import fail, guarded

SUBCOMMANDS = {
    "fit": "train a network, or learn a solver, and write what it leaves behind",
    "validate": "measure a base model's loss on held-out data",
    "test": "compare a run's solver tables with their teacher",
    "predict": "run the teacher: trajectories, samples, or encoded pictures as shards",
}
METHOD = "training.solver_training.SolverTraining"
MODULES = {  # what runs, what it makes, and a config of it; `fit --help` and `predict --help` list them
    "fit": (
        ("base.module.BaseModel", "a small denoising network", "base/digits"),
        ("base.classifier.ClassifierModule", "the classifier of the metrics", "base/cifar10_classifier"),
        ("slam.module.SLAM", "a student network for one to eight evaluations", "slam/digits"),
        (f"{METHOD} with olss.method.OLSS", "solvers by least squares", "olss/digits"),
        (f"{METHOD} with solver_search.method.SolverSearch", "solvers by search", "solver_search/digits"),
        (f"{METHOD} with timestep_tuner.method.TimestepTuner", "better timesteps", "timestep_tuner/digits"),
    ),
    "predict": (
        ("data.teacher.TeacherTrajectories", "what methods learn from", "trajectories/digits"),
        ("data.pipeline_teacher.PipelineTrajectories", "the same of a diffusers pipeline", "trajectories/pipeline"),
        ("data.teacher_samples.TeacherSamples", "a data set by the teacher", "images/digits"),
        ("data.encode_images.EncodeImages", "latents of pictures with captions", "encode/sd15"),
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run fit, validate, test or predict with a config and overrides (`fit --help` lists them).

    Help and mistakes in the subcommand are answered at once: importing Lightning takes seconds.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given:
        fail(f"no subcommand: give one of {', '.join(SUBCOMMANDS)} (see --help)")
    if given[0] in ("-h", "--help"):
        print(usage())
        return
    if not given[0].startswith("-") and given[0] not in SUBCOMMANDS:
        fail(f"unknown subcommand {given[0]!r}: use one of {', '.join(SUBCOMMANDS)} (see --help)")
    guarded(_run, args)


def _run(args: Sequence[str] | None) -> None:
    from training.cli import run

    run(args, modules)


def usage() -> str:
    """What the command line offers, one line for each subcommand."""
    lines = [f"  {name:<10}{text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: python train.py SUBCOMMAND --config configs/<method>/<experiment>.yaml [--option value ...]",
            "",
            *lines,
            "",
            modules("fit"),
            modules("predict"),
            "`python train.py SUBCOMMAND --help` lists the trainer's options,",
            "`python train.py SUBCOMMAND --model.help CLASS` those of a model, such as slam.module.SLAM.",
        ]
    )


def modules(subcommand: str) -> str:
    """What this project offers a subcommand, each with an example."""
    known = subcommand if subcommand in MODULES else "fit"
    entries = [f"  {path}: {text}\n    --config configs/{name}.yaml\n" for path, text, name in MODULES[known]]
    return f"modules of `python train.py {known}`, each with an example:\n" + "".join(entries)


if __name__ == "__main__":
    main()
