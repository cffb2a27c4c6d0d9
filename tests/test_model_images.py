"""Every kind of bad or unusual image: its error code, or the exact pixels that are scored."""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from model.errors import ErrorCode, InputError, Stage
from model.images import decode_image, image_facts

UPRIGHT = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 0, 0], [255, 255, 255]]], dtype=np.uint8
)
# How an upright picture has to be stored so that each EXIF orientation shows it upright (rows, columns).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def refused(data: bytes, **limits: int) -> InputError:
    with pytest.raises(InputError) as caught:
        decode_image(data, **limits)
    assert caught.value.stage is Stage.DECODE
    assert "\n" not in caught.value.message
    return caught.value


def pixels(data: bytes) -> np.ndarray:
    image, _ = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_found_in_the_bytes(name: str) -> None:
    data = encode(noise("P" if name == "GIF" else "RGB"), name)
    image, facts = decode_image(data)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert facts.sha256 == hashlib.sha256(data).hexdigest()
    assert (facts.size_bytes, facts.width, facts.height, facts.format) == (len(data), 64, 48, name)


def test_facts_before_decoding() -> None:
    facts = image_facts(b"abc")
    assert facts.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert (facts.size_bytes, facts.width, facts.height, facts.format) == (3, None, None, None)


def test_empty() -> None:
    assert refused(b"").code is ErrorCode.IMAGE_EMPTY


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\n  <html>", "HTML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b'{"error": "gone"}', "JSON"),
        (b"%PDF-1.7", "PDF"),
        (b"\x00\x00\x00\x1cftypavif\x00\x00", "avif"),
        (b"\x00", "no known image"),
        (b"\xff\xd8", "no known image"),
        (b"plain words", "no known image"),
    ],
)
def test_not_an_image_says_what_it_looks_like(data: bytes, words: str) -> None:
    error = refused(data)
    assert error.code is ErrorCode.IMAGE_NOT_AN_IMAGE
    assert words in error.message
    assert repr(data[:8])[2:-1] in error.message


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_truncated(name: str, kept: float) -> None:
    data = encode(noise("P" if name == "GIF" else "RGB"), name, **({"lossless": True} if name == "WEBP" else {}))
    error = refused(data[: int(len(data) * kept)])
    # A TIFF keeps its directory at the end: cut off, nothing tells a short file from a damaged one.
    allowed = {ErrorCode.IMAGE_TRUNCATED, ErrorCode.IMAGE_CORRUPT} if name == "TIFF" else {ErrorCode.IMAGE_TRUNCATED}
    assert error.code in allowed


def test_corrupt() -> None:
    png = bytearray(encode(noise(), "PNG"))
    middle = len(png) // 2
    png[middle : middle + 64] = bytes(64)
    assert refused(bytes(png)).code is ErrorCode.IMAGE_CORRUPT
    jpeg = bytearray(encode(noise(), "JPEG"))
    jpeg[2:20] = b"\xff\xc4" + b"\xff" * 16
    assert refused(bytes(jpeg)).code is ErrorCode.IMAGE_CORRUPT


def test_too_many_bytes() -> None:
    data = encode(noise(), "PNG")
    decode_image(data, max_image_bytes=len(data))
    error = refused(data, max_image_bytes=len(data) - 1)
    assert error.code is ErrorCode.IMAGE_TOO_MANY_BYTES
    assert str(len(data) - 1) in error.message
    assert str(len(data)) in error.message


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _bomb(name: str) -> bytes:
    """A file of a few hundred bytes that claims to be more than 100 million pixels large."""
    if name == "PNG":
        return _png_header(60000, 60000)
    data = bytearray(encode(Image.new("P" if name == "GIF" else "RGB", (8, 8)), name))
    if name == "GIF":
        data[6:10] = struct.pack("<HH", 60000, 60000)
    if name == "BMP":
        data[18:26] = struct.pack("<ii", 60000, 60000)
    if name == "WEBP":
        vp8 = bytes(data[12:])
        vp8x = (
            b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") + (16382).to_bytes(3, "little")
        )
        data = bytearray(b"RIFF" + struct.pack("<I", 4 + len(vp8x) + len(vp8)) + b"WEBP" + vp8x + vp8)
    if name == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_decompression_bomb_is_refused_from_its_header(name: str) -> None:
    data = _bomb(name)
    assert len(data) < 2000
    assert refused(data).code is ErrorCode.IMAGE_TOO_MANY_PIXELS


