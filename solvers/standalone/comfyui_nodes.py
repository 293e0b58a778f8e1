"""Learned diffusion solvers as ComfyUI custom nodes: a SAMPLER and its SIGMAS, with a GUIDER where one is needed.

The solvers and their numbers are in solvers.json beside this file. A row combines states, network outputs and noises:

    state[i+1] = sum_j state_coef[i,j] state[j] + sum_k output_coef[i,k] output[k] + sum_j noise_coef[i,j] noise[j],
                 j <= i, row of call k <= i

ComfyUI's model takes x at noise level sigma and returns the denoised image. With the numbers of row i, x is
call_scale * state, sigma is call_sigma, and the network's output is from_state * state + from_denoised * denoised.
A solver makes one call a row, of what the guider makes of the model, or says its `calls`, [row, branch] each; with a
`space` its weights are one channel matrix per band of spatial frequencies.
"""

import json
import math
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

SOLVERS = json.loads(Path(__file__).with_name("solvers.json").read_text(encoding="utf-8"))
SEED_LIMIT = 2**32
CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
KINDS = {True: "a flow", False: "a variance-preserving model"}
PATCHES = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


def sample_table(model, x, sigmas, extra_args=None, callback=None, disable=None, *, solver):
    """ComfyUI's sampler function.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, sigma (batch,); around a guider around the network.
        x: start noise at sigmas[0], (batch, *shape), as ComfyUI scales it.
        sigmas: (N+1,), those of the same node.
        extra_args: passed to the model; its `seed` addresses the noises of a stochastic solver.
        callback: called after each row with a dict of x, i, sigma, sigma_hat, denoised.
        solver: one entry of SOLVERS.
    Returns:
        The image, (batch, *shape); under a mask the kept area is the clean one.
    Raises:
        ValueError: sigmas of another solver, a model of another kind or noise schedule, or a guider that does not tell
            the branches apart that the solver calls.
    """
    calls, extra_args = _calls(solver), {} if extra_args is None else extra_args
    if len(sigmas) != len(calls) + 1:
        raise ValueError(
            f"{len(sigmas) - 1} sigmas for a solver of {len(calls)} steps: connect the SIGMAS of the same node"
        )
    sampling = model.inner_model.inner_model.model_sampling
    _check_model(sampling, solver)
    scale = solver["start_scale"] / _noise_scale(sampling, sigmas[0])
    states, outputs, noises = [x.to(torch.promote_types(x.dtype, torch.float32)) * scale], [], []
    denoised = torch.zeros_like(states[0])
    for i, branches in enumerate(calls):
        call_x, call_sigma = states[i] * solver["call_scale"][i], x.new_full((len(x),), solver["call_sigma"][i])
        for branch in branches:
            _tell(model.inner_model, branch, branches, solver)
            denoised = model(call_x.to(x.dtype), call_sigma, **extra_args).to(states[0])
            outputs.append(solver["from_state"][i] * states[i] + solver["from_denoised"][i] * denoised)
        if solver["stochastic"]:
            noises.append(_noise(int(extra_args.get("seed") or 0), i, states[0]))
        if callback is not None:
            callback({"x": call_x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        states.append(_combine(solver, i, (states, outputs, noises)))
    return _keep(model, states[-1].to(x.dtype), sigmas, extra_args)


def _calls(solver):
    """Branches of the condition that are called at each row."""
    calls = solver.get("calls", [[row, CONDITIONAL] for row in range(len(solver["timesteps"]))])
    return [[branch for at, branch in calls if at == row] for row in range(len(solver["timesteps"]))]


def _has_branches(solver):
    return any(branch != CONDITIONAL for branches in _calls(solver) for branch in branches)


def _check_model(sampling, solver):
    """Refuse a model of another kind, or one that would tell its network other timesteps than the solver does."""
    latent, half = torch.ones(1), torch.full((1,), 0.5)
    is_flow = float(sampling.noise_scaling(half, torch.zeros(1), latent)) < 0.75
    if is_flow != (solver["kind"] == "flow"):
        raise ValueError(
            f"this solver was made for {KINDS[not is_flow]}, the model is {KINDS[is_flow]}: use one made for this model"
        )
    told, made_for = sampling.timestep(torch.tensor(solver["call_sigma"])).tolist(), solver["timesteps"]
    if not is_flow and any(abs(one - other) > 1 for one, other in zip(told, made_for)):
        raise ValueError(
            f"the model has another noise schedule, its timesteps would be {[round(t) for t in told]} instead of "
            f"{[round(t) for t in made_for]}: use a solver made for it, and no patch of its sampling"
        )


def _noise_scale(sampling, sigma):
    """What ComfyUI has multiplied unit noise by."""
    sigma, largest = sigma.detach().cpu().reshape(1), float(sampling.sigma_max)
    full = float(sigma) > largest or math.isclose(float(sigma), largest, rel_tol=1e-5)
    return float(sampling.noise_scaling(sigma, torch.ones(1), torch.zeros(1), full))


def _tell(guider, branch, branches, solver):
    """Name the branch of the next call to a guider that tells them apart."""
    if not _has_branches(solver):
        return
    if not hasattr(guider, "choose"):
        raise ValueError("this solver makes its own unconditional calls: connect the GUIDER of the same node")
    guider.choose(branch, branches)


def _keep(model, image, sigmas, extra_args):
    """The kept area of an inpaint mask as it was; the last step of other samplers ends there by itself."""
    mask = extra_args.get("denoise_mask")
    if mask is None:
        return image
    options = extra_args.get("model_options", {})
    if "denoise_mask_function" in options:
        where = {"model": model.inner_model, "sigmas": sigmas}
        mask = options["denoise_mask_function"](sigmas[-2:-1].expand(len(image)), mask, extra_options=where)
    return image * mask + model.latent_image.to(image) * (1 - mask)


def _combine(solver, row, history):
    total = torch.zeros_like(history[0][0])
    for name, values in zip(("state_coef", "output_coef", "noise_coef"), history):
        for weight, value in zip(solver[name][row], values):
            if solver.get("space") is None:
                total = torch.add(total, value, alpha=weight) if weight else total
            elif np.any(weight):
                total = total + _mixed(weight, value, solver["space"])
    return total


def _mixed(weight, value, space):
    """Channel matrices on the spatial frequencies of each band."""
    if value.ndim < 4 or value.shape[1] != space["channels"]:
        raise ValueError(f"this solver is for latents of {space['channels']} channels, found {tuple(value.shape)}")
    matrices = torch.tensor(weight, dtype=value.dtype, device=value.device)
    if not space["edges"]:
        return torch.einsum("ab,nb...->na...", matrices[0], value)
    vertical, horizontal = (torch.fft.fftfreq(size, device=value.device) for size in value.shape[-2:])
    radius = torch.sqrt(vertical[:, None].double() ** 2 + horizontal.double() ** 2)
    band = torch.bucketize(radius, torch.tensor(space["edges"], device=value.device).double(), right=True)
    spectrum = torch.fft.fft2(value)
    mixed = torch.einsum("hwab,nb...hw->na...hw", matrices[band].to(spectrum.dtype), spectrum)
    return torch.fft.ifft2(mixed).real


def _noise(seed, row, like):
    """Sample k's noise from the seed + k and the row alone, whatever the batch."""
    draws = []
    for k in range(len(like)):
        generator = np.random.Generator(np.random.Philox(key=[(seed + k) % SEED_LIMIT, row]))
        draws.append(torch.as_tensor(generator.standard_normal(like.shape[1:], np.float32)))
    return torch.stack(draws).to(like)


@cache
def _guider_class():
    samplers = import_module("comfy.samplers")

    class BranchGuider(samplers.CFGGuider):
        """Gives the denoised image of one branch of the condition; those of a row go through the network at once."""

        def choose(self, branch, branches):
            if branch == branches[0]:
                self.found = None
            self.branch, self.branches = branch, branches

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            model_options = model_options or {}
            if patch := [name for name in PATCHES if model_options.get(name)]:
                raise ValueError(f"this solver has its guidance inside: take the patch of it away ({patch[0]})")
            if self.found is None:
                names = {CONDITIONAL: "positive", UNCONDITIONAL: "negative"}
                conditions = [self.conds.get(names[branch]) for branch in self.branches]
                self.found = samplers.calc_cond_batch(self.inner_model, conditions, x, timestep, model_options)
            return self.found[self.branches.index(self.branch)]

    return BranchGuider


def _sampler_and_sigmas(name):
    solver = SOLVERS[name]
    sampler = import_module("comfy.samplers").KSAMPLER(partial(sample_table, solver=solver))
    return sampler, torch.tensor(solver["sigmas"], dtype=torch.float32)


class LearnedSolver:
    """The node: choose a solver, get its sampler and its sigmas."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "build"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"solver": ([name for name in SOLVERS if not _has_branches(SOLVERS[name])],)}}

    def build(self, solver):
        return _sampler_and_sigmas(solver)


class LearnedGuidedSolver:
    """The node of solvers that have guidance inside: a guider comes with the sampler and its sigmas."""

    RETURN_TYPES = ("GUIDER", "SAMPLER", "SIGMAS")
    FUNCTION = "build"
    CATEGORY = "sampling/custom_sampling/guiders"

    @classmethod
    def INPUT_TYPES(cls):
        conditions = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        solvers = [name for name in SOLVERS if _has_branches(SOLVERS[name])]
        return {"required": {"solver": (solvers,), "model": ("MODEL",), **conditions}}

    def build(self, solver, model, positive, negative):
        guider = _guider_class()(model)
        guider.set_conds(positive, negative)
        return guider, *_sampler_and_sigmas(solver)


_NODES = {
    "LearnedSolver": (LearnedSolver, "Learned solver"),
    "LearnedGuidedSolver": (LearnedGuidedSolver, "Learned solver with guidance"),
}
_USED = {name for name, (node, _) in _NODES.items() if node.INPUT_TYPES()["required"]["solver"][0]}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES.items() if name in _USED}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in _NODES.items() if name in _USED}
