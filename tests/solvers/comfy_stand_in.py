"""What the ComfyUI nodes need of ComfyUI, in a few lines: noise levels, a guider, a sampler with inpainting.

`tests/solvers/test_comfyui.py` runs the same tests on this and on ComfyUI itself.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from solvers import NoiseSchedule
from solvers.prediction import per_sample, to_data


@dataclass
class Sampling:
    """Noise levels of a model on a schedule: x = data + sigma noise, or a flow's own states."""

    schedule: NoiseSchedule

    @property
    def flow(self) -> bool:
        return self.schedule.kind == "flow"

    @property
    def sigma_max(self) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(self.schedule.t_max)
        return (sigma / (alpha + sigma if self.flow else alpha)).float()

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        sigma = per_sample(sigma, noise)
        if self.flow:
            return sigma * noise + (1 - sigma) * latent_image
        return noise * ((1 + sigma**2).sqrt() if max_denoise else sigma) + latent_image

    def node(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.rsqrt(self.schedule.parameters.get("sigma_data", 1.0) ** 2 + sigma.double() ** 2)
        return (1 - sigma.double(), sigma.double()) if self.flow else (norm, sigma * norm)

    def timestep(self, sigma: Tensor) -> Tensor:
        told = self.schedule.timestep(*self.node(sigma))
        return told.round() if self.schedule.kind == "discrete_vp" else told


@dataclass
class Model:
    """A network behind `apply_model(x, sigma, condition) -> denoised`."""

    network: Any
    model_sampling: Sampling
    seen: list[int] = field(default_factory=list)

    def apply_model(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        self.seen.append(len(x))
        alpha, level = (value.to(x) for value in self.model_sampling.node(sigma))
        state = x if self.model_sampling.flow else per_sample(alpha, x) * x
        output = self.network(state, self.model_sampling.timestep(sigma).float(), condition)
        return to_data(self.model_sampling.schedule.prediction_type, state, output, alpha, level)


def calc_cond_batch(model: Model, conditions: list, x: Tensor, sigma: Tensor, options: dict) -> list[Tensor]:
    told = torch.cat([condition[0][0].expand(len(x), -1, -1) for condition in conditions])
    count = len(conditions)
    return list(model.apply_model(torch.cat([x] * count), torch.cat([sigma] * count), told).chunk(count))


class CFGGuider:
    def __init__(self, model: Model) -> None:
        self.inner_model, self.cfg, self.model_options = model, 1.0, {}

    def set_conds(self, positive: list, negative: list) -> None:
        self.conds = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        return self.predict_noise(x, sigma, model_options, seed)

    def predict_noise(self, x: Tensor, sigma: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        pair = calc_cond_batch(self.inner_model, [self.conds["positive"], self.conds["negative"]], x, sigma, {})
        return pair[1] + self.cfg * (pair[0] - pair[1])

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=0, seed=None):
        extra = {"model_options": self.model_options, "seed": seed, "denoise_mask": denoise_mask}
        return sampler.sample(self, sigmas, extra, callback, noise, latent_image)


@dataclass
class Inpainted:
    """A guider whose kept area is noised before each call and clean after it."""

    inner_model: CFGGuider
    latent_image: Tensor
    noise: Tensor

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        keep = 0 if denoise_mask is None else 1 - denoise_mask
        noised = self.inner_model.inner_model.model_sampling.noise_scaling(sigma, self.noise, self.latent_image)
        found = self.inner_model(x * (1 - keep) + noised * keep, sigma, model_options, seed)
        return found * (1 - keep) + self.latent_image * keep


@dataclass
class KSAMPLER:
    function: Any

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image):
        sampling = guider.inner_model.model_sampling
        full = sigmas[0] > sampling.sigma_max or math.isclose(sigmas[0], sampling.sigma_max, rel_tol=1e-5)
        x = sampling.noise_scaling(sigmas[:1], noise, latent_image, full)
        seen = None if callback is None else lambda row: callback(row["i"], row["denoised"], row["x"], len(sigmas) - 1)
        model = Inpainted(guider, latent_image, noise)
        return self.function(model, x, sigmas, extra_args=extra_args, callback=seen, disable=True)
