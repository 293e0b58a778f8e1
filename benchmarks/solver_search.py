"""Evaluations the second-order search needs to reach what the paper's procedure reaches on unseen seeds.

The paper's procedure at its 10,000-sample setting: 313 iterations of Lion (0.01) from DDIM or Euler, 32 trajectories a
batch, the 100-step teacher run again for every batch, path and Huber loss. Ours: Levenberg-Marquardt on the end points
of a few trajectories made once, from a diffusers solver, until held-out trajectories are met as well as by the paper's
result. Evaluations of the network are counted per sample: a backward pass two, a forward-mode tangent one; measuring
the RMSE is counted for neither. With `--trajectories FOLDER` the paper's batches are drawn from that cache, which saves
hours and changes nothing but where the 10,016 trajectories come from: they are counted as if the teacher had run.
The last line is one JSON object: evaluations_ratio (ours / paper's), rmse_paper, rmse_ours, on unseen seeds.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from timm.optim import Lion

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import Trajectories
from data.trajectories import FIRST_SEED, TrajectoryCache, run_teacher
from denoisers import load_denoiser, with_precision
from solver_search.lm import Damping
from solver_search.losses import SearchLoss
from solver_search.objective import Compute, Objective
from solver_search.parameters import FreeParameters, PaperParameters
from solver_search.starts import start_table
from solvers import SolverTable, default_solver, identify, resolve_solver, save_solver
from training.arguments import guarded

PAPER_LOSS = SearchLoss(endpoint=0.0, path=1.0, huber=1000.0)
PAPER_ITERATIONS = (313, 1562)  # 10,000 and 50,000 samples in batches of 32
UNSEEN_BATCH = 64


class Source:
    """Teacher trajectories by number, run or read from a cache."""

    def __init__(self, denoiser, folder: str | None) -> None:
        self.denoiser = denoiser
        cache = TrajectoryCache(folder) if folder else None
        if cache is not None:
            cache.check(denoiser)
        self.table = cache.table if cache else resolve_solver(default_solver(denoiser.schedule), denoiser.schedule)
        self.pool = cache.load() if cache else None

    def __call__(self, numbers: list[int]) -> Trajectories:
        """The trajectories of these numbers; a cache holds the first ones, and higher numbers start over."""
        if self.pool is None:
            return self.run([FIRST_SEED + number for number in numbers])
        return self.pool.choose([number % len(self.pool) for number in numbers])

    def run(self, seeds: list[int]) -> Trajectories:
        """The teacher, run."""
        return run_teacher(self.denoiser, self.table, seeds)


def paper(denoiser, source: Source, nfe: int, iterations: int) -> tuple:
    """The paper's table, and the evaluations it took."""
    parameters = PaperParameters(denoiser.schedule, nfe, finish="data")
    objective = Objective(denoiser, PAPER_LOSS)
    theta = parameters.initial().requires_grad_()
    optimizer = Lion([theta], lr=0.01)
    for step in range(iterations):
        teacher = source([32 * step + k for k in range(32)])
        objective.evaluations.forward += 32 * source.table.nfe
        loss, theta.grad = objective.gradient(parameters, theta, teacher)
        optimizer.step()
        if step % 20 == 0:
            print(f"  paper, step {step}: loss {loss:.5f}", flush=True)
    return parameters.table(theta.detach()), objective.evaluations.calls


def ours(denoiser, source: Source, options: argparse.Namespace, target: float, held: Trajectories) -> tuple:
    """Our table once it meets `target` on the held-out trajectories, and the evaluations it took."""
    schedule = denoiser.schedule
    parameters = FreeParameters(start_table(options.start, options.nfe, schedule), (schedule.t_min, schedule.t_max))
    objective = Objective(denoiser, SearchLoss(), compute=Compute(tangent_precision=options.precision))
    measure = Objective(denoiser, SearchLoss())
    teacher, theta, damping = source(list(range(options.samples))), parameters.initial(), Damping()
    objective.evaluations.forward += options.samples * source.table.nfe
    for step in range(12):
        rmse = measure.rmse(parameters.table(theta), held)
        print(f"  ours, step {step}: held-out RMSE {rmse:.5f}, {objective.evaluations.calls} evaluations", flush=True)
        if rmse <= target:
            break
        result, _ = objective.lm_step(parameters, theta, teacher, damping)
        theta, damping = result.theta, result.damping
    return parameters.table(theta), objective.evaluations.calls


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--denoiser", default="checkpoints/cifar10-dit")
    parser.add_argument("--trajectories", help="cached trajectories of the teacher")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--start", default="unipc", help="solver our search starts from")
    parser.add_argument("--samples", type=int, default=64, help="trajectories of our search")
    parser.add_argument("--held", type=int, default=32, help="held-out trajectories that end our search")
    parser.add_argument("--unseen", type=int, default=128, help="unseen seeds of the figures")
    parser.add_argument("--iterations", type=int, default=PAPER_ITERATIONS[0])
    parser.add_argument("--precision", default="bf16", choices=["float32", "bf16"], help="of training")
    parser.add_argument("--output", help="folder that both solvers are written to, as paper-N.json and ours-N.json")
    options = parser.parse_args()
    denoiser = load_denoiser(options.denoiser)
    source, measure = Source(denoiser, options.trajectories), Objective(denoiser, SearchLoss())
    held = source([2**18 - 1 - k for k in range(options.held)])
    began = time.perf_counter()
    table, spent = paper(with_precision(denoiser, options.precision), source, options.nfe, options.iterations)
    middle = time.perf_counter()
    mine, cost = ours(denoiser, source, options, measure.rmse(table, held), held)
    end = time.perf_counter()
    blocks = [range(k, min(k + UNSEEN_BATCH, options.unseen)) for k in range(0, options.unseen, UNSEEN_BATCH)]
    unseen = [source.run(list(block)) for block in blocks]
    figures = [rmse_over(measure, solver, unseen) for solver in (table, mine)]
    if options.output:
        save(denoiser, options, {"paper": table, "ours": mine})
    longest = round(spent / options.iterations * PAPER_ITERATIONS[1])
    print(f"paper {spent} evaluations, {middle - began:.0f} s; ours {cost}, {end - middle:.0f} s; {options.precision}")
    print(f"ratio to the paper's {PAPER_ITERATIONS[1]} iterations, counted: {cost / longest:.4f}")
    print(json.dumps({"evaluations_ratio": cost / spent, "rmse_paper": figures[0], "rmse_ours": figures[1]}))


def save(denoiser, options: argparse.Namespace, tables: dict[str, SolverTable]) -> None:
    """Artifacts, for comparisons by other measures."""
    for name, table in tables.items():
        save_solver(
            table,
            Path(options.output, f"{name}-{options.nfe}.json"),
            identify(denoiser),
            method="solver_search",
            fitted_on={"seeds": [[FIRST_SEED, FIRST_SEED + 2**18]]},
        )


def rmse_over(measure: Objective, table, paths: list[Trajectories]) -> float:
    """RMSE over several batches."""
    squares = [measure.rmse(table, path) ** 2 * len(path) for path in paths]
    return (sum(squares) / sum(len(path) for path in paths)) ** 0.5


if __name__ == "__main__":
    guarded(main)
