"""NoiseSchedule: from the timestep a checkpoint is told to the node (alpha, sigma) and back."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from solvers.kinds import KINDS, Kind
from solvers.parameters import check_parameters
from solvers.prediction import check_prediction_type, edm_prediction, velocity_scale


@dataclass(frozen=True)
class NoiseSchedule:
    """How much data and noise a state holds at a timestep: x = alpha * data + sigma * noise.

    Timesteps are in the checkpoint's own units, may be fractional, and grow with the noise:
    0 .. T-1 for a discrete VP schedule, 0 .. scale for the continuous ones (flow: timestep = scale * sigma), and
    log(sigma / alpha) / 4 for EDM.

    Args:
        kind: `discrete_vp`, `continuous_vp`, `flow` or `edm`; use the constructors `linear`, `scaled_linear`,
            `cosine`, `from_betas`, `continuous_vp`, `flow`, `edm` and `from_scheduler` rather than this one.
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
        scale = velocity_scale(self.prediction_type)
        if scale is not None and self.prediction_type != "v_prediction":
            data = self.parameters.get("sigma_data")
            if abs(scale) != data:
                raise ValueError(f"{self.prediction_type} is for EDM with sigma_data {abs(scale)}, found {data}")
        _ = self._map

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
        not to the map from timestep to node. Where it depends on the number of steps, `step_shifts` lists it.
        """
        terminal = {} if shift_terminal is None else {"shift_terminal": shift_terminal}
        return cls("flow", prediction_type, {"shift": shift, "timestep_scale": timestep_scale, **terminal})

    @classmethod
    def edm(
        cls,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        prediction_type: str | None = None,
    ) -> "NoiseSchedule":
        """x = data + s noise, s in [sigma_min, sigma_max], with EDM's preconditioning (arXiv 2206.00364).

        A state is what the network receives, c_in x, so that its node is (c_in, s c_in), c_in = 1 / sqrt(s^2 +
        sigma_data^2); a timestep is c_noise = log(s) / 4; an output is the network's own F, in data = c_skip x +
        c_out F (see `solvers.prediction.edm_prediction`). The image has the node (1, 0). `rho` belongs to the spacing
        of steps alone.
        """
        numbers = {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_data": sigma_data, "rho": rho}
        parameters = {name: float(value) for name, value in numbers.items()}
        return cls("edm", prediction_type or edm_prediction(sigma_data), parameters)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """The schedule a diffusers scheduler (or its config) describes; of a TableScheduler that of its tables.

        Raises:
            ValueError: a beta schedule this class does not know, or parameters out of range.
        """
        config = dict(getattr(scheduler, "config", scheduler))
        if "tables" in config and config["schedule"] is not None:
            return cls.from_dict(config["schedule"])
        name = str(config.get("_class_name") or type(scheduler).__name__)
        steps = int(config.get("num_train_timesteps", 1000))
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
            return cls.flow(shift, float(steps), shift_terminal=config.get("shift_terminal") or None)
        if name.startswith("EDM"):
            numbers = {name: config[name] for name in ("sigma_min", "sigma_max", "sigma_data", "rho") if name in config}
            sign = -1 if config.get("prediction_type") == "v_prediction" else 1
            return cls.edm(**numbers, prediction_type=edm_prediction(sign * numbers.get("sigma_data", 0.5)))
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

    def shift_at(self, steps: int) -> float:
        """The shift of a flow for a number of steps: step_shifts[steps - 1] where the schedule lists so many."""
        listed = self.parameters.get("step_shifts", [])
        return float(listed[steps - 1] if 1 <= steps <= len(listed) else self.parameters["shift"])

    @property
    def t_min(self) -> float:
        """Smallest timestep the network was trained on."""
        return self._map.t_min

    @property
    def t_max(self) -> float:
        """Largest timestep the network was trained on."""
        return self._map.t_max

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
        return self._map.node(timestep)

    def timestep(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The timestep, float64, whose node has the ratio sigma / alpha; nodes beyond the ends get the ends."""
        alpha, sigma = torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64)
        return self._map.timestep(alpha, sigma)

    def at_time(self, time: Tensor) -> Tensor:
        """The timestep at a time in [0, 1], 1 being pure noise, of the shape of `time`.

        Times that are evenly spaced are the kind's evenly spaced steps: in the timestep (without a flow's shift), of
        EDM in (sigma / alpha)^(1 / rho).
        """
        return self._map.at_time(time)

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

    @cached_property
    def _map(self) -> Kind:
        return KINDS[self.kind](self.parameters)
