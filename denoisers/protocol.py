"""What the samplers call a denoiser."""

import copy
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from solvers.identity import own_hash
from solvers.schedule import NoiseSchedule


@runtime_checkable
class Denoiser(Protocol):
    """A network that says, for a noisy state and the timestep it is told, what its prediction type means.

        output = denoiser(x, timestep, condition)

    A plain function is enough for `sample` and `parallel_sample`; the attributes are read where an artifact is checked
    against a model. Read with `getattr`, because they are optional:

    | attribute | meaning |
    |---|---|
    | `guidance_scale` | guidance already inside the outputs, 1.0 (none) when absent |
    | `num_classes` | the condition is an int64 label (batch,) in 0 .. num_classes - 1 |
    | `conditions` | conditions to choose from by seed, see `class_labels` |
    | `condition_of(seeds)` | the conditions that belong to seeds, where it is neither |
    | `null_condition(condition)` | the condition of the unconditional evaluation, of the structure of `condition` |
    | `is_told_guidance`, `told(scale)` | a guidance-distilled network, and the denoiser in which it is told a scale |
    | `decode(states)` | images (batch, 3, height, width) in [-1, 1] of a latent model's states |
    | `needs_node` | also pass `node=(alpha, sigma)`, as thresholding requires |
    | `name`, `weight_hash` | what artifacts record about the network; by default the hash of a module's weights |
    | `thresholding` | settings of clipping or thresholding inside the outputs, JSON types; None when absent |
    | `settings` | what else outputs depend on, such as a pipeline's prompts; comparisons tell models apart by it |
    """

    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]

    def __call__(self, x: Tensor, timestep: Tensor, condition: Any = None) -> Tensor:
        """The output at a state.

        Args:
            x: (batch, *sample_shape).
            timestep: float tensor, scalar or (batch,), in the schedule's units, may be fractional.
            condition: None, a tensor, or nested containers of tensors, indexed on dimension 0.
        Returns:
            (batch, *sample_shape), of the schedule's prediction type.
        """
        ...


class DenoiserWrapper(nn.Module):
    """A denoiser around another one: attributes it does not have itself are those of the inner `denoiser`."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    @property
    def weight_hash(self) -> str | None:
        """The inner denoiser's: a wrapper is the same network."""
        return own_hash(self.denoiser)

    @property
    def unguided(self) -> nn.Module:
        """The same around the network without guidance, for tables that make the calls of guidance themselves."""
        inner = getattr(self.denoiser, "unguided", self.denoiser)
        return self if inner is self.denoiser else self._around(inner)

    def told(self, guidance_scale: float) -> nn.Module:
        """The same around the network that is told a guidance scale."""
        return self._around(self.denoiser.told(guidance_scale))

    def _around(self, inner: nn.Module) -> nn.Module:
        outer = copy.copy(self)
        outer._modules = {**self._modules, "denoiser": inner}
        return outer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)
