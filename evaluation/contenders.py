"""What is compared: a solver table on a network, and what a user's list of solvers stands for."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from denoisers import load_denoiser
from evaluation.args import CompareArgs
from solvers import NoiseSchedule, SolverTable
from solvers.artifact import TENSORS, load_solver, student_path
from solvers.conditions import condition_tensors
from solvers.identity import guidance_fits, own_guidance, own_hash
from solvers.named import default_solver, resolve_solver


@dataclass(frozen=True, eq=False)
class Contender:
    """A solver on a network.

    Args:
        name: what reports call it.
        table: the solver.
        denoiser: the network, a student's own where it has one; it carries `schedule` and `sample_shape`.
        guidance_scale: the scale its images stand for: the network's own, or what a student was distilled from.
        sampler: runs the table instead of `sample`; takes (denoiser, table, noise, condition, seeds=, keep_states=) and
            returns images and an object with `sample_rounds`, `evaluations` and `states`, as `parallel_sample` does.
        sampler_name: its name.
    """

    name: str
    table: SolverTable
    denoiser: Any
    guidance_scale: float = 1.0
    sampler: Callable | None = None
    sampler_name: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of everything its images depend on but the seeds; of the precision, only what the network reports."""
        digest = hashlib.sha256(self.table.prediction_type.encode())
        for name in TENSORS:
            digest.update(getattr(self.table, name).detach().contiguous().numpy().tobytes())
        if not self.table.is_plain:
            digest.update(f"{self.table.calls} {self.table.space}".encode())
        own_scale = own_guidance(self.denoiser)
        digest.update(f"{self.table.start_scale!r} {own_scale!r} {network_hash(self.denoiser)}".encode())
        digest.update(f"{inputs_hash(self.denoiser)} {self.sampler_name} {_described(self.sampler)}".encode())
        return digest.hexdigest()[:16]

    @property
    def end_noise_level(self) -> float:
        """sigma / alpha of the last node: noise that the solver leaves in its images."""
        return float(self.table.sigma[-1].detach() / self.table.alpha[-1].detach())


@dataclass(frozen=True, eq=False)
class Group:
    """Contenders of one guidance scale and the reference solver their errors are measured against."""

    reference: Contender
    contenders: tuple[Contender, ...]


def network_hash(denoiser: Any) -> str:
    """The network's weight hash; of one without, its weights are hashed.

    Raises:
        ValueError: a plain function without a `weight_hash`, which nothing tells from another.
    """
    known = own_hash(denoiser)
    if known is not None:
        return known
    raise ValueError(
        f"{_described(denoiser)} has neither weights nor a weight_hash, so its images cannot be told from those of "
        "another function: give it an attribute weight_hash, any text that changes when it does"
    )


def inputs_hash(denoiser: Any) -> str:
    """Hash of what a denoiser is given beside noise, and of its settings: shape, conditions, thresholding, prompts."""
    known = [getattr(denoiser, name, None) for name in ("num_classes", "thresholding", "settings")]
    digest = hashlib.sha256(repr([tuple(denoiser.sample_shape), *known]).encode())
    for value in condition_tensors(getattr(denoiser, "conditions", None)):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _described(function: Any) -> str:
    """A function's name, with the arguments that `functools.partial` gives it."""
    if isinstance(function, partial):
        given = sorted(function.keywords.items())
        return f"{_described(function.func)} {function.args!r} {given!r}"
    return getattr(function, "__qualname__", type(function).__name__)


def load_groups(
    args: CompareArgs, device: torch.device | None = None, samplers: Mapping[str, Callable] | None = None
) -> list[Group]:
    """Load what a command line names, a group per guidance scale.

    An artifact appears at the scales it was made for, a `name:steps` at all of them. `SOLVER+NAME` is the solver run
    by the sampler of that name.

    Args:
        args: what it names.
        device: of the networks.
        samplers: other samplers than the sequential one, by name; see `Contender`.
    Raises:
        ValueError: an unknown solver, one that fits none of the scales or not the network, or artifacts of different
            scales when none was given.
    """
    samplers = samplers or {}
    made_for = {
        solver: _made_for(path) for solver in args.solvers if (path := _split(solver, samplers)[0]).endswith(".json")
    }
    scales = args.scales or _common_scale(made_for)
    for solver, allowed in made_for.items():
        if not any(guidance_fits(allowed, scale) for scale in scales):
            raise ValueError(
                f"{solver} was made for guidance scale {allowed}, not for {scales}: add it, or leave it out"
            )
    return [_load_group(args, scale, made_for, device, samplers) for scale in scales]


