"""Learned diffusion solvers as a ComfyUI custom node: a SAMPLER and its SIGMAS for SamplerCustom.

The solvers and their numbers are in solvers.json beside this file. A row combines states, network outputs and noises:

    state[i+1] = sum_j state_coef[i,j] state[j] + output_coef[i,j] output[j] + noise_coef[i,j] noise[j],   j <= i

ComfyUI's model takes x at noise level sigma and returns the denoised image. With the numbers of row i, x is
call_scale * state, sigma is call_sigma, and the network's output is from_state * state + from_denoised * denoised.
"""

import json
import math
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

SOLVERS = json.loads(Path(__file__).with_name("solvers.json").read_text(encoding="utf-8"))
SEED_LIMIT = 2**32


def sample_table(model, x, sigmas, extra_args=None, callback=None, disable=None, *, solver):
    """ComfyUI's sampler function.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, sigma (batch,).
        x: start noise at sigmas[0], (batch, *shape), as ComfyUI scales it.
        sigmas: (N+1,), those of the same node.
        extra_args: passed to the model; its `seed` addresses the noises of a stochastic solver.
        callback: called after each evaluation with a dict of x, i, sigma, sigma_hat, denoised.
        solver: one entry of SOLVERS.
    Returns:
        The image, (batch, *shape).
    """
    steps = len(solver["timesteps"])
    if len(sigmas) != steps + 1:
        raise ValueError(f"{len(sigmas) - 1} sigmas for a solver of {steps} steps: connect the SIGMAS of the same node")
    extra_args = {} if extra_args is None else extra_args
    scale = solver["start_scale"] / _noise_scale(model, float(sigmas[0]), solver)
    states, outputs, noises = [x.to(torch.promote_types(x.dtype, torch.float32)) * scale], [], []
    for i in range(steps):
        call_x, call_sigma = states[i] * solver["call_scale"][i], solver["call_sigma"][i]
        denoised = model(call_x.to(x.dtype), x.new_full((len(x),), call_sigma), **extra_args).to(states[0])
        outputs.append(solver["from_state"][i] * states[i] + solver["from_denoised"][i] * denoised)
        if solver["stochastic"]:
            noises.append(_noise(int(extra_args.get("seed") or 0), i, states[0]))
        if callback is not None:
            callback({"x": call_x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        states.append(_combine(solver, i, (states, outputs, noises)))
    return states[-1].to(x.dtype)


def _combine(solver, row, history):
    total = torch.zeros_like(history[0][0])
    for name, values in zip(("state_coef", "output_coef", "noise_coef"), history):
        for weight, value in zip(solver[name][row], values):
            if weight:
                total = torch.add(total, value, alpha=weight)
    return total


def _noise_scale(model, sigma, solver):
    """What ComfyUI has multiplied unit noise by: sigma, or sqrt(1 + sigma^2) at the maximum of a VP model."""
    sampling = getattr(getattr(getattr(model, "inner_model", None), "inner_model", None), "model_sampling", None)
    largest = float(getattr(sampling, "sigma_max", math.inf))
    full = sigma > largest or math.isclose(sigma, largest, rel_tol=1e-5)
    return math.sqrt(1 + sigma**2) if full and solver["kind"] != "flow" else sigma


def _noise(seed, row, like):
    """Sample k's noise from the seed + k and the row alone, whatever the batch."""
    draws = []
    for k in range(len(like)):
        generator = np.random.Generator(np.random.Philox(key=[(seed + k) % SEED_LIMIT, row]))
        draws.append(torch.as_tensor(generator.standard_normal(like.shape[1:], np.float32)))
    return torch.stack(draws).to(like)


class LearnedSolver:
    """The node: choose a solver, get its sampler and its sigmas."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "build"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"solver": (list(SOLVERS),)}}

    def build(self, solver):
        chosen = SOLVERS[solver]
        sampler = import_module("comfy.samplers").KSAMPLER(partial(sample_table, solver=chosen))
        return sampler, torch.tensor(chosen["sigmas"], dtype=torch.float32)


NODE_CLASS_MAPPINGS = {"LearnedSolver": LearnedSolver}
NODE_DISPLAY_NAME_MAPPINGS = {"LearnedSolver": "Learned solver"}
