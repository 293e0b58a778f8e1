"""GITS: time steps of a multistep solver by dynamic programming on a model's own trajectories, as artifacts.

    python benchmarks/peers.py --denoiser checkpoints/fashion-sit --output checkpoints/solvers/fashion-sit/peers
    python benchmarks/peers.py --denoiser checkpoints/fashion-sit --guidance_scale 2 --nfe 2 3 4 5 8 \\
        --output checkpoints/solvers/fashion-sit/guidance-2/peers

For every number of evaluations and every solver it writes gits-SOLVER-N.json, which `benchmarks/results.py` compares
with ours. A trajectory of 60 steps of iPNDM on EDM's grid is made for each seed; what an Euler step from one of its
nodes to another adds to the distance from the straight line between noise and image is the cost of that step, and
dynamic programming finds the steps of least cost, later ones weighted by 1.15 for each step before them.

Source: arXiv 2405.11326 and the settings of its released code; where its states are x / alpha, ours are
x / (alpha + sigma), which stay finite at the noise of a flow.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import Trajectories
from data.trajectories import FIRST_SEED, run_teacher
from denoisers import load_denoiser
from solvers import identify, named_solver, save_solver
from solvers.prediction import data_weights, noise_weights, per_sample
from solvers.table import SolverTable
from training.arguments import guarded

TEACHER = "ipndm@karras:60"
DISCOUNT = 1.15


def costs(teacher: SolverTable, batch: Trajectories) -> Tensor:
    """Cost of an Euler step from node i to node j, (M+1, M+1) float64, infinite unless i < j."""
    norm, position = teacher.alpha + teacher.sigma, teacher.sigma / (teacher.alpha + teacher.sigma)
    states = batch.states.double() / norm.reshape(1, -1, *[1] * (batch.states.ndim - 2))
    start, end = states[:, 0], states[:, -1]
    own = torch.stack([_deviation(state, start, end) for state in states.unbind(1)])
    found = torch.full((len(position), len(position)), torch.inf, dtype=torch.float64)
    for i in range(teacher.num_rows):
        slope = _slope(teacher, batch, i)
        for j in range(i + 1, len(position)):
            moved = states[:, i] + (position[j] - position[i]) * slope
            found[i, j] = (_deviation(moved, start, end) - own[j]).mean()
    return found


def _slope(teacher: SolverTable, batch: Trajectories, row: int) -> Tensor:
    """noise - data at a node: the derivative of x / (alpha + sigma) by sigma / (alpha + sigma)."""
    node = teacher.alpha[row], teacher.sigma[row]
    (data_state, data_output), (noise_state, noise_output) = (
        weights(teacher.prediction_type, *node) for weights in (data_weights, noise_weights)
    )
    state, output = batch.states[:, row].double(), batch.outputs[:, row].double()
    on_state, on_output = per_sample(torch.stack([noise_state - data_state, noise_output - data_output]), state)
    return on_state * state + on_output * output


def _deviation(point: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Distance of points from the lines between start and end, (batch,)."""
    line, off = (start - end).flatten(1), (point - end).flatten(1)
    line = line / line.norm(dim=1, keepdim=True)
    return (off - (off * line).sum(1, keepdim=True) * line).norm(dim=1)


def cheapest(cost: Tensor, steps: int, discount: float = DISCOUNT) -> list[int]:
    """Nodes from the first to the last in so many steps: least cost[i, j] + discount * (cost of the steps after j).

    Args:
        cost: (M+1, M+1).
        steps: at most M.
        discount: weight of later steps.
    Returns:
        (steps + 1,) indices.
    """
    last = len(cost) - 1
    best, then = cost[:, last], [torch.full((last + 1,), last)]
    for _ in range(steps - 1):
        best, following = (cost + discount * best).min(1)
        then.append(following)
    path = [0]
    for following in reversed(then):
        path.append(int(following[path[-1]]))
    return path


def write(
    denoiser_folder: str, scale: float, solvers: Sequence[str], nfes: Sequence[int], count: int, folder: Path
) -> list[Path]:
    """All artifacts of a model at a guidance scale."""
    denoiser = load_denoiser(denoiser_folder, scale)
    teacher, seeds = named_solver(TEACHER, denoiser.schedule), range(FIRST_SEED, FIRST_SEED + count)
    with torch.no_grad():
        batch = run_teacher(denoiser, teacher, seeds)
    cost, written = costs(teacher, batch), []
    for nfe in nfes:
        path = cheapest(cost, nfe)
        steps = ",".join(repr(float(teacher.timesteps[node])) for node in path[:-1])
        for solver in solvers:
            name = f"gits-{solver}-{nfe}.json"
            fitted = {"teacher": TEACHER, "seeds": [[seeds.start, seeds.stop]]}
            settings = {"nodes": path, "discount": DISCOUNT, "source": "arXiv 2405.11326"}
            table = named_solver(f"{solver}@[{steps}]", denoiser.schedule)
            written.append(
                save_solver(table, folder / name, identify(denoiser), method="gits", fitted_on=fitted, config=settings)
            )
    return written


def main(arguments: list[str] | None = None) -> None:
    """Write the artifacts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", required=True, help="checkpoint folder")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--solvers", nargs="+", default=["ipndm", "unipc"])
    parser.add_argument("--nfe", nargs="+", type=int, default=[3, 4, 5, 6, 8, 10])
    parser.add_argument("--num_trajectories", type=int, default=256)
    parser.add_argument("--output", type=Path, required=True, help="folder of the artifacts")
    options = parser.parse_args(arguments)
    given = options.denoiser, options.guidance_scale, options.solvers, options.nfe, options.num_trajectories
    for path in write(*given, options.output):
        print(path)


if __name__ == "__main__":
    guarded(main)
