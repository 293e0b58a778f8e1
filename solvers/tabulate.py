"""Any linear diffusers scheduler as a solver table, read off by feeding it unit vectors."""

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from solvers.prediction import PREDICTION_TYPES, edm_prediction
from solvers.table import SolverTable
from solvers.views import propagate

_LOCK = threading.Lock()
_SCALES = (1e-3, 1.0, 1e3)
_Run = tuple[list[float], list[Tensor]]
_TOLERANCE = 1e-3  # linear schedulers differ by rounding, non-linear ones by more than half at the largest scale


def tabulate(
    scheduler: Any,
    num_inference_steps: int | None,
    *,
    set_timesteps: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
) -> SolverTable:
    """The table of a diffusers scheduler whose `step` is linear in sample, model output and noise.

    Row i calls `step` with the unit vector of state i divided by its `scale_model_input` factor, the unit vector of
    output i and that of noise i; what comes back, times the factor of node i+1 (1 for the last), are the coefficients
    of row i. Nodes follow from (alpha[0], sigma[0]) by `propagate`, never from the timesteps.

    Args:
        scheduler: a diffusers scheduler; it is copied, not changed.
        num_inference_steps: passed to `set_timesteps`; None leaves it out (with `sigmas` or `timesteps`). The rows are
            the real number of evaluations: 2n - 1 for Heun, n + 9 for PNDM, n + 1 for PNDM without its warm-up.
        set_timesteps: further arguments of `scheduler.set_timesteps`, such as `mu`, `sigmas`, `timesteps`.
        step: further arguments of `scheduler.step`, such as `eta`.
    Returns:
        The table, exact to 1e-15, or to 2e-7 where diffusers computes in float32.
    Raises:
        ValueError: a scheduler without the usual interface or a known prediction type, a non-linear setting
            (clipping, thresholding, learned variance), or more than one noise drawn in a step.
    """
    _check_step(scheduler)
    arguments = dict(set_timesteps or {})
    if num_inference_steps is not None:
        arguments["num_inference_steps"] = num_inference_steps
    prediction_type = _prediction_type(scheduler)
    _check_config(scheduler)

    def run(state: Callable, output: Callable, noise: Callable) -> _Run:
        return _run(_prepared(scheduler, arguments), dict(step or {}), state, output, noise)

    used = _prepared(scheduler, arguments)
    n = len(used.timesteps)
    unit = torch.eye(3 * n, dtype=torch.float64).reshape(3, n, 1, 1, 3 * n, 1)
    factors, samples = run(lambda i, _: unit[0, i], unit[1].__getitem__, unit[2].__getitem__)
    scales = torch.tensor([*factors[1:], 1.0], dtype=torch.float64)
    coefs = torch.stack([sample.reshape(3, n) for sample in samples], dim=1) * scales[:, None]
    if not bool(torch.isfinite(coefs).all()):
        raise ValueError(
            f"{type(scheduler).__name__} gives coefficients that are not finite with these settings: "
            "try final_sigmas_type='sigma_min' or a schedule without zero signal-to-noise ratio"
        )
    first = _first_node(used)
    table = SolverTable(
        timesteps=used.timesteps.detach().cpu().double(),
        alpha=first[0].repeat(n + 1),
        sigma=first[1].repeat(n + 1),
        state_coef=coefs[0],
        output_coef=coefs[1],
        noise_coef=coefs[2],
        start_scale=float(getattr(used, "init_noise_sigma", 1.0)) * factors[0],
        prediction_type=prediction_type,
    )
    _check_linear(table, run, scheduler)
    alpha, sigma = propagate(table)
    return replace(table, alpha=alpha, sigma=sigma)


