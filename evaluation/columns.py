"""The columns of a comparison's table, as every report shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "solver": "solver",
    "nfe": "calls",
    "rows": "rows",
    "guidance": "guidance",
    "fd": "FD",
    "kid": "KID x 1000",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "inception_score": "IS",
    "clip_score": "CLIP",
    "lpips": "LPIPS",
    "rmse": "RMSE",
    "median": "median",
    "p99": "99 %",
    "worst": "worst",
    "psnr": "PSNR (dB)",
    "end_noise_level": "end noise",
    "rounds": "rounds",
    "evaluations": "evaluations",
    "seconds": "s / image",
    "fitting_seconds": "fitting s",
}
HINTS = {
    "nfe": "network calls per image: a guided row makes two",
    "rows": "states that the network sees",
    "fd": "Frechet distance to the data; lower is better; 95 % interval",
    "kid": "kernel distance to the data, times 1000; lower is better; 95 % interval",
    "precision": "share of samples inside the data's manifold",
    "recall": "share of the data inside the samples' manifold",
    "density": "mean number of the data's neighbourhoods around a sample, over their size",
    "coverage": "share of the data's neighbourhoods that hold a sample",
    "inception_score": "exp of the mean divergence of class probabilities",
    "clip_score": "100 times the cosine of image and prompt",
    "lpips": "perceptual distance to the reference solver's image",
    "rmse": "to the reference solver from the same noise; 95 % interval",
    "median": "error of the median image to the reference solver's",
    "p99": "error that 99 % of the images do not exceed",
    "worst": "error of the worst image",
    "psnr": "to the reference solver, range 2",
    "end_noise_level": "sigma / alpha left in the image",
    "rounds": "batches of network calls one after the other, per image",
    "evaluations": "network calls per image, side by side ones included",
    "seconds": "sampling time per image",
    "fitting_seconds": "time the solver's fit took, once",
}


def shown_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that hold a value in some row; guidance only where it differs, rounds only of parallel samplers.

    Rows of the table only where some are not one network call.
    """
    used = [name for base in COLUMNS for name in _named(rows, base)]
    constant = len({row["guidance"] for row in rows}) == 1
    silent = {"end_noise_level"} if all(row["end_noise_level"] < 1e-4 for row in rows) else set()
    made = [row.get("rows", row["nfe"]) for row in rows]
    if all(row.get("rounds", count) == count for row, count in zip(rows, made)):
        silent |= {"rounds", "evaluations"}
    if all(row["nfe"] == count for row, count in zip(rows, made)):
        silent |= {"rows"}
    return [name for name in used if name not in silent and not (name == "guidance" and constant)]


def _named(rows: Sequence[Mapping[str, Any]], base: str) -> list[str]:
    """A column's name, and with the suffixes of further feature spaces, where some row has a value."""
    found = [name for row in rows for name, value in row.items() if value is not None and _base(name) == base]
    return list(dict.fromkeys(name for name in found if not name.endswith(("_low", "_high"))))


def _base(name: str) -> str:
    return name.partition("@")[0]


def title(name: str) -> str:
    """A column's title."""
    base, _, space = name.partition("@")
    return f"{COLUMNS[base]} ({space})" if space else COLUMNS[base]


def hint(name: str) -> str:
    """What a column is."""
    return HINTS.get(_base(name), "")


def cell(row: Mapping[str, Any], name: str) -> str:
    """A value as text, without its interval; empty where there is none."""
    value = row.get(name)
    if value is None:
        return ""
    if name == "end_noise_level" and 0 < value < 1e-4:
        return "< 0.0001"
    base = _base(name)
    if base == "kid":
        value = 1000 * value
    if base in ("kid", "precision", "recall", "density", "coverage", "inception_score", "clip_score", "psnr"):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if name in ("end_noise_level", "seconds", "fitting_seconds"):
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return str(value) if isinstance(value, str | int) else f"{value:.4g}"


def interval(row: Mapping[str, Any], name: str) -> str:
    """The 95 % interval of a value as text, or empty."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    trivial = row.get("is_reference") and name == "rmse"
    scale = 1000 if _base(name) == "kid" else 1
    return "" if low is None or trivial else f"{scale * low:.3g} to {scale * high:.3g}"


def summary(settings: Mapping[str, Any]) -> list[str]:
    """What was compared and how, one sentence each."""
    last = settings["seed"] + settings["num_samples"] - 1
    lines = [
        f"{settings['num_samples']} images per solver, seeds {settings['seed']} to {last}, "
        f"network in {settings['precision']}."
    ]
    for space in settings["spaces"]:
        data = space["statistics"]
        if data is not None:
            described = data["description"] or data["fingerprint"]
            images = f"{data['images']} images: " if data["images"] else ""
            lines.append(f"Distances are measured in the features of {space['extractor']} to {images}{described}.")
    if settings["spaces"]:
        lines.append("They depend on the number of images: compare only figures of the same number.")
    return lines


def label(row: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A solver's short name, the reference marked."""
    return names[row["solver"]] + (" (reference)" if row["is_reference"] else "")
