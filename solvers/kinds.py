"""The kinds of noise schedules: from timesteps to nodes and back, and from a time in [0, 1] to timesteps."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.parameters import training_betas


class Kind(Protocol):
    """One kind with its parameters; all tensors are float64."""

    t_min: float
    t_max: float

    def node(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at timesteps inside [t_min, t_max], differentiable."""
        ...

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The timestep of the node with the ratio sigma / alpha."""
        ...

    def at_time(self, time: Tensor) -> Tensor:
        """The timestep at a time in [0, 1], 1 being pure noise: even times are this kind's even steps."""
        ...


class DiscreteVP:
    """Training steps of given betas; between them the angle atan2(sigma, alpha) is interpolated linearly."""

    t_min = 0.0

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        alpha = (1 - training_betas(parameters)).cumprod(0).sqrt()
        if parameters.get("rescale_betas_zero_snr"):
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        self._angles = torch.atan2((1 - alpha**2).sqrt(), alpha)  # strictly increasing
        self.t_max = float(len(alpha) - 1)

    def node(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        angles = self._angles.to(timestep.device)
        lower = timestep.detach().floor().clamp(max=len(angles) - 2).long()
        angle = torch.lerp(angles[lower], angles[lower + 1], timestep - lower)
        return angle.cos(), angle.sin()

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        angles, angle = self._angles, torch.atan2(sigma, alpha)
        upper = torch.searchsorted(angles, angle.contiguous()).clamp(1, len(angles) - 1)
        gap = angles[upper] - angles[upper - 1]
        return (upper - 1 + (angle - angles[upper - 1]) / gap).clamp(0, len(angles) - 1)

    def at_time(self, time: Tensor) -> Tensor:
        return (time * (self.t_max + 1)).clamp(0, self.t_max)


class ContinuousVP:
    """log alpha = -(beta_max - beta_min) time^2 / 4 - beta_min time / 2, timestep = timestep_scale * time."""

    t_min = 0.0

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._low, self._high = parameters["beta_min"], parameters["beta_max"]
        self.t_max = float(parameters["timestep_scale"])

    def node(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        time = timestep / self.t_max
        log_alpha = -(self._high - self._low) * time**2 / 4 - self._low * time / 2
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        log_alpha = torch.atan2(sigma, alpha).cos().log()
        time = -4 * log_alpha / (self._low + (self._low**2 - 4 * (self._high - self._low) * log_alpha).sqrt())
        return self.t_max * time.clamp(0, 1)

    def at_time(self, time: Tensor) -> Tensor:
        return time * self.t_max


class Flow:
    """alpha = 1 - sigma, timestep = timestep_scale * sigma."""

    t_min = 0.0

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.t_max = float(parameters["timestep_scale"])

    def node(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        sigma = timestep / self.t_max
        return 1 - sigma, sigma

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.t_max * sigma / (alpha + sigma)

    def at_time(self, time: Tensor) -> Tensor:
        return time * self.t_max


class EDM:
    """x = data + s noise as the network receives it: scaled by c_in = 1 / sqrt(s^2 + sigma_data^2), told log(s) / 4.

    Its node is (c_in, s c_in). Even steps are even in s^(1 / rho).

    Source: arXiv 2206.00364, table 1.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        levels = [float(parameters[name]) for name in ("sigma_min", "sigma_max")]
        if not levels[0] < levels[1]:
            raise ValueError(f"sigma_min is {levels[0]}, sigma_max {levels[1]}: the noise levels must be in order")
        self._levels = torch.tensor(levels, dtype=torch.float64)
        self._data, self._rho = parameters["sigma_data"], parameters["rho"]
        told = (self._levels.log() / 4).float()  # widened, so that no rounding of an end to float32 leaves them
        self.t_min, self.t_max = torch.nextafter(told, torch.tensor([-torch.inf, torch.inf])).tolist()

    def node(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        level = (4 * timestep).exp()
        alpha = (level**2 + self._data**2).rsqrt()
        return alpha, level * alpha

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return ((sigma / alpha).log() / 4).clamp(self.t_min, self.t_max)

    def at_time(self, time: Tensor) -> Tensor:
        low, high = (self._levels ** (1 / self._rho)).tolist()
        return (low + time * (high - low)).log() * (self._rho / 4)


KINDS: dict[str, Callable[[Mapping[str, Any]], Kind]] = {
    "discrete_vp": DiscreteVP,
    "continuous_vp": ContinuousVP,
    "flow": Flow,
    "edm": EDM,
}
