"""Who a denoiser is, as far as solvers and trajectories depend on it: read, stated and compared in one place."""

import copy
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solvers import strict_json
from solvers.errors import SolverError
from solvers.schedule import NoiseSchedule

Guidance = float | Sequence[float]
CHECKS = ("prediction type", "noise schedule", "guidance scale", "thresholding", "weights")


@dataclass(frozen=True)
class DenoiserIdentity:
    """What a table's coefficients depend on beside the table.

    Args:
        schedule: the noise schedule, with the prediction type of the network.
        guidance_scale: of the outputs that a table combines, or the [lowest, highest] it may be used at; kept as a
            float or a tuple of two.
        thresholding: settings of what else acts on the outputs, the denoiser's clipping or thresholding or arguments of
            a pipeline's guidance beside its scale; JSON types; None for none.
        name: what the network is called; not compared.
        weight_hash: of the network; None where it is not known, which fits any.
    Raises:
        SolverError: a guidance scale that is neither, or thresholding that JSON cannot keep.
    """

    schedule: NoiseSchedule
    guidance_scale: Guidance = 1.0
    thresholding: Mapping[str, Any] | None = None
    name: str | None = None
    weight_hash: str | None = None

    def __post_init__(self) -> None:
        low, high = guidance_range(self.guidance_scale)
        is_range = isinstance(self.guidance_scale, Sequence)
        object.__setattr__(self, "guidance_scale", (low, high) if is_range else low)
        object.__setattr__(self, "thresholding", strict_json.loads(strict_json.dumps(self.thresholding)))

    def differences(self, found: "DenoiserIdentity", allowed: Sequence[str] = ()) -> list[str]:
        """Why what was made for this denoiser does not fit another one: a line for each field, none where it fits.

        Args:
            found: the other one.
            allowed: CHECKS that are not made.
        """
        pairs = {field: (value, found._compared[field]) for field, value in self._compared.items()}
        pairs = {field: pair for field, pair in pairs.items() if field not in allowed}
        return [
            f"made for {field} {_short(made, other)}, found {_short(other, made)}"
            for field, (made, other) in pairs.items()
            if made != other and not (field in _FITS and _FITS[field](made, other))
        ]

    @property
    def _compared(self) -> dict[str, Any]:
        schedule = self.schedule
        described = {"kind": schedule.kind, **schedule.parameters}
        values = (schedule.prediction_type, described, self.guidance_scale, self.thresholding, self.weight_hash)
        return dict(zip(CHECKS, values, strict=True))


def identify(denoiser: Any, **stated: Any) -> DenoiserIdentity:
    """The identity of a denoiser.

    Args:
        denoiser: has `.schedule`, and perhaps `.guidance_scale`, `.thresholding`, `.name` and `.weight_hash`; of a
            module without a hash the weights are hashed.
        stated: fields of DenoiserIdentity that are known otherwise; the denoiser is not asked for them.
    Raises:
        SolverError: a denoiser without `schedule`.
    """
    asked = {
        "schedule": _schedule,
        "guidance_scale": own_guidance,
        "thresholding": lambda one: getattr(one, "thresholding", None),
        "name": lambda one: getattr(one, "name", None),
        "weight_hash": own_hash,
    }
    return DenoiserIdentity(**stated, **{name: ask(denoiser) for name, ask in asked.items() if name not in stated})


def lifted_checks(allow_mismatch: str | Sequence[str], known: Sequence[str] = CHECKS) -> list[str]:
    """The checks that `allow_mismatch` names, one or several.

    Raises:
        SolverError: no name of a known check.
    """
    names: list[Any] = list(allow_mismatch) if isinstance(allow_mismatch, list | tuple) else [allow_mismatch]
    if unknown := [name for name in names if name not in known]:
        raise SolverError(f"allow_mismatch is {unknown[0]!r}: name the check that it lifts, one of {', '.join(known)}")
    return names


def own_guidance(denoiser: Any) -> Guidance:
    """The guidance scale inside a denoiser's outputs, or the range of them; 1 for none."""
    return getattr(denoiser, "guidance_scale", 1.0)


def own_hash(denoiser: Any) -> str | None:
    """The denoiser's `weight_hash`, else the hash of a module's weights, else None."""
    known = getattr(denoiser, "weight_hash", None)
    return weight_hash(denoiser) if known is None and isinstance(denoiser, nn.Module) else known


def guidance_range(guidance_scale: Guidance) -> tuple[float, float]:
    """(lowest, highest) of one scale or of a range.

    Raises:
        SolverError: neither a finite number nor two of them in order.
    """
    ends = tuple(guidance_scale) if isinstance(guidance_scale, Sequence) else (guidance_scale, guidance_scale)
    if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
        raise SolverError(f"guidance_scale is {guidance_scale}: give one number or [lowest, highest], all finite")
    return float(ends[0]), float(ends[1])


def guidance_fits(one: Guidance, other: Guidance) -> bool:
    """Whether two guidance scales are the same, or one lies inside the range that the other is."""
    (low, high), (least, most) = guidance_range(one), guidance_range(other)
    slack = 1e-9 * max(1.0, abs(least), abs(most))
    return (low - slack <= least and most <= high + slack) or (least - slack <= low and high <= most + slack)


def weight_hash(module: nn.Module) -> str:
    """SHA-256 of all weights in float32 with their names and shapes, independent of the file that held them.

    They are those the module computes with: a compiled one has the hash of what was compiled, and one with adapters,
    such as LoRA, that of the weights with the active ones fused into them; the strength of image prompts counts.
    """
    return hash_weights(_plain_weights(module))


def hash_modules(modules: Mapping[str, nn.Module]) -> str:
    """The `weight_hash` of one module, whatever its name; of several, SHA-256 of their names and hashes."""
    hashes = {name: weight_hash(module) for name, module in sorted(modules.items())}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in hashes.items()).encode()).hexdigest()


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, each in float32, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _plain_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights by the names they have without torch.compile and adapters (layers of PEFT), fused."""
    weights = module.state_dict()
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "merged_adapters"):
            weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
            weights |= {f"{name}.{key}": value for key, value in _fused(layer).state_dict().items()}
        if hasattr(layer, "to_k_ip"):  # the attention of an image prompt
            weights[f"{name}.scale"] = torch.tensor(layer.scale, dtype=torch.float64).flatten()
    return {name.replace("_orig_mod.", ""): value for name, value in weights.items()}


def _fused(layer: Any) -> nn.Module:
    """A layer's base with its active adapters, added as fusing adds them; the layer stays as it is."""
    if layer.disable_adapters or set(layer.active_adapters) <= set(layer.merged_adapters):
        return layer.base_layer
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer.base_layer


def _schedule(denoiser: Any) -> NoiseSchedule:
    schedule = getattr(denoiser, "schedule", None)
    if schedule is None:
        raise SolverError("the denoiser has no `schedule`, so nothing can be checked against it: give it one")
    return schedule


def _short(value: Any, other: Any) -> str:
    """A value as text beside another: of a hash its beginning, of two dicts what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: part for name, part in value.items() if part != other.get(name, _ABSENT)}
    text = str(value)
    if len(text) > 200:
        return f"one with SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


_ABSENT = object()
_FITS = {"guidance scale": guidance_fits, "weights": lambda made, found: made is None or found is None}
