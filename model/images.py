"""Encoded bytes to one upright RGB image, within limits, or an ``InputError`` that names the cause.

Knows Pillow and numpy; nothing about where bytes come from or which model reads the pixels. Safe to call
from many threads: each call opens its own plugin object, and no global of Pillow is read or changed.

What happens to unusual pixels: transparency is composited on white (as a web page would show it); 16-bit
grey keeps its high byte, as Pillow does for 16-bit colour; CMYK and Lab are converted without their ICC
profile; EXIF orientation is applied. Only the first picture of a JPEG with several (MPO) is read, which is
the one that viewers show.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from model.errors import ErrorCode, InputError, Stage
from model.schema import ImageInfo

# A 16-bit RGBA PNG of 2048x2048 that does not compress takes 32 MiB: larger than any generator's output.
MAX_IMAGE_BYTES = 32 * 1024 * 1024
# 8192x4096. Decoded to RGB this is 96 MiB per worker, twice that while transparency is composited.
MAX_IMAGE_PIXELS = 8192 * 4096

# Each format's class is used directly. ``Image.open`` would compare with the global ``Image.MAX_IMAGE_PIXELS``
# and only warn up to twice that, and catching a warning is not thread-safe.
_FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    (b"BM", BmpImageFile),
    (b"II*\x00", TiffImageFile),
    (b"MM\x00*", TiffImageFile),
    (b"II+\x00", TiffImageFile),
    (b"MM\x00+", TiffImageFile),
)
_ACCEPTED = "JPEG, PNG, WEBP, GIF, BMP, TIFF"

# What a stored object that is no accepted image usually is. Compared after leading white space, in lower case.
_OTHER_CONTENT: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"<", "markup"),
    (b"{", "JSON"),
    (b"[", "JSON"),
    (b"%pdf", "a PDF"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"8bps", "a Photoshop file"),
    (b"\xff\x0a", "JPEG XL"),
)

# Pillow's parsers and decoders raise these, and no others, on malformed files (found by damaging files of
# each format at random). Anything else is a fault of ours and propagates.
_MALFORMED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_facts(data: bytes) -> ImageInfo:
    """What is known of encoded bytes before they are decoded: sha256 (hex) and size in bytes."""
    return ImageInfo(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def decode_image(
    data: bytes, *, max_image_bytes: int = MAX_IMAGE_BYTES, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[Image.Image, ImageInfo]:
    """Decode one encoded image.

    - data: a whole JPEG, PNG, WEBP, GIF, BMP or TIFF file; the format is found in the bytes
    - returns: an upright image of mode RGB, and its facts (width and height in pixels, upright)
    - raises: ``InputError`` of stage decode with one of the ``image_*`` codes; pixels are counted from the
      header, before any memory is taken for them
    """
    if not data:
        raise _error(ErrorCode.IMAGE_EMPTY, "the image has 0 bytes; upload it again")
    if len(data) > max_image_bytes:
        raise _error(ErrorCode.IMAGE_TOO_MANY_BYTES, f"max_image_bytes={max_image_bytes} exceeded by {len(data)} bytes")
    image = _open(data)
    _check_header(image, max_image_pixels)
    try:
        image.load()
        rgb = _upright(_to_rgb(image), image)
    except Image.DecompressionBombError as error:
        raise _error(ErrorCode.IMAGE_TOO_MANY_PIXELS, f"a frame exceeds the pixel limit: {error}") from error
    except _MALFORMED as error:
        raise _malformed(data, image.format, error) from error
    facts = image_facts(data)
    return rgb, ImageInfo(facts.sha256, facts.size_bytes, rgb.width, rgb.height, image.format)


def _error(code: ErrorCode, message: str) -> InputError:
    return InputError(code, Stage.DECODE, message)


def _plugin(data: bytes) -> type[ImageFile] | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    for signature, plugin in _FORMATS:
        if data.startswith(signature):
            return plugin
    return None


def _open(data: bytes) -> ImageFile:
    """Read the header only. WebP's decoder reserves its canvas here, but does not touch it."""
    plugin = _plugin(data)
    if plugin is None:
        raise _error(ErrorCode.IMAGE_NOT_AN_IMAGE, f"{_describe(data)}; accepted formats are {_ACCEPTED}")
    try:
        return plugin(BytesIO(data))
    except Image.DecompressionBombError as error:
        raise _error(ErrorCode.IMAGE_TOO_MANY_PIXELS, str(error)) from error
    except _MALFORMED as error:
        raise _malformed(data, plugin.format, error) from error


