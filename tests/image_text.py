"""Image-text webdataset shards, made on the spot."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = ["a cat", "dog", "tree"]


def picture(number: int, size: tuple[int, int] = (20, 24), kind: str = "PNG") -> bytes:
    """A random picture of (height, width)."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def sample_files(number: int) -> dict[str, bytes]:
    """Picture, caption and metadata of a sample."""
    return {"png": picture(number), "txt": CAPTIONS[number % 3].encode(), "json": b"{}"}


def write_image_text(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A shard of files by key and extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def image_text_folder(folder: Path, counts: tuple[int, ...] = (3, 2, 1)) -> Path:
    """Shards of so many samples each, numbered through."""
    first = 0
    for index, count in enumerate(counts):
        numbers = range(first, first + count)
        write_image_text(folder / f"pairs-{index}.tar", {f"{k:04d}": sample_files(k) for k in numbers})
        first += count
    return folder
