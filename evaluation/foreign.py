"""Moments of features as other programs keep them: mean `mu` and covariance `sigma`.

ADM, EDM and clean-fid write npz files, torch-fidelity `.pt` files. ADM's hold `mu_s` and `sigma_s` of its spatial
features, too, and some of the pictures as `arr_0`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.distances import Gaussian
from solvers.errors import one_line
from solvers.files import atomic_write

SPATIAL = "inception-spatial"
NUMPY = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]
PICKLED = (".pkl", ".pickle")


def is_foreign(path: str | Path, extractor: str) -> bool:
    """Whether a file holds moments for an extractor of this name.

    Raises:
        ValueError: a pickle, which is never opened.
    """
    path = Path(path)
    if path.suffix in PICKLED:
        raise ValueError(
            f"{path} is a pickle, which may run code: store its mean as mu and covariance as sigma in .npz"
        )
    if path.suffix == ".npz" and path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            # ADM's moments are Inception's: for other extractors the pictures beside them count.
            fits = "arr_0" not in arrays.files or extractor.startswith("inception")
            return fits and _names(extractor)[0] in arrays.files
    return path.suffix in (".pt", ".pth") and path.is_file()


def read_moments(path: str | Path, extractor: str, num_features: int) -> Gaussian:
    """Mean and covariance for an extractor of this name.

    Raises:
        ValueError: damaged, or of another number of features.
    """
    path, (mean, covariance) = Path(path), _names(extractor)
    try:
        found = {name: np.asarray(_read(path)[name], np.float64) for name in (mean, covariance)}
    except Exception as error:  # of zip, numpy and torch
        raise ValueError(one_line(f"{path} cannot be read as {mean} and {covariance} of features: {error}")) from error
    if found[mean].shape != (num_features,) or found[covariance].shape != (num_features, num_features):
        raise ValueError(
            f"{path} holds moments {found[mean].shape} and {found[covariance].shape}, but {extractor} has "
            f"{num_features} features: name the extractor that they were made with (--extractor)"
        )
    return Gaussian(torch.from_numpy(found[mean]), torch.from_numpy(found[covariance]), None)


def write_moments(path: str | Path, gaussian: Gaussian, extractor: str) -> None:
    """An npz file of mean and covariance, beside those that it holds already."""
    path = Path(path)
    kept = dict(np.load(path, allow_pickle=False)) if path.is_file() else {}
    kept |= dict(zip(_names(extractor), (gaussian.mean.numpy(), gaussian.covariance.numpy())))
    with atomic_write(path) as temporary:
        np.savez(temporary, **kept)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        return np.load(path, allow_pickle=False)
    with torch.serialization.safe_globals(NUMPY):
        return torch.load(path, map_location="cpu", weights_only=True)


def _names(extractor: str) -> tuple[str, str]:
    return ("mu_s", "sigma_s") if extractor == SPATIAL else ("mu", "sigma")
