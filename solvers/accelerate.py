"""accelerate_pipeline: solvers that make network calls of their own, in diffusers pipelines.

    with accelerate_pipeline(pipe, "olss-6.json"):
        image = pipe("a red bicycle", num_inference_steps=4, guidance_scale=7.5).images[0]

Several solvers, or the folder of a saved scheduler, are chosen from by `num_inference_steps`.

A pipeline calls its network for both halves of guidance at every step, and a scheduler sees what it makes of them. Here
the network makes the calls that the solver's row asks for and hands their outputs to the scheduler; the pipeline gets
equal numbers for both halves, of which its guidance formula, u + g (c - u), makes the same numbers again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.utils._pytree import tree_map_only

from solvers.calls import CONDITIONAL, UNCONDITIONAL, drop_learned_variance
from solvers.errors import SolverError
from solvers.identity import guidance_fits
from solvers.proxy import Proxy
from solvers.scheduler import Solver, TableScheduler, load_tables
from solvers.standalone.table_scheduler import pipeline_guidance
from solvers.table import SolverTable

IN_TURN = {"cond": CONDITIONAL, "uncond": UNCONDITIONAL}  # the names of a pipeline's `cache_context`
UNCONDITIONAL_FIRST, CONDITIONAL_FIRST = (UNCONDITIONAL, CONDITIONAL), (CONDITIONAL, UNCONDITIONAL)


@dataclass
class NetworkOutput(BaseOutput):
    """sample: what the pipeline takes for the network's output, (batch, *shape)."""

    sample: Tensor


@dataclass(frozen=True)
class Acceleration:
    """A pipeline that runs a solver, until `restore` or the end of a `with` block.

    Args:
        pipe: the pipeline.
        replaced: its own components, by name.
    """

    pipe: Any
    replaced: dict[str, Any]

    def restore(self) -> None:
        """Give the pipeline its own scheduler and network back."""
        for name, component in self.replaced.items():
            setattr(self.pipe, name, component)

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()


def accelerate_pipeline(
    pipe: Any, solver: Solver | Sequence[Solver], *, guidance_scale: float | None = None
) -> Acceleration:
    """Make a pipeline run solvers, whichever network calls they make.

    The pipeline gets `TableScheduler.for_pipeline`. Of solvers with calls of their own it also gets a stand-in for its
    network, which counts them in `network_calls`: call it with guidance, then, at the solver's scale and with as many
    steps as it has rows. Attributes of the stand-in are the network's; a saved pipeline holds the network itself.

    Args:
        pipe: a diffusers pipeline with its original scheduler.
        solver: an artifact's path, the folder of several or of a saved TableScheduler, a SolverTable, or a list of
            these; each with another number of rows.
        guidance_scale: the scale the pipeline will be called with; None leaves it to be checked at the call, where the
            pipeline shows it.
    Raises:
        SolverError: the solver does not fit the pipeline, or calls that cannot be told apart in it.
    """
    tables = load_tables(solver)
    if guidance_scale is not None:
        guidance_scale = pipeline_guidance(pipe, {"guidance_scale": guidance_scale})
    tables = [_with_branches(table, guidance_scale) for table in tables]
    if "tables" in pipe.scheduler.config:
        raise SolverError("this pipeline runs a solver already: restore its own scheduler first")
    scheduler = TableScheduler.for_pipeline(tables, pipe, guidance_scale=guidance_scale)
    components: dict[str, Any] = {"scheduler": scheduler}
    own = [table for table in tables if table.has_own_calls]
    if own:
        name, stand_in = _network(pipe, {call.branch for table in own for call in table.calls})
        components[name] = stand_in(getattr(pipe, name), pipe=pipe, scheduler=scheduler, network_calls=0)
    replaced = {name: getattr(pipe, name) for name in components}
    for name, component in components.items():
        setattr(pipe, name, component)
    return Acceleration(pipe, replaced)