def _prepared(scheduler: Any, arguments: dict[str, Any]) -> Any:
    """A copy of the scheduler with its timesteps set."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(**arguments)
    except (TypeError, KeyError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(
            f"{type(scheduler).__name__}.set_timesteps({given}) fails ({type(error).__name__}: {error}): pass what "
            "else it needs as set_timesteps={...}, or use a scheduler whose steps follow from their number"
        ) from error
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # steps are counted, because rounding may repeat the first timestep
    return scheduler


def _run(scheduler: Any, step: dict[str, Any], state: Callable, output: Callable, noise: Callable) -> _Run:
    """Drive `step` over all timesteps; state(i, previous) is the state the network would see at row i.

    Returns:
        The `scale_model_input` factors and the unscaled samples after each row.
    """
    factors, samples = [], []
    with _noise_replaced(scheduler) as source:
        for i, timestep in enumerate(scheduler.timesteps):
            factors.append(_scale_factor(scheduler, timestep))
            sample = state(i, samples[-1] * factors[-1] if samples else None) / factors[-1]
            source.next(noise(i))
            samples.append(_step(scheduler, output(i), timestep, sample, step | _previous(scheduler, i)))
    return factors, samples


def _step(scheduler: Any, output: Tensor, timestep: Tensor, sample: Tensor, arguments: dict[str, Any]) -> Tensor:
    try:
        return scheduler.step(output, timestep, sample, return_dict=False, **arguments)[0].double()
    except TypeError as error:
        raise ValueError(f"{type(scheduler).__name__}.step cannot be tabulated: {error}") from error


def _previous(scheduler: Any, row: int) -> dict[str, Any]:
    """The next row's timestep, for the one class whose `step` must be told (unCLIP)."""
    if type(scheduler).__name__ != "UnCLIPScheduler":
        return {}
    return {"prev_timestep": scheduler.timesteps[row + 1] if row + 1 < len(scheduler.timesteps) else None}


def _scale_factor(scheduler: Any, timestep: Tensor) -> float:
    """What `scale_model_input` multiplies a sample by at a timestep."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return float(scheduler.scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), timestep))


class _NoiseSource:
    """Hands out one given noise a step and refuses a second draw."""

    def __init__(self, name: str) -> None:
        self._name, self._owner, self._noise = name, threading.get_ident(), None

    def next(self, noise: Tensor) -> None:
        self._noise = noise

    def draw(self, original: Callable) -> Callable:
        def drawn(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
            if threading.get_ident() != self._owner:
                return original(*args, dtype=dtype, **kwargs)
            if self._noise is None:
                raise ValueError(f"{self._name} draws more than one noise in a step, which a table cannot hold")
            noise, self._noise = self._noise, None
            return noise.to(dtype or torch.float64)

        return drawn


@contextmanager
def _noise_replaced(scheduler: Any) -> Iterator[_NoiseSource]:
    """Replace `randn_tensor` in the modules of the scheduler's classes, one tabulation at a time."""
    source = _NoiseSource(type(scheduler).__name__)
    modules = {base.__module__: vars(sys.modules[base.__module__]) for base in type(scheduler).__mro__}
    with _LOCK:
        originals = {name: names["randn_tensor"] for name, names in modules.items() if "randn_tensor" in names}
        try:
            for name, original in originals.items():
                modules[name]["randn_tensor"] = source.draw(original)
            yield source
        finally:
            for name, original in originals.items():
                modules[name]["randn_tensor"] = original


