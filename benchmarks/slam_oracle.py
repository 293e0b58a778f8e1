"""What a consistency student could reach: a teacher's own solution in its place, by the number of steps.

The exact consistency function maps every state to the end of the teacher's path through it. It needs no student: from
each state the teacher's network is solved down to the data. An exact one is the teacher with one evaluation already,
so that more steps can only cost it something; what more steps are for is an imperfect student, such as a solution in
a few steps of Adams and Bashforth. Frechet distances, with 95 % intervals, of 1, 2, 4 and 8 steps, for each share of
the noise that a step keeps (`slam.tables.student_table`). The last line is one JSON object.

    python benchmarks/slam_oracle.py --model checkpoints/fashion-sit --guidance_scale 2                 # exact
    python benchmarks/slam_oracle.py --model checkpoints/fashion-sit --guidance_scale 2 --solver_steps 3 --order 3
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers import load_denoiser
from denoisers.generate import generate
from evaluation.evaluate import shipped_measure
from evaluation.metrics import Measure
from slam.tables import student_table
from solvers import named_solver, sample
from solvers.ipndm import ipndm
from solvers.prediction import data_weights
from solvers.progress import progress_bar
from training.arguments import guarded


class Oracle(nn.Module):
    """The end of the teacher's path through a state, told as the output of its network there.

    Args:
        teacher: its network, guidance included.
        solver_steps: evaluations from each state.
        order: of the Adams-Bashforth steps.
    """

    def __init__(self, teacher: nn.Module, solver_steps: int, order: int) -> None:
        super().__init__()
        self.teacher, self.solver_steps, self.order = teacher, solver_steps, order
        self.schedule, self.sample_shape = teacher.schedule, teacher.sample_shape
        self.num_classes = getattr(teacher, "num_classes", None)

    def forward(self, x: Tensor, timestep: Tensor, condition: Any = None) -> Tensor:
        """The output whose data prediction is that end, of the shape of x."""
        start, end = float(timestep), self.schedule.t_min
        falling = torch.linspace(start, end, self.solver_steps + 1, dtype=torch.float64)[:-1]
        data = sample(self.teacher, ipndm(self.schedule, falling, min(self.order, 4)), x, condition)
        on_state, on_output = data_weights(self.schedule.prediction_type, *self.schedule.alpha_sigma(falling[:1]))
        return (data - on_state.to(x.dtype) * x) / on_output.to(x.dtype)


def distance(images: Tensor, measure: Measure, repeats: int = 200) -> tuple[float, float, float]:
    """Frechet distance to the data and its interval."""
    found = measure.figures_of(images, repeats)
    return found["fd"], found["fd_low"], found["fd_high"]


def main() -> None:
    """Measure every number of steps with every share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/fashion-sit")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--solver_steps", type=int, default=30, help="evaluations of the teacher from each state")
    parser.add_argument("--order", type=int, default=4, help="of its Adams-Bashforth steps, 1 to 4")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.0, 0.5, 0.7, 0.9])
    parser.add_argument("--num_points", type=int, default=50)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=125)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    teacher = load_denoiser(options.model, options.guidance_scale, precision=options.precision)
    oracle, seeds = Oracle(teacher, options.solver_steps, options.order), range(options.num_samples)
    measure = shipped_measure(teacher, options.num_samples, ["fd"])
    runs = [(steps, kept) for steps in options.steps for kept in (options.kept if steps > 1 else options.kept[:1])]
    best = distance(generate(teacher, named_solver("unipc:30", teacher.schedule), seeds, batch_size=250), measure)
    results: dict[str, Any] = {"teacher": best}
    print(f"teacher, UniPC with 30: {best[0]:.3f} ({best[1]:.3f} to {best[2]:.3f})", flush=True)
    for steps, kept in progress_bar(runs, "steps and shares", "run"):
        table = student_table(teacher.schedule, steps, options.num_points, kept)
        found = distance(generate(oracle, table, seeds, batch_size=options.batch_size), measure)
        results[f"{steps}, {kept:g}"] = found
        print(f"{steps} steps, kept {kept:g}: {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})", flush=True)
    print(json.dumps({name: [round(value, 4) for value in values] for name, values in results.items()}))


if __name__ == "__main__":
    guarded(main)