def _load_group(
    args: CompareArgs,
    scale: float,
    made_for: Mapping[str, Any],
    device: torch.device | None,
    samplers: Mapping[str, Callable],
) -> Group:
    model = load_denoiser(args.denoiser, scale, args.precision, device, trust_remote_code=args.trust)

    def load(name: str, samplers: Mapping[str, Callable]) -> Contender:
        return _load(name, model, scale, args.precision, device, samplers)

    chosen = [name for name in args.solvers if name not in made_for or guidance_fits(made_for[name], scale)]
    fitted = [_split(name, samplers)[0] for name in chosen if name in made_for]
    reference = load(args.reference or _teacher(fitted, model.schedule), {})
    return Group(reference, tuple(load(name, samplers) for name in chosen))


def _teacher(paths: Iterable[str], schedule: NoiseSchedule) -> str:
    """The solver that all artifacts were fitted to, where it has a name here; else the default."""
    names = {load_solver(path).info["fitted_on"].get("teacher") for path in paths}
    name = names.pop() if len(names) == 1 else None
    try:
        resolve_solver(str(name), schedule)
    except ValueError:
        return default_solver(schedule)
    return str(name)


def check_seeds(groups: Sequence[Group], seeds: range) -> None:
    """Refuse evaluation on seeds that an artifact was fitted or selected on.

    Raises:
        ValueError: names the artifact and the overlap.
    """
    for group in groups:
        for contender in (group.reference, *group.contenders):
            check_disjoint(seeds, fitted_seeds(contender.table), contender.name)


def fitted_seeds(table: SolverTable) -> list[Sequence[int]]:
    """Half-open ranges of the seeds a table was fitted or selected on, as its artifact states them."""
    sources = [table.info.get(source) or {} for source in ("fitted_on", "validation")]
    return [seeds for source in sources for seeds in source.get("seeds", [])]


def check_disjoint(seeds: range, fitted: Sequence[Sequence[int]], name: str = "the solver") -> None:
    """Refuse evaluation `seeds` that overlap half-open ranges a solver was fitted on.

    Raises:
        ValueError: names the overlap.
    """
    for start, stop in fitted:
        if start < seeds.stop and seeds.start < stop:
            raise ValueError(
                f"{name} was fitted on the seeds {start} to {stop - 1}, which overlap the evaluation seeds "
                f"{seeds.start} to {seeds.stop - 1}: evaluate on others"
            )


def _load(
    name: str, model: Any, scale: float, precision: str, device: torch.device | None, samplers: Mapping[str, Callable]
) -> Contender:
    solver, chosen = _split(name, samplers)
    sampler = {"sampler": samplers[chosen], "sampler_name": chosen} if chosen else {}
    if not solver.endswith(".json"):
        return Contender(name, resolve_solver(solver, model.schedule), model, scale, **sampler)
    weights = student_path(load_solver(solver))
    if weights is not None:
        model = load_denoiser(weights.parent, precision=precision, device=device)
    return Contender(name, load_solver(solver, model), model, scale, **sampler)


def _split(name: str, samplers: Mapping[str, Callable]) -> tuple[str, str]:
    """(solver, sampler) of SOLVER+SAMPLER; the sampler is empty where none is named."""
    solver, plus, sampler = name.rpartition("+")
    return (solver, sampler) if plus and sampler in samplers else (name, "")


def _made_for(path: str) -> Any:
    """The guidance scale or range an artifact stands for; a student states what its teacher had in `fitted_on`."""
    table = load_solver(path)
    own = table.info["guidance_scale"]
    return table.info["fitted_on"].get("guidance_scale", own) if table.info["student"] else own


def _common_scale(made_for: dict[str, Any]) -> list[float]:
    scales = {float(value) for value in made_for.values() if not isinstance(value, list)}
    if len(scales) > 1:
        raise ValueError(f"the artifacts were made for guidance scales {sorted(scales)}: choose with --guidance_scale")
    if scales:
        return list(scales)
    ranges = [value for value in made_for.values() if isinstance(value, list)]
    return [ranges[0][0]] if ranges else [1.0]


def display_names(names: Sequence[str]) -> dict[str, str]:
    """Short names for reports: of a path as many of its last parts as set it apart from the others."""
    paths = {name: Path(name.replace(".json", "")) for name in names if ".json" in name}
    found = {name: name for name in names}
    for name, path in paths.items():
        others = [other.parts for other in paths.values() if other != path]
        lengths = range(1, len(path.parts) + 1)
        apart = (n for n in lengths if all(part[-n:] != path.parts[-n:] for part in others))
        length = next(apart, len(path.parts))
        found[name] = "/".join(path.parts[-length:])
    return found
