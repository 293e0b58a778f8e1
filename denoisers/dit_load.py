"""DiT and SiT networks from checkpoint folders of this project, and from files of the official training code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from denoisers.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_weights, read_config
from denoisers.dit import DiT, position_embedding
from denoisers.weight_file import WeightFile, read_safetensors, read_weight_file
from solvers.files import sha256
from solvers.schedule import NoiseSchedule

FAMILIES: dict[str, dict[str, Any]] = {
    "dit": {"schedule": NoiseSchedule.linear()},
    "sit": {"schedule": NoiseSchedule.flow(), "convention": "sit"},
}
_LINEAR_VELOCITY = {"path_type": "Linear", "prediction": "velocity"}


def load_checkpoint(folder: str | Path) -> DiT:
    """Load a checkpoint folder in float32 and evaluation mode, without gradients; `.name` is the folder's name.

    Raises:
        ValueError: files missing or damaged, an unknown version, or weights that do not fit the network.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}: copy the whole checkpoint folder")
    if sha256(path) != config["weights_sha256"]:
        raise ValueError(f"{path} differs from the hash in {CONFIG_NAME}: copy the checkpoint folder again")
    denoiser = DiT(NoiseSchedule.from_dict(config["schedule"]), **config["network"])
    return _finish(denoiser, read_safetensors(path), path, folder.name)


def load_public_checkpoint(
    path: str | Path, family: str | None = None, num_heads: int | None = None, input_size: int | None = None
) -> DiT:
    """Load a file of the public DiT or SiT releases, or a checkpoint of their training code.

    Args:
        path: see `denoisers.weight_file.read_weight_file`; sizes are read off the weights.
        family: `dit` or `sit`, whose weights have the same names; by default what the checkpoint's arguments say, or
            the file's name.
        num_heads: default: heads of 64, 72 for width 1152.
        input_size: height and width of the latents, of weights without position table, which is computed; by default
            an eighth of the image size in the checkpoint's arguments.
    Raises:
        ValueError: not a file of tensors, names that are not a DiT's, a family or size that nothing tells, or a SiT
            that was not trained on velocities of the linear path.
    """
    path = Path(path)
    file = read_weight_file(path)
    weights = file.weights
    if "x_embedder.proj.weight" not in weights:
        raise ValueError(f"{path} holds no DiT weights: x_embedder.proj.weight is missing")
    chosen = FAMILIES[_family(file.arguments, path) if family is None else _known(family)]
    if "convention" in chosen:
        _check_transport(file.arguments, path)
    weights = weights if "pos_embed" in weights else weights | {"pos_embed": _positions(file, input_size, path)}
    heads = {} if num_heads is None else {"num_heads": num_heads}
    return _finish(DiT(**chosen, **infer_network(weights) | heads), weights, path, path.stem)


def infer_network(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of DiT that a public checkpoint's shapes imply."""
    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    out_channels = weights["final_layer.linear.weight"].shape[0] // patch_size**2
    return {
        "input_size": round(weights["pos_embed"].shape[1] ** 0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "num_heads": hidden_size // (72 if hidden_size == 1152 else 64),
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "num_classes": weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r} of a weight file: use one of {', '.join(FAMILIES)}")
    return family


def _family(arguments: Mapping[str, Any], path: Path) -> str:
    """What a training was told counts more than the name of its file."""
    for text in (str(arguments.get("model", "")), path.stem):
        found = [name for name in FAMILIES if name in text.lower()]
        if len(found) == 1:
            return found[0]
    raise ValueError(f"{path.name} does not say whether it is a DiT or a SiT: pass family='dit' or family='sit'")


def _check_transport(arguments: Mapping[str, Any], path: Path) -> None:
    other = [f"{name} {arguments[name]}" for name, own in _LINEAR_VELOCITY.items() if arguments.get(name, own) != own]
    if other:
        raise ValueError(f"{path} was trained with {', '.join(other)}: only velocities of the linear path are known")


def _positions(file: WeightFile, input_size: int | None, path: Path) -> Tensor:
    """The position table, which some training codes leave out of their checkpoints."""
    hidden_size, _, patch_size, _ = file.weights["x_embedder.proj.weight"].shape
    size = input_size or int(file.arguments.get("image_size") or 0) // 8
    if not size or size % patch_size:
        raise ValueError(
            f"{path} has no position table, and its latents' size is not known: pass input_size, a multiple of the "
            f"patch size {patch_size} (32 for images of 256 pixels)"
        )
    return position_embedding(hidden_size, size // patch_size)


def _finish(denoiser: DiT, weights: Mapping[str, Tensor], source: Path, name: str) -> DiT:
    load_weights(denoiser, dict(weights), source)
    denoiser.name = name
    return denoiser.eval().requires_grad_(False)