def _describe(data: bytes) -> str:
    start = data[:64].lstrip().lower()
    kind = next((kind for prefix, kind in _OTHER_CONTENT if start.startswith(prefix)), "")
    if data[4:8] == b"ftyp":
        kind = f"an ISO media file of brand {data[8:12]!r} (AVIF, HEIC, MP4)"
    return f"the bytes look like {kind or 'no known image'}: they start with {data[:16]!r}"


def _check_header(image: ImageFile, max_image_pixels: int) -> None:
    width, height = image.size
    if width * height > max_image_pixels:
        message = f"max_image_pixels={max_image_pixels} exceeded by {width}x{height}={width * height} pixels"
        raise _error(ErrorCode.IMAGE_TOO_MANY_PIXELS, message)
    try:
        frames = getattr(image, "n_frames", 1)
    except _MALFORMED as error:
        message = f"{image.format} whose frames cannot be counted: {error}"
        raise _error(ErrorCode.IMAGE_CORRUPT, message) from error
    if frames > 1:
        message = f"{image.format} with {frames} frames; score each frame as an image of its own"
        raise _error(ErrorCode.IMAGE_ANIMATED, message)


def _malformed(data: bytes, name: str | None, error: BaseException) -> InputError:
    """Truncated where the file ends before its own structure does, else corrupt."""
    if _ends_early(data, name, error):
        message = f"{name} of {len(data)} bytes ends before its last pixel; upload it again ({error})"
        return _error(ErrorCode.IMAGE_TRUNCATED, message)
    message = f"{name} of {len(data)} bytes cannot be decoded ({type(error).__name__}: {error})"
    return _error(ErrorCode.IMAGE_CORRUPT, message)


def _ends_early(data: bytes, name: str | None, error: BaseException) -> bool:
    # Pillow calls many damaged files truncated, so its word is taken only where a format has no end of its own.
    if name == "JPEG":
        return b"\xff\xd9" not in data[-1024:]
    if name == "PNG":
        return b"IEND" not in data[-1024:]
    if name == "GIF":
        return not data.rstrip(b"\x00").endswith(b"\x3b")
    if name == "WEBP":  # RIFF size, which leaves out its own 8 bytes
        return len(data) < 12 or len(data) < int.from_bytes(data[4:8], "little") + 8
    if name == "BMP":  # file size in the header; 0 is allowed and says nothing
        return len(data) < 14 or len(data) < int.from_bytes(data[2:6], "little")
    return "truncated" in str(error).lower()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _grey16_to_8(image)
    if image.mode in ("I", "F"):
        raise _error(
            ErrorCode.IMAGE_NOT_AN_IMAGE,
            f"32-bit pixels (mode {image.mode}) have no defined white; save it with 8 or 16 bits a channel",
        )
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _grey16_to_8(image: Image.Image) -> Image.Image:
    """High byte of each 16-bit value. Pillow's own conversion clips at 255, which turns most pictures white."""
    values = np.asarray(image).astype(np.uint16)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _upright(rgb: Image.Image, source: ImageFile) -> Image.Image:
    try:
        orientation = source.getexif().get(_ORIENTATION_TAG, 1)
    except _MALFORMED:
        return rgb  # damaged metadata says nothing about good pixels
    operation = _UPRIGHT.get(orientation)
    return rgb if operation is None else rgb.transpose(operation)