def test_pixel_limit_is_exact_and_ours_alone() -> None:
    data = encode(noise(size=(50, 40)), "PNG")
    decode_image(data, max_image_pixels=2000)
    error = refused(data, max_image_pixels=1999)
    assert error.code is ErrorCode.IMAGE_TOO_MANY_PIXELS
    assert "max_image_pixels=1999 exceeded by 50x40=2000" in error.message
    # Between once and twice Pillow's own limit it would only warn (an error in this suite).
    above_pillow = encode(Image.new("1", (10000, 9000)), "PNG")
    assert refused(above_pillow).code is ErrorCode.IMAGE_TOO_MANY_PIXELS


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated(name: str) -> None:
    frames = [noise(size=(16, 16)), Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")]
    error = refused(encode(frames[0], name, save_all=True, append_images=frames[1:]))
    assert error.code is ErrorCode.IMAGE_ANIMATED
    assert "3 frames" in error.message


def test_one_pixel() -> None:
    assert pixels(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


def test_long_and_thin_is_decoded() -> None:
    assert pixels(encode(Image.new("RGB", (20000, 20)), "PNG")).shape == (20, 20000, 3)


def test_cmyk_jpeg() -> None:
    # No ink is white; full cyan leaves no red: (255 - 255, 255 - 0, 255 - 0).
    white = pixels(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert np.abs(white.astype(int) - 255).max() <= 2
    cyan = pixels(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))
    assert np.abs(cyan.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(name: str) -> None:
    values = np.array([[0x0000, 0x00FF, 0x0100], [0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    got = pixels(encode(Image.fromarray(values), name))
    assert got[..., 0].tolist() == [[0, 0, 1], [127, 128, 255]]  # value >> 8
    assert (got == got[..., :1]).all()


def test_16_bit_big_endian_tiff() -> None:
    values = np.array([[0x1234, 0xFEDC]], dtype=">u2")
    data = encode(Image.frombytes("I;16B", (2, 1), values.tobytes()), "TIFF")
    assert pixels(data)[..., 0].tolist() == [[0x12, 0xFE]]


def test_32_bit_pixels_have_no_defined_white() -> None:
    error = refused(encode(Image.new("F", (4, 4), 0.5), "TIFF"))
    assert error.code is ErrorCode.IMAGE_NOT_AN_IMAGE
    assert "32-bit" in error.message


def test_grey_and_one_bit() -> None:
    assert pixels(encode(Image.new("L", (2, 1), 77), "PNG")).tolist() == [[[77] * 3] * 2]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(encode(bits, "PNG")).tolist() == [[[0] * 3, [255] * 3]]


def test_transparency_is_composited_on_white() -> None:
    # 255 * 128/255 + 255 * 127/255 = 255 for red; 0 * 128/255 + 255 * 127/255 = 127 for the others.
    half_red = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert pixels(encode(half_red, "PNG")).tolist() == [[[255, 127, 127]]]
    grey_alpha = Image.new("LA", (1, 1), (0, 0))
    assert pixels(encode(grey_alpha, "PNG")).tolist() == [[[255, 255, 255]]]


def test_palette_with_transparency() -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.putdata([0, 1, 2])
    assert pixels(encode(picture, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    white_hole = [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    assert pixels(encode(picture, "PNG", transparency=1)).tolist() == white_hole
    assert pixels(encode(picture, "GIF", transparency=1)).tolist() == white_hole
    # 40*51/255 + 255*204/255 = 212, 50 -> 214, 60 -> 216
    fifth = encode(picture, "PNG", transparency=b"\xff\x33\xff")
    assert pixels(fifth).tolist() == [[[10, 20, 30], [212, 214, 216], [70, 80, 90]]]


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    data = encode(stored, name, exif=exif, **({"lossless": True} if name == "WEBP" else {}))
    image, facts = decode_image(data)
    assert np.array_equal(np.asarray(image), UPRIGHT)
    assert (facts.width, facts.height) == (3, 2)


def test_exif_orientation_of_a_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _, facts = decode_image(encode(noise(size=(64, 48)), "JPEG", exif=exif))
    assert (facts.width, facts.height) == (48, 64)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, and the image is scored all the same
def test_damaged_exif_does_not_cost_the_image() -> None:
    data = encode(noise(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert pixels(data).shape == (48, 64, 3)


def test_many_threads_and_pillows_global_limit_stays() -> None:
    before = Image.MAX_IMAGE_PIXELS
    good, bomb = encode(noise(), "PNG"), _bomb("PNG")
    expected = pixels(good).tobytes()
    start = threading.Barrier(8)

    def work(index: int) -> bool:
        start.wait(10)
        if index % 2:
            return refused(bomb).code is ErrorCode.IMAGE_TOO_MANY_PIXELS
        return all(pixels(good).tobytes() == expected for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert before == Image.MAX_IMAGE_PIXELS
