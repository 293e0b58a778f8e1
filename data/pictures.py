"""A picture file as an array, as people see it: upright, on white where it is transparent, in 8 bits, first of many."""

import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from solvers.errors import one_line

NOT_READ = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow names them, but another program would draw them
GREY = ("1", "L", "LA", "La")
ORIENTATION = 0x0112
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(content: bytes) -> Image.Image:
    """A picture file in mode RGB, or L where it is grey.

    It is turned as its orientation tag says. Transparent pixels lie on white. 16 bits and floats are scaled so that
    white is 255, where white is 65535 (of a TIFF, all of its bits) or, of floats, 1 (255 where one is greater than 1).
    Of an animation or of several pages it is the first. Colour profiles are not applied.

    Raises:
        ValueError: no picture, a broken one, one of too many pixels (`PIL.Image.MAX_IMAGE_PIXELS`), or values whose
            white is not known.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            has_high_bytes = bool(image.tile) and "16" in str(image.tile[0].args)
            image.load()
            turn = TURNS.get(_orientation(image))  # after loading: some formats turn by themselves
            picture = _on_white(_in_8_bits(image, has_high_bytes))
            return picture if turn is None else picture.transpose(turn)
    except UnidentifiedImageError as error:
        kind = f"no picture that can be read, {len(content)} bytes that begin with {content[:8]!r}"
        raise ValueError(kind if content else "an empty file") from error
    except Exception as error:  # decoders raise what they like
        raise ValueError(one_line(f"it cannot be read: {error or type(error).__name__}")) from error


def decode_picture(content: bytes) -> np.ndarray:
    """A picture file as uint8 (3, height, width), a grey one (1, height, width), see `read_picture`."""
    pixels = np.asarray(read_picture(content))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def cover(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture scaled until it covers (height, width), and cut at its centre: uint8 (3, height, width).

    Raises:
        ValueError: one so long that it would be scaled to too many pixels.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    lengths = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if lengths[0] * lengths[1] > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise ValueError(f"it has {image.width} x {image.height} pixels: too long to be cut to {width} x {height}")
    scaled = image.convert("RGB").resize(lengths, Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


@cache
def picture_extensions() -> tuple[str, ...]:
    """How names of pictures end, in small letters and without a dot; the most usual first."""
    formats = _formats()
    known = (name[1:] for name, kind in sorted(Image.registered_extensions().items()) if kind in formats)
    return tuple(dict.fromkeys(("jpg", "jpeg", "png", *known)))


def picture_paths(folder: str | Path) -> Iterator[Path]:
    """The picture files in a folder and in those below it, in order, without hidden ones."""
    return (path for path in files_below(folder) if path.suffix[1:].lower() in picture_extensions())


def files_below(folder: str | Path) -> list[Path]:
    """Every file in a folder and in those below it, in order, without hidden ones."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


@cache
def _formats() -> list[str]:
    """In the order in which Pillow tries them."""
    Image.init()
    return [name for name in Image.ID if name not in NOT_READ]


def _in_8_bits(image: Image.Image, has_high_bytes: bool) -> Image.Image:
    """Wide grey values as bytes; of wide colours Pillow keeps the high ones, but not of what is transparent."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        return _narrow(image, clear)
    if has_high_bytes and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image


def _narrow(image: Image.Image, clear: int | None) -> Image.Image:
    values, tags = np.asarray(image).astype(np.float64), getattr(image, "tag_v2", {})
    low, high = float(values.min()), float(values.max())
    bits = tags.get(BITS, (16,))[0] if image.mode.startswith("I;16") else 16
    white = 2**bits - 1 if image.mode != "F" else 1 if high <= 1 else 255
    if not 0 <= low <= high <= white:  # also where one is no number
        raise ValueError(f"values from {low:g} to {high:g}, of which none is known to be white: store 8 or 16 bits")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    narrow = (values * (255 / white)).round().astype(np.uint8)
    return Image.fromarray(narrow if clear is None else np.where(np.asarray(image) == clear, np.uint8(255), narrow))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a tag that cannot be read turns nothing
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    mode = "L" if image.mode in GREY else "RGB"
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image.convert(mode)
