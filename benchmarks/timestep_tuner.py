"""What tuned artifacts reach in the objective they were tuned for, on unseen seeds.

The teacher runs from evaluation seeds 0, 1, ...; its end points (noise objective) or its states (trajectory objective)
are what each artifact is tried on, with its original and with its tuned timesteps. Prints a table; the last line is one
JSON object: worst_ratio, the largest after / before.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.clean_samples import noised
from data.trajectories import Trajectories, run_teacher
from denoisers import Evaluations, load_denoiser
from solvers import SolverTable, default_solver, load_solver, named_solver
from solvers.progress import progress_bar
from timestep_tuner.objective import STRATEGIES, Objective
from timestep_tuner.ratios import Ratios
from training.arguments import guarded

HEADER = ("solver", "nfe", "strategy", "objective", "before", "after", "after / before", "network calls")


def objective_of(denoiser: Any, tuned: SolverTable) -> tuple[Objective, Tensor]:
    """The objective an artifact was tuned for, on its base table, and the original timesteps."""
    schedule, config = denoiser.schedule, tuned.info["config"]
    original = torch.tensor(tuned.info["fitted_on"]["original_timesteps"], dtype=torch.float64)
    base = replace(tuned, timesteps=original)
    ratios = Ratios(base, (schedule.t_min, schedule.t_max), config["free_last"])
    return Objective(denoiser, ratios, schedule, config["objective"]), original


def losses(objective: Objective, strategy: str, timesteps: Tensor, tried: Trajectories) -> float:
    """Sum over the rows and the samples."""
    run = objective.parallel if strategy == "parallel" else objective.sequential
    return float(run(timesteps, tried).sum()) * len(tried)


def rows(options: argparse.Namespace) -> list[list[Any]]:
    """One row per artifact."""
    denoiser = load_denoiser(options.denoiser, options.guidance_scale, precision=options.precision)
    teacher = named_solver(options.teacher or default_solver(denoiser.schedule), denoiser.schedule)
    tables = [load_solver(path, denoiser) for path in options.solvers]
    totals = torch.zeros(len(tables), 2, dtype=torch.float64)
    for first in progress_bar(range(0, options.num_samples, options.batch_size), "sampling", "batch"):
        seeds = range(first, min(first + options.batch_size, options.num_samples))
        tried = run_teacher(denoiser, teacher, seeds)
        others = [*seeds[-1:], *seeds[:-1]]  # the noise objective's noises have nothing to do with the images
        shuffled = noised(tried.end, tried.condition, range(len(tried)), others)
        for index, table in enumerate(tables):
            objective, original = objective_of(denoiser, table)
            strategy = options.strategy or table.info["config"]["strategy"]
            batch = tried if objective.kind == "trajectory" else shuffled
            for column, timesteps in enumerate((original, table.timesteps)):
                totals[index, column] += losses(objective, strategy, timesteps, batch)
    means = (totals / options.num_samples).tolist()
    return [_row(path, table, *mean) for path, table, mean in zip(options.solvers, tables, means)]


def _row(path: str, table: SolverTable, before: float, after: float) -> list[Any]:
    config, counts = table.info["config"], table.info["fitted_on"]["evaluations"]
    spent = counts.get("calls") or Evaluations(**counts).calls
    return [Path(path).stem, table.nfe, config["strategy"], config["objective"], before, after, after / before, spent]


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--denoiser", default="checkpoints/cifar10-dit")
    parser.add_argument("--solvers", nargs="+", required=True)
    parser.add_argument("--teacher")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, help="whose states; default: those each artifact was tuned on"
    )
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--precision", default="float32")
    found = rows(parser.parse_args())
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for row in found:
        print("| " + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row) + " |")
    print(json.dumps({"worst_ratio": round(max(row[6] for row in found), 4)}))


if __name__ == "__main__":
    guarded(main)