class BranchedNetwork(Proxy):
    """A pipeline's network that makes the calls of the scheduler's row and hands their outputs to the scheduler.

    It is the network itself while the pipeline has another scheduler, or that one a table whose rows take one output
    each. Learned variances are dropped.

    Args:
        inner: the network.
        pipe: whose network it is.
        scheduler: of the solver.
        network_calls: made so far, of one sample each.
    """

    pipe: Any
    scheduler: TableScheduler
    network_calls: int

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> NetworkOutput | tuple[Tensor]:
        """Equal numbers for all samples, in the shape of the network's output."""
        if self.pipe.scheduler is not self.scheduler:
            return self.inner(*args, return_dict=return_dict, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        if self.scheduler.takes_one_output:
            self._count(len(x))
            return self.inner(*args, return_dict=return_dict, **kwargs)
        self.scheduler.receive(self._outputs(x, args, kwargs))
        channels = getattr(self.inner.config, "out_channels", None) or x.shape[1]
        answer = x.new_ones(len(x), channels, *x.shape[2:])
        return NetworkOutput(sample=answer) if return_dict else (answer,)

    def _outputs(self, x: Tensor, args: Any, kwargs: Any) -> dict[str, Tensor | None]:
        """Outputs by branch, None for one that the row does not take."""
        raise NotImplementedError

    def _evaluate(self, samples: slice, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The network at some samples of a batch, with the arguments of these."""
        size = len(x)

        def chosen(value: Tensor) -> Tensor:
            return value[samples] if value.ndim and len(value) == size else value

        args, kwargs = tree_map_only(Tensor, chosen, (args, kwargs))
        output = self.inner(*args, return_dict=False, **kwargs)[0]
        self._count(len(output))
        return drop_learned_variance(output, x)

    def _count(self, calls: int) -> None:
        object.__setattr__(self, "network_calls", self.network_calls + calls)


class DoubledNetwork(BranchedNetwork):
    """In a pipeline that doubles the batch for guidance; without unconditional calls there is none to double it for."""

    order: tuple[str, str] = UNCONDITIONAL_FIRST

    def _outputs(self, x: Tensor, args: Any, kwargs: Any) -> dict[str, Tensor | None]:
        taken = [branch for branch in self.order if branch in self.scheduler.branches]
        if UNCONDITIONAL not in self.scheduler.all_branches:
            return {CONDITIONAL: self._evaluate(slice(None), x, args, kwargs) if taken else None}
        half = self._half(x)
        outputs: dict[str, Tensor | None] = dict.fromkeys(self.order)
        if taken:
            start = half * self.order.index(taken[0])
            both = self._evaluate(slice(start, start + half * len(taken)), x, args, kwargs)
            outputs |= zip(taken, both.chunk(len(taken)))
        return outputs

    def _half(self, x: Tensor) -> int:
        """Number of samples, from a batch that holds each twice."""
        half, row = len(x) // 2, self.scheduler.step_index
        same = row > self.scheduler.begin_index or torch.equal(x[:half], x[half:])
        if len(x) % 2 or not same or getattr(self.pipe, "do_classifier_free_guidance", True) is False:
            raise SolverError(
                f"the network is called with {len(x)} samples at row {row}, not with each twice: this solver makes "
                "unconditional calls, so call the pipeline with guidance, guidance_scale > 1"
            )
        return half


class DiTNetwork(DoubledNetwork):
    """In DiTPipeline: the conditional half comes first, and the scheduler sees both."""

    order = CONDITIONAL_FIRST

    def _outputs(self, x: Tensor, args: Any, kwargs: Any) -> dict[str, Tensor | None]:
        outputs = super()._outputs(x, args, kwargs)
        repeats = 2 if UNCONDITIONAL in self.scheduler.all_branches else 1
        return {branch: value if value is None else torch.cat([value] * repeats) for branch, value in outputs.items()}


class AlternatingNetwork(BranchedNetwork):
    """In a pipeline that calls its network once for each half of guidance, inside a `cache_context` of its name."""

    context: str | None = None

    @contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        """As the network's own, and the name is noted."""
        object.__setattr__(self, "context", name)
        try:
            with self.inner.cache_context(name, **options):
                yield
        finally:
            object.__setattr__(self, "context", None)

    def _outputs(self, x: Tensor, args: Any, kwargs: Any) -> dict[str, Tensor | None]:
        if self.context not in IN_TURN:
            raise SolverError(f"the pipeline calls its network as {self.context!r}: only {sorted(IN_TURN)} are known")
        branch = IN_TURN[self.context]
        taken = branch in self.scheduler.branches
        return {branch: self._evaluate(slice(None), x, args, kwargs) if taken else None}


STAND_INS: dict[str, tuple[str, type[BranchedNetwork]]] = {
    "StableDiffusionPipeline": ("unet", DoubledNetwork),
    "StableDiffusionXLPipeline": ("unet", DoubledNetwork),
    "StableDiffusion3Pipeline": ("transformer", DoubledNetwork),
    "PixArtAlphaPipeline": ("transformer", DoubledNetwork),
    "DiTPipeline": ("transformer", DiTNetwork),
    "WanPipeline": ("transformer", AlternatingNetwork),
}


def _with_branches(table: SolverTable, guidance_scale: float | None) -> SolverTable:
    """A table that leaves guided outputs out, with the calls that make them; any other as it is.

    Raises:
        SolverError: one for a range of guidance scales without the scale that it shall have.
    """
    made_for = table.info.get("guidance_scale", 1.0)
    scale = made_for if guidance_scale is None else guidance_scale
    if table.has_branches or not table.has_own_calls or scale == 1:
        return table
    if isinstance(scale, Sequence):
        raise SolverError(f"this solver was made for guidance scales {list(scale)}: pass the one as guidance_scale")
    fits = guidance_fits(made_for, scale)
    return replace(table.guided(scale), info={**table.info, "guidance_scale": scale if fits else made_for})


def _network(pipe: Any, branches: set[str]) -> tuple[str, type[BranchedNetwork]]:
    """Name of a pipeline's network, and what tells its calls apart."""
    name = type(pipe).__name__
    if unknown := branches - set(UNCONDITIONAL_FIRST):
        raise SolverError(
            f"the solver calls the branch {min(unknown)!r}: pipelines have {', '.join(UNCONDITIONAL_FIRST)}"
        )
    if name not in STAND_INS or getattr(pipe, "transformer_2", None) is not None:
        second = " with two networks" if name in STAND_INS else ""
        raise SolverError(
            f"this solver makes network calls of its own, and those of {name}{second} cannot be told apart: use it in "
            f"{', '.join(STAND_INS)}, or take a solver with one call a row"
        )
    return STAND_INS[name]
