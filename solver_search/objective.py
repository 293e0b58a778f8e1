"""The loss of a table over a batch of teacher trajectories, its gradient and its normal equations, piece by piece."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.shards import Trajectories
from data.sources import Batch
from denoisers import Evaluations, with_precision
from denoisers.precision import PRECISIONS
from solver_search.lm import Damping, NormalEquations, StepResult, linearize, lm_step, normal_equations
from solver_search.losses import SearchLoss, total
from solver_search.memory import Checkpointed
from solvers import SolverTable, sample_trace
from training.arguments import check_choice
from training.method import Parameters


@dataclass(frozen=True)
class Compute:
    """How losses and derivatives are computed; a search may be resumed with other pieces.

    Args:
        micro_batch: samples that go through the network at once, at most; the kernel part of a loss compares these with
            each other.
        tangent_chunk: forward-mode tangents that do, each of `micro_batch` samples; None: all.
        tangent_precision: `bf16` runs the network of the derivatives under autocast, which is two to three times as
            fast; residuals stay as they are.
        curvature_samples: the Gauss-Newton matrix comes from the first so many samples of a batch, the gradient from
            all by backpropagation: K tangents a sample cost more than a backward pass. Default: both from all.
        gradient_checkpointing: recompute each evaluation's activations in the backward pass.
    Raises:
        ValueError: a number below 1, or an unknown precision.
    """

    micro_batch: int = field(default=32, compare=False)
    tangent_chunk: int | None = field(default=4, compare=False)
    tangent_precision: str = "float32"
    curvature_samples: int | None = None
    gradient_checkpointing: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("micro_batch", "tangent_chunk", "curvature_samples")}
        if any(value is not None and value < 1 for value in numbers.values()):
            raise ValueError(f"{numbers}: each must be at least 1")
        check_choice("tangent_precision", self.tangent_precision, PRECISIONS)


@dataclass
class Objective:
    """Distances between a table's runs and the teacher's.

    Args:
        denoiser: the frozen network.
        loss: what to match.
        extractor: images -> features, for the feature part of the loss.
        compute: in which pieces.
        reduce: sums a float64 tensor over all processes.
        share: how many of the first so many samples of a step are this process's.
    Raises:
        ValueError: a feature loss without an extractor.
    """

    denoiser: nn.Module
    loss: SearchLoss
    extractor: nn.Module | None = None
    compute: Compute = Compute()
    reduce: Callable[[Tensor], Tensor] = lambda value: value
    share: Callable[[int], int] = lambda count: count
    evaluations: Evaluations = field(init=False)

    def __post_init__(self) -> None:
        self.evaluations = Evaluations.of(self.denoiser)
        if self.loss.needs_extractor and self.extractor is None:
            raise ValueError("the loss compares features but no extractor is given: set one, or loss.feature to 0")

    @torch.no_grad()
    def value(self, parameters: Parameters, theta: Tensor, teacher: Batch) -> float:
        """The loss, averaged over the samples of all processes."""
        return float(self.mean(teacher, lambda part: self._loss(parameters, theta, part)[None])[0])

    @torch.no_grad()
    def squared_errors(self, table: SolverTable, teacher: Batch) -> Tensor:
        """Mean squared difference of each image of this process to the teacher's, (batch,) float64 on the CPU."""
        ends = ((self._run(table, part)[-1], part.end) for part in self._parts(teacher))
        return torch.cat([(end - wanted).double().flatten(1).square().mean(1).cpu() for end, wanted in ends])

    def rmse(self, table: SolverTable, teacher: Batch) -> float:
        """Root mean squared error of this process's images to the teacher's."""
        return float(self.squared_errors(table, teacher).mean().sqrt())

    def gradient(self, parameters: Parameters, theta: Tensor, teacher: Batch) -> tuple[float, Tensor]:
        """The loss and its gradient (K,), by backpropagation through the whole run."""

        def both(part: Trajectories) -> Tensor:
            leaf = theta.detach().cpu().requires_grad_()
            with torch.enable_grad():
                loss = self._loss(parameters, leaf, part, self.compute.gradient_checkpointing)
            self.evaluations.backward += len(part) * parameters.nfe
            self.evaluations.forward += len(part) * parameters.nfe * self.compute.gradient_checkpointing
            return torch.cat([loss.detach()[None].cpu().double(), torch.autograd.grad(loss, leaf)[0]])

        mean = self.mean(teacher, both)
        return float(mean[0]), mean[1:]

    def equations(self, parameters: Parameters, theta: Tensor, teacher: Batch) -> NormalEquations:
        """Gauss-Newton's quadratic at theta."""
        size, tangent_denoiser = len(theta), with_precision(self.denoiser, self.compute.tangent_precision)

        def flat(part: Trajectories) -> Tensor:
            run = linearize(
                self.denoiser,
                parameters,
                theta,
                part.noise,
                part.condition,
                self.compute.tangent_chunk,
                self.evaluations,
                tangent_denoiser,
            )
            found = normal_equations(run, self.loss, part, self.extractor)
            loss = torch.tensor([found.loss], dtype=torch.float64)
            return torch.cat([found.matrix.flatten(), found.gradient, loss])

        mean = self.mean(teacher, flat)
        matrix, gradient, loss = mean.split([size * size, size, 1])
        return NormalEquations(matrix.reshape(size, size), gradient, float(loss))

    def lm_step(
        self, parameters: Parameters, theta: Tensor, teacher: Batch, damping: Damping
    ) -> tuple[StepResult, float]:
        """One Levenberg-Marquardt step on a batch, and the loss before it."""
        equations = self._quadratic(parameters, theta, teacher)
        values = equations.matrix.sum() + equations.gradient.sum() + equations.loss
        if not bool(torch.isfinite(values)):
            return StepResult(theta, damping, float("nan"), False), equations.loss
        step = lm_step(
            equations, theta, lambda trial: self.value(parameters, trial, teacher), parameters.project, damping
        )
        return step, equations.loss

    def _quadratic(self, parameters: Parameters, theta: Tensor, teacher: Batch) -> NormalEquations:
        count = self.compute.curvature_samples
        if count is None or count >= int(self.reduce(torch.tensor(len(teacher), dtype=torch.float64))):
            return self.equations(parameters, theta, teacher)
        matrix = self.equations(parameters, theta, teacher[: self.share(count)]).matrix
        loss, gradient = self.gradient(parameters, theta, teacher)
        return NormalEquations(matrix, gradient / 2, loss)

    def _loss(self, parameters: Parameters, theta: Tensor, part: Trajectories, checkpointing: bool = False) -> Tensor:
        table = parameters.table(theta.cpu())
        states = self._run(table, part, checkpointing)
        return total(self.loss, table, states, part, self.extractor)

    def _run(self, table: SolverTable, part: Trajectories, checkpointing: bool = False) -> list[Tensor]:
        denoiser = Checkpointed(self.denoiser) if checkpointing else self.denoiser
        self.evaluations.forward += len(part) * table.nfe
        return sample_trace(denoiser, table, part.noise, part.condition).states

    def mean(self, teacher: Batch, function: Callable[[Trajectories], Tensor]) -> Tensor:
        """Mean over the samples of all processes of a vector that is one of a part of them."""
        sums = sum(function(part).cpu().double() * len(part) for part in self._parts(teacher))
        counted = self.reduce(torch.cat([sums, torch.tensor([float(len(teacher))], dtype=torch.float64)]))
        return counted[:-1] / counted[-1]

    def _parts(self, teacher: Batch) -> Iterator[Trajectories]:
        """Parts of nearly the same size: a last one of a single sample would have no pair."""
        total, size = len(teacher), self.compute.micro_batch
        count = -(-total // size)
        for number in range(count):
            yield teacher[total * number // count : total * (number + 1) // count]
