"""Pictures of every kind as people see them; what is no picture is one line."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image_shards import read_shards
from data.pictures import cover, decode_picture, picture_extensions, picture_paths
from tests.image_text import write_image_text

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
RED, BLUE = (Image.new("RGB", (3, 3), name) for name in ("red", "blue"))


def saved(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, kind, **options)
    return content.getvalue()


def png(kind: int, depth: int, row: bytes, *chunks: tuple[bytes, bytes], size: tuple[int, int] = (2, 1)) -> bytes:
    """A PNG file of one row, by hand."""
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    named = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(named)


def tiff(bits: int, row: bytes, width: int) -> bytes:
    """A grey TIFF file of one row, by hand."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: len(row)}
    begin = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, begin if tag == 273 else value) for tag, value in tags.items()]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + row


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


UPRIGHT = {  # of rows and columns: where the first ones belong, by the definition of the tag
    1: lambda rows: rows,
    2: lambda rows: rows[:, ::-1],
    3: lambda rows: rows[::-1, ::-1],
    4: lambda rows: rows[::-1],
    5: lambda rows: rows.swapaxes(0, 1),
    6: lambda rows: rows[::-1].swapaxes(0, 1),
    7: lambda rows: rows[::-1, ::-1].swapaxes(0, 1),
    8: lambda rows: rows[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    flat = np.repeat(np.repeat(COLOURS, 8, 0), 8, 1)
    options = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    found = decode_picture(saved(flat, kind, exif=exif, **options.get(kind, {})))
    wanted = UPRIGHT[orientation](flat).transpose(2, 0, 1)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).mean() < 2


def test_a_tag_that_cannot_be_read_turns_nothing() -> None:
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert decode_picture(saved(COLOURS, "JPEG", exif=b"Exif\0\0MM\0*garbage")).shape == (3, 4, 6)


WHITE = [255, 255, 255]
CLEAR = {
    "RGBA": (png(6, 8, bytes([9, 8, 7, 0, 1, 2, 3, 255])), [WHITE, [1, 2, 3]]),
    "half": (png(6, 8, bytes([0, 0, 0, 128, 1, 2, 3, 255])), [[127] * 3, [1, 2, 3]]),
    "RGBA 16": (png(6, 16, words(0, 0, 0, 0, 257, 514, 771, 65535)), [WHITE, [1, 2, 3]]),
    "LA": (png(4, 8, bytes([9, 0, 7, 255])), [[255], [7]]),
    "LA 16": (png(4, 16, words(0, 0, 7 * 257, 65535)), [WHITE, [7, 7, 7]]),
    "palette": (
        png(3, 8, bytes([0, 1]), (b"PLTE", bytes([9, 8, 7, 1, 2, 3])), (b"tRNS", b"\0\xff")),
        [WHITE, [1, 2, 3]],
    ),
    "colour": (png(2, 8, bytes([9, 8, 7, 1, 2, 3]), (b"tRNS", words(9, 8, 7))), [WHITE, [1, 2, 3]]),
    "colour 16": (png(2, 16, words(9999, 8, 7, 257, 514, 771), (b"tRNS", words(9999, 8, 7))), [WHITE, [1, 2, 3]]),
    "grey": (png(0, 8, bytes([9, 7]), (b"tRNS", words(9))), [[255], [7]]),
    "grey 16": (png(0, 16, words(9999, 7 * 257), (b"tRNS", words(9999))), [[255], [7]]),
    "one bit": (png(0, 1, b"\x80", (b"tRNS", words(1))), [[255], [0]]),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_transparent_pixels_lie_on_white(kind: str) -> None:
    content, wanted = CLEAR[kind]
    assert decode_picture(content)[:, 0].T.tolist() == wanted


WIDE = {
    "PNG": saved(GREY * np.uint16(257), "PNG"),
    "TIFF": saved(GREY * np.uint16(257), "TIFF"),
    "JPEG 2000": saved(GREY * np.uint16(257), "JPEG2000"),
    "PGM": b"P5 6 4 65535\n" + (GREY * np.uint16(257)).astype(">u2").tobytes(),
    "white is zero": saved((255 - GREY) * np.uint16(257), "TIFF", tiffinfo={262: 0}),
    "32 bits": saved(GREY * np.int32(257), "TIFF"),
    "float": saved((GREY / 255).astype(np.float32), "TIFF"),
    "float bytes": saved((GREY * 1.0).astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_wide_grey_values_are_scaled(kind: str) -> None:
    assert decode_picture(WIDE[kind]).tolist() == [GREY.tolist()]


def test_white_of_a_tiff_is_all_of_its_bits() -> None:
    assert decode_picture(tiff(12, b"\xff\xf0\x00\x80\x00\x00", 4))[0, 0].tolist() == [255, 0, 128, 0]


def test_wide_colours_keep_their_high_bytes() -> None:
    wide = b"P6 6 4 65535\n" + (COLOURS * np.uint16(257)).astype(">u2").tobytes()
    assert np.array_equal(decode_picture(wide), COLOURS.transpose(2, 0, 1))


@pytest.mark.parametrize("high", [np.nan, -1.0, 256.0, 1e6])
def test_values_without_a_known_white_are_refused(high: float) -> None:
    with pytest.raises(ValueError, match="none is known to be white: store 8 or 16 bits"):
        decode_picture(saved(np.array([[0, high]], dtype=np.float32), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "CMYK", "YCbCr", "LAB", "RGBA"])
def test_every_mode_is_grey_or_colour(mode: str) -> None:
    is_grey = mode in ("1", "L", "LA")
    source = RED.convert("L") if is_grey or mode == "PA" else RED
    found = decode_picture(saved(source if mode == "LAB" else source.convert(mode), "TIFF"))
    assert found.shape == (1 if is_grey else 3, 3, 3)
    wanted = np.asarray(source.convert("1" if mode == "1" else "RGB")).astype(int)
    assert np.abs(found[:, 0, 0] - wanted[0, 0] * (255 if mode == "1" else 1)).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_it_is_the_first_picture(kind: str) -> None:
    content = saved(RED, kind, save_all=True, append_images=[BLUE], **({"lossless": True} if kind == "WEBP" else {}))
    assert decode_picture(content)[:, 1, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "QOI", "JPEG2000"])
def test_a_truncated_picture_is_refused(kind: str) -> None:
    whole = saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    assert decode_picture(whole).shape == (3, 64, 64)
    with pytest.raises(ValueError, match=r"cannot be read|can be read"):
        decode_picture(whole[: len(whole) * 2 // 3])


def test_what_is_no_picture_is_one_line() -> None:
    bomb = png(2, 8, b"", size=(40_000, 40_000))
    cases = [(b"", "an empty file"), (b"<html>", "6 bytes that begin with b'<html>'"), (bomb, "exceeds limit")]
    for content, line in [*cases, (saved(RED, "EPS"), "no picture that can be read")]:
        with pytest.raises(ValueError, match=line) as error:
            decode_picture(content)
        assert "\n" not in str(error.value)


def test_a_shard_names_the_broken_picture_and_reads_a_label_with_a_mark(tmp_path: Path) -> None:
    good = {"png": saved(GREY, "PNG"), "cls": b"\xef\xbb\xbf3\r\n"}
    write_image_text(tmp_path / "a.tar", {"0": good, "1": {"webp": saved(COLOURS, "WEBP"), "cls": b"4"}})
    images, labels = read_shards(tmp_path, "*.tar")
    assert (images.shape, labels.tolist()) == ((2, 3, 4, 6), [3, 4])
    write_image_text(tmp_path / "b.tar", {"0": good, "1": {"png": b"", "cls": b"4"}})
    with pytest.raises(ValueError, match=r"1\.png in .*b\.tar: an empty file"):
        read_shards(tmp_path, "*.tar")


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.webp", "a/c.txt", ".hidden.png", "a/.cache/d.png", "e.eps", "f.mpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in picture_paths(tmp_path)] == ["a/c.webp", "b.JPG"]
    assert {"tif", "gif", "bmp", "avif"} < set(picture_extensions())


def test_pictures_cover_the_size_and_are_cut_at_the_centre() -> None:
    wide = np.zeros((8, 32, 3), dtype=np.uint8)
    wide[:, 12:20] = 255
    assert (cover(Image.fromarray(wide), (8, 8)) == 255).all()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 48, 3), dtype=np.uint8))
    small = np.asarray(image.resize((38, 16), Image.Resampling.LANCZOS))[:, 11:27]
    assert np.array_equal(cover(image, (16, 16)), small.transpose(2, 0, 1))
    for height, width in ((7, 30), (31, 5), (16, 16), (1, 3)):
        assert cover(Image.fromarray(np.zeros((height, width), dtype=np.uint8)), (16, 24)).shape == (3, 16, 24)