def _check_linear(table: SolverTable, run: Callable[..., _Run], scheduler: Any) -> None:
    """Compare table and `step` on random inputs of small, medium and large scale.

    Raises:
        ValueError: they differ, so `step` is not linear.
    """
    n, scale = table.nfe, torch.tensor(_SCALES, dtype=torch.float64).reshape(-1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    start, outputs, noises = (
        scale * torch.randn(count, len(_SCALES), 1, 4, 4, generator=generator, dtype=torch.float64)
        for count in (1, n, n)
    )
    factors, samples = run(lambda i, last: start[0] if last is None else last, outputs.__getitem__, noises.__getitem__)
    states = torch.zeros(n + 1, *start.shape[1:], dtype=torch.float64)
    states[0] = start[0]
    for i, sample in enumerate(samples):
        for coef, values in zip((table.state_coef, table.output_coef, table.noise_coef), (states[:n], outputs, noises)):
            states[i + 1] += torch.tensordot(coef[i], values, 1)
        actual = sample * (factors[i + 1] if i + 1 < n else 1.0)
        error = (states[i + 1] - actual).flatten(1).norm(dim=1) / states[: i + 2].flatten(2).norm(dim=2).amax(0)
        if not bool((error < _TOLERANCE).all()):
            name, config = type(scheduler).__name__, scheduler.config
            off = ", ".join(f"{clip}=False" for clip in ("clip_sample", "thresholding") if config.get(clip))
            raise ValueError(
                f"{name} is not linear with these settings (row {i} is off by {float(error.max()):.1g}): "
                + (f"use {name}.from_config(scheduler.config, {off})" if off else "use a scheduler of another class")
            )


def _check_step(scheduler: Any) -> None:
    """Refuse a scheduler that a pipeline must tell more than output, timestep and sample."""
    parameters = inspect.signature(getattr(scheduler, "step", None) or (lambda: None)).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if more := set(needed) - {"model_output", "timestep", "sample"}:
        name = type(scheduler).__name__
        other = "CogVideoXDDIMScheduler" if name.startswith("CogVideoX") else "DDIMScheduler"
        raise ValueError(
            f"the pipeline has to tell {name} its {' and '.join(sorted(more))} at each step, which no table knows: "
            "give the pipeline another scheduler of the same schedule first, such as "
            f"pipe.scheduler = {other}.from_config(pipe.scheduler.config)"
        )


def _prediction_type(scheduler: Any) -> str:
    name = type(scheduler).__name__
    if not all(hasattr(scheduler, attribute) for attribute in ("set_timesteps", "step", "config")):
        raise ValueError(f"{name} is no diffusers scheduler: it needs config, set_timesteps and step")
    found = "flow_prediction" if _is_flow(scheduler) else scheduler.config.get("prediction_type")
    if not isinstance(found, str) or found not in PREDICTION_TYPES:
        hint = "solvers.ipndm builds iPNDM" if name == "IPNDMScheduler" else "use a scheduler that says one of these"
        raise ValueError(
            f"{name} has prediction type {found!r}, and a table needs one of {', '.join(PREDICTION_TYPES)} "
            f"(consistency, flow-map and discrete models have none): {hint}"
        )
    if hasattr(scheduler, "precondition_outputs"):  # EDM: its two types are one output with two signs
        return edm_prediction(scheduler.config.sigma_data * (-1 if found == "v_prediction" else 1))
    return found


def _check_config(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if "Inverse" in name:
        raise ValueError(f"{name} runs from image to noise: a table starts at noise")
    if str(config.get("variance_type") or "").startswith("learned"):
        raise ValueError(
            f"{name} has variance_type {config['variance_type']!r}, which is not linear: use "
            f"{name}.from_config(scheduler.config, variance_type='fixed_small')"
        )
    if config.get("invert_sigmas"):
        raise ValueError(
            f"{name} has invert_sigmas, so that time 0 is noise: make the network a denoiser of your own that is told "
            "1 - time (docs/your_own_model.md)"
        )


def _is_flow(scheduler: Any) -> bool:
    """Whether the class implies flow prediction without naming it in its config."""
    return type(scheduler).__name__.startswith(("FlowMatch", "LTXEulerAncestralRF"))


def _first_node(scheduler: Any) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of state 0, from the scheduler's own sigmas or cumulative alphas."""
    if hasattr(scheduler, "sigmas"):
        sigma = torch.as_tensor(scheduler.sigmas).double().flatten()[0]
        if _is_flow(scheduler) or scheduler.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        alpha = torch.rsqrt(scheduler.config.get("sigma_data", 1.0) ** 2 + sigma**2)
        return alpha, sigma * alpha
    power = scheduler.alphas_cumprod[int(scheduler.timesteps[0])].double()
    return power.sqrt(), (1 - power).sqrt()
