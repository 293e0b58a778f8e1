"""Who a folder's encoders are, by their files: no encoder is brought to memory for that."""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from solvers.identity import hash_weights

PARTS = ("vae", "text_encoder*")


def encoder_hashes(root: str, variant: str | None = None) -> dict[str, str]:
    """Hash of the weights of the autoencoder and each text encoder of a pipeline's folder, by its name there.

    Taken of float32 values tensor by tensor, so it does not depend on the dtype they are used in, nor on how many files
    there are, but on the variant of the files. What is not on this machine, or not as safetensors, is left out.
    """
    parts = (part for pattern in PARTS for part in sorted(_folder(root).glob(pattern)))
    files = {part.name: weight_files(part, variant) for part in parts}
    return {name: hash_weights(FileWeights(paths)) for name, paths in files.items() if paths}


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component, those of the variant where it has some."""
    named = [rf"\w+(-\d+-of-\d+)?\.{variant}(-\d+-of-\d+)?"] if variant else []
    for pattern in (*named, r"\w+(-\d+-of-\d+)?"):
        if found := [path for path in sorted(folder.glob("*.safetensors")) if re.fullmatch(pattern, path.stem)]:
            return found
    return []


class FileWeights(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def _places(self) -> dict[str, Path]:
        places = {}
        for path in self.paths:
            with safe_open(path, "pt") as file:
                places |= dict.fromkeys(file.keys(), path)
        return places


def _folder(root: str) -> Path:
    """A folder here, or what is here already of a repository on the hub."""
    if Path(root).is_dir():
        return Path(root)
    try:
        return Path(snapshot_download(root, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
        return Path(root)
