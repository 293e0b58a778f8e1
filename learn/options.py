"""What learning is asked for. Imports next to nothing, so that a command line is there at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

METHODS = ("auto", "olss")
DTYPES = ("float32", "bfloat16", "float16", "auto")
SHARD = 8  # trajectories in a file: what an interruption can cost


@dataclass(frozen=True)
class LearnOptions:
    """What to learn, from how much, and where it goes.

    Args:
        calls: numbers of network calls per image, a solver each. A row that is guided makes two.
        guidance_scale: what the solvers are for; default: the pipeline's own, else 1 (none).
        prompts: of the trajectories, used in turn; for models that take prompts.
        output: folder of everything that is written; an interrupted run goes on there.
        call: further arguments of a pipeline's call, such as height or num_frames.
        trajectories: so many to fit on, and so many held out: half of these chooses, half reports.
        teacher: the slow solver as name:steps; default: UniPC with 30 steps.
        method: `auto`: least squares, then a search by derivatives where that gains; `olss`: least squares alone.
        dtype: what the network computes in; states stay in float32. `auto`: bfloat16 where the device has units for it,
            else float32.
        device: of the network; `auto`: the GPU where there is one, and for a model in memory where it is.
        batch_size: samples in a call of the network; halved where memory does not suffice.
        save_pipeline: folder for the pipeline with the learned scheduler in it.
        trust: a `denoiser.yaml` may name a class of your own.
    Raises:
        ValueError: an option out of its range.
    """

    calls: Sequence[int] = (4, 6, 8, 10)
    guidance_scale: float | None = None
    prompts: Sequence[Any] | None = None
    output: str = "runs/learn"
    call: Mapping[str, Any] = field(default_factory=dict)
    trajectories: int = 16
    teacher: str | None = None
    method: str = "auto"
    dtype: str = "float32"
    device: str = "auto"
    batch_size: int = 16
    save_pipeline: str | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", tuple(sorted(set(self.calls))))
        object.__setattr__(self, "output", str(self.output))
        if not self.calls or self.calls[0] < 1:
            raise ValueError(
                f"calls are {list(self.calls)}: give one or more numbers of network calls, each at least 1"
            )
        if self.prompts is not None and (isinstance(self.prompts, str) or not len(self.prompts)):
            raise ValueError(f"prompts are {self.prompts!r}: give a list of at least one, or a file of one a line")
        for name, least in (("trajectories", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
        for name, allowed in (("method", METHODS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(allowed)}")
