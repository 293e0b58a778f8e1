"""`make demo`: learn an 8-step solver for the shipped CIFAR-10 model and compare it with the usual ones.

The same commands a user would type, one after another in one process:

    python train.py predict ...    record the teacher, DDIM with 100 steps
    python train.py fit ...        fit OLSS on the recorded trajectories
    python sample.py compare ...   compare on 64 seeds that the fit has not seen
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

NFE, NUM_TRAJECTORIES, NUM_SAMPLES = 8, 96, 64


def main(args: list[str] | None = None) -> None:
    """Run the three commands and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--denoiser", default="checkpoints/cifar10-dit", help="checkpoint folder with a VP schedule")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder, an earlier demo is replaced")
    parser.add_argument("--num_trajectories", type=int, default=NUM_TRAJECTORIES, help="32 of them are held out")
    options = parser.parse_args(args)
    warnings.filterwarnings("ignore")
    shutil.rmtree(options.output, ignore_errors=True)
    trajectories, artifact = options.output / "trajectories", options.output / f"olss-{NFE}.json"
    _record(options.denoiser, trajectories, options.num_trajectories)
    _fit(options.denoiser, trajectories, options.output)
    shutil.rmtree(trajectories)
    _compare(options.denoiser, artifact, options.output)
    _print_report(options.output, artifact)


def _record(denoiser: str, trajectories: Path, num_trajectories: int) -> None:
    _train(
        "predict",
        "--config=configs/trajectories/cifar10-dit.yaml",
        f"--model.init_args.denoiser={denoiser}",
        f"--model.init_args.num_trajectories={num_trajectories}",
        f"--model.init_args.folder={trajectories}",
    )


def _fit(denoiser: str, trajectories: Path, output: Path) -> None:
    _train(
        "fit",
        "--config=configs/olss/cifar10-dit.yaml",
        f"--model.init_args.denoiser={denoiser}",
        f"--model.init_args.method.init_args.calls={NFE}",
        "--model.init_args.method.init_args.search_trajectories=32",
        f"--model.init_args.output={output}",
        f"--data.init_args.trajectories={trajectories}",
        "--data.init_args.holdout=32",
        f"--trainer.default_root_dir={output / 'fit'}",
        "--trainer.logger=false",
    )


def _compare(denoiser: str, artifact: Path, output: Path) -> None:
    import sample

    solvers = [f"ddim:{NFE}", f"dpmpp:{NFE}", f"unipc:{NFE}", str(artifact)]
    options = {
        "denoiser": denoiser,
        "solvers": json.dumps(solvers),
        "num_samples": NUM_SAMPLES,
        "guidance_scale": "[1.0]",
        "metrics": "[rmse]",
        "output": output,
        "cache": output / "cache",
    }
    sample.main(_said("sample.py", ["compare", *(f"--{name}={value}" for name, value in options.items())]))


def _train(*command: str) -> None:
    import train

    train.main(_said("train.py", list(command)))


def _said(script: str, command: list[str]) -> list[str]:
    print(f"\n$ python {script} {' '.join(command)}", flush=True)
    return command


def _print_report(output: Path, artifact: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = json.loads((output / "report.json").read_text())
    view = Table("solver", "network calls", "RMSE to the teacher", "seconds per image", title="64 unseen seeds")
    for row in rows:
        view.add_row(row["solver"], str(row["nfe"]), f"{row['rmse']:.4f}", f"{row['seconds']:.3f}")
    Console().print(view)
    for path in (artifact, *(output / name for name in ("report.json", "report.md", "report.html", "comparison.png"))):
        print(path)


if __name__ == "__main__":
    main()
