"""NoiseSchedule: from the timestep a checkpoint is told to the node (alpha, sigma) and back."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from solvers.parameters import check_parameters, training_betas
from solvers.prediction import check_prediction_type

KINDS = ("discrete_vp", "continuous_vp", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much data and noise a state holds at a timestep: x = alpha * data + sigma * noise.

    Timesteps are in the checkpoint's own units, may be fractional, and grow with the noise:
    0 .. T-1 for a discrete VP schedule, 0 .. scale for the continuous ones (flow: timestep = scale * sigma).

    Args:
        kind: `discrete_vp`, `continuous_vp` or `flow`; use the constructors `linear`, `scaled_linear`, `cosine`,
            `from_betas`, `continuous_vp`, `flow` and `from_scheduler` rather than this one.
        prediction_type: what the network's output is, by diffusers' names.
        parameters: the numbers that define the schedule; JSON types only.
    Raises:
        ValueError: unknown kind or prediction type, or parameters out of range.
    """

    kind: str
    prediction_type: str
    parameters: dict[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown schedule kind {self.kind!r}: use one of {', '.join(KINDS)}")
        check_prediction_type(self.prediction_type)
        check_parameters(self.kind, self.parameters)
        if self.kind == "discrete_vp":
            _ = self._angles

    @classmethod
    def linear(
        cls,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> "NoiseSchedule":
        """Discrete VP with betas linear in the timestep (DDPM, arXiv 2006.11239; DiT)."""
        return cls._discrete(
            "linear", beta_start, beta_end, num_train_timesteps, prediction_type, rescale_betas_zero_snr
        )

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> "NoiseSchedule":
        """Discrete VP with the square roots of the betas linear in the timestep (latent diffusion)."""
        return cls._discrete(
            "scaled_linear", beta_start, beta_end, num_train_timesteps, prediction_type, rescale_betas_zero_snr
        )

    @classmethod
    def cosine(
        cls, num_train_timesteps: int = 1000, prediction_type: str = "epsilon", rescale_betas_zero_snr: bool = False
    ) -> "NoiseSchedule":
        """Discrete VP with the squared-cosine cumulative product, betas capped at 0.999 (arXiv 2102.09672)."""
        return cls._discrete(
            "squaredcos_cap_v2", None, None, num_train_timesteps, prediction_type, rescale_betas_zero_snr
        )

    @classmethod
    def from_betas(cls, betas: Sequence[float], prediction_type: str = "epsilon") -> "NoiseSchedule":
        """Discrete VP from a list of betas in (0, 1]."""
        return cls("discrete_vp", prediction_type, {"trained_betas": [float(beta) for beta in betas]})

    @classmethod
    def continuous_vp(
        cls,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        timestep_scale: float = 1000.0,
        prediction_type: str = "epsilon",
    ) -> "NoiseSchedule":
        """Continuous VP, log alpha = -(beta_max - beta_min) time^2 / 4 - beta_min time / 2 (arXiv 2011.13456)."""
        parameters = {"beta_min": beta_min, "beta_max": beta_max, "timestep_scale": timestep_scale}
        return cls("continuous_vp", prediction_type, parameters)

    @classmethod
    def flow(
        cls,
        shift: float = 1.0,
        timestep_scale: float = 1000.0,
        prediction_type: str = "flow_prediction",
        shift_terminal: float | None = None,
    ) -> "NoiseSchedule":
        """Rectified flow, alpha = 1 - sigma, timestep = timestep_scale * sigma.

        `shift` moves evenly spaced steps towards the noise, sigma -> shift sigma / (1 + (shift - 1) sigma)
        (arXiv 2403.03206), and `shift_terminal` then stretches them to end there; both belong to the spacing of steps,
        not to the map from timestep to node.
        """
        terminal = {} if shift_terminal is None else {"shift_terminal": shift_terminal}
        return cls("flow", prediction_type, {"shift": shift, "timestep_scale": timestep_scale, **terminal})

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule a diffusers scheduler (or its config) describes.

        Raises:
            ValueError: a beta schedule this class does not know, or parameters out of range.
        """
        config = dict(getattr(scheduler, "config", scheduler))
        name = str(config.get("_class_name") or type(scheduler).__name__)
        steps = int(config.get("num_train_timesteps", 1000))
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
            return cls.flow(shift, float(steps), shift_terminal=config.get("shift_terminal") or None)
        if config.get("trained_betas") is not None:
            parameters: dict[str, Any] = {"trained_betas": [float(beta) for beta in config["trained_betas"]]}
        else:
            parameters = {"beta_schedule": config.get("beta_schedule"), "num_train_timesteps": steps}
            if config.get("beta_schedule") != "squaredcos_cap_v2":
                parameters |= {name: float(config[name]) for name in ("beta_start", "beta_end") if name in config}
            parameters["rescale_betas_zero_snr"] = False
        if config.get("rescale_betas_zero_snr"):
            parameters["rescale_betas_zero_snr"] = True
        if config.get("snr_shift_scale", 1.0) != 1:
            parameters["snr_shift_scale"] = float(config["snr_shift_scale"])
        return cls("discrete_vp", config.get("prediction_type", "epsilon"), parameters)

    @classmethod
    def _discrete(cls, beta_schedule, beta_start, beta_end, steps, prediction_type, rescale) -> "NoiseSchedule":
        parameters: dict[str, Any] = {"beta_schedule": beta_schedule, "num_train_timesteps": int(steps)}
        if beta_start is not None:
            parameters |= {"beta_start": float(beta_start), "beta_end": float(beta_end)}
        return cls("discrete_vp", prediction_type, parameters | {"rescale_betas_zero_snr": rescale})

    @property
    def t_min(self) -> float:
        """Smallest timestep the network was trained on."""
        return 0.0

    @property
    def t_max(self) -> float:
        """Largest timestep the network was trained on."""
        if self.kind == "discrete_vp":
            return float(len(self._angles) - 1)
        return float(self.parameters["timestep_scale"])

    def alpha_sigma(self, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) in float64, of the shape of `timestep`, at timesteps inside [t_min, t_max].

        Between the timesteps of a discrete schedule the angle atan2(sigma, alpha) is interpolated linearly, which
        stays finite at zero signal-to-noise ratio. Differentiable with respect to `timestep`.

        Raises:
            ValueError: a timestep outside [t_min, t_max] or not finite.
        """
        timestep = torch.as_tensor(timestep, dtype=torch.float64)
        if not bool(((timestep >= self.t_min) & (timestep <= self.t_max)).all()):
            found = timestep.detach().flatten().tolist()
            raise ValueError(f"timesteps {found} leave the schedule's range [{self.t_min}, {self.t_max}]")
        if self.kind == "flow":
            sigma = timestep / self.parameters["timestep_scale"]
            return 1 - sigma, sigma
        if self.kind == "continuous_vp":
            log_alpha = self._log_alpha(timestep / self.parameters["timestep_scale"])
            return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        angles = self._angles.to(timestep.device)
        lower = timestep.detach().floor().clamp(max=len(angles) - 2).long()
        angle = torch.lerp(angles[lower], angles[lower + 1], timestep - lower)
        return angle.cos(), angle.sin()

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The timestep, float64, whose node has the ratio sigma / alpha; nodes beyond the ends get the ends."""
        alpha, sigma = torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64)
        angle = torch.atan2(sigma, alpha)
        if self.kind == "flow":
            return self.parameters["timestep_scale"] * sigma / (alpha + sigma)
        if self.kind == "continuous_vp":
            low, high = self.parameters["beta_min"], self.parameters["beta_max"]
            log_alpha = angle.cos().log()
            time = -4 * log_alpha / (low + (low**2 - 4 * (high - low) * log_alpha).sqrt())
            return self.parameters["timestep_scale"] * time.clamp(0, 1)
        angles = self._angles
        upper = torch.searchsorted(angles, angle.contiguous()).clamp(1, len(angles) - 1)
        gap = angles[upper] - angles[upper - 1]
        return (upper - 1 + (angle - angles[upper - 1]) / gap).clamp(0, len(angles) - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `from_dict` gives an equal schedule."""
        return {"kind": self.kind, "prediction_type": self.prediction_type, "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NoiseSchedule":
        """Inverse of `to_dict`."""
        return cls(values["kind"], values["prediction_type"], dict(values["parameters"]))

    def fingerprint(self) -> str:
        """SHA-256 of the defining parameters: never of float arrays, which differ between precisions."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _log_alpha(self, time: Tensor) -> Tensor:
        low, high = self.parameters["beta_min"], self.parameters["beta_max"]
        return -(high - low) * time**2 / 4 - low * time / 2

    @cached_property
    def _angles(self) -> Tensor:
        """atan2(sigma, alpha) at every training timestep, float64, strictly increasing."""
        alpha = (1 - training_betas(self.parameters)).cumprod(0).sqrt()
        if self.parameters.get("rescale_betas_zero_snr"):
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return torch.atan2((1 - alpha**2).sqrt(), alpha)
