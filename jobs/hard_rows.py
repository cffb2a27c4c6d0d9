"""The hard rows of a demo night: what goes wrong in real logs, each with the outcome that it must have.

Makes bytes and field values only; ``jobs/demo_data.py`` puts them into a log.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from model.errors import ErrorCode

# Stand for URIs below the images; put in by the writer, which knows where those are.
MISSING_OBJECT = "a URI at which nothing lies"
LONG_NAME = "a URI that is longer than any store allows"
LONG_NAME_CHARACTERS = 1_100  # a file name may have 255 bytes, an S3 key 1,024
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_ORIENTATION = 0x0112
_ROTATED_90 = 6  # the camera was turned: show it a quarter turn clockwise
_LONG_PROMPT_CHARACTERS = 50_000
_NESTED_LEVELS = 600
VALID_UNTIL = "valid_until"  # a date column that only some logs have
_FAR_DAYS = 2**30  # about the year 2,900,000
_FAR_MICROSECONDS = 2**62  # about the year 148,000


@dataclass(frozen=True)
class HardRow:
    """One hard row. ``source_file`` and ``source_row`` find it: ids may be null or repeated.

    ``source_row``: 0-based, or -1 where the whole file is meant. ``expected_error_code``: None where the row
    is legal and must be scored.
    """

    kind: str
    generation_id: str | None
    expected_error_code: ErrorCode | None
    source_file: str
    source_row: int


@dataclass(frozen=True)
class HardImage:
    """An encoded image, or what stands in the place of one."""

    kind: str
    suffix: str
    data: bytes
    expected_error_code: ErrorCode | None = None


@dataclass(frozen=True)
class HardFields:
    """Values that replace those of a plain row."""

    kind: str
    changes: Mapping[str, Any]
    expected_error_code: ErrorCode | None = None


def hard_images(picture: Image.Image, max_image_bytes: int) -> Iterator[HardImage]:
    """Every hard kind of image object, made from an RGB picture. The last is one byte larger than the limit."""
    yield from _legal_images(picture)
    jpeg, png = encode(picture, "JPEG"), encode(picture, "PNG")
    yield HardImage("truncated_jpeg", "jpg", jpeg[: len(jpeg) // 2], ErrorCode.IMAGE_TRUNCATED)
    yield HardImage("truncated_png", "png", png[: len(png) // 2], ErrorCode.IMAGE_TRUNCATED)
    yield HardImage("corrupt_in_the_middle", "png", _corrupt_middle(png), ErrorCode.IMAGE_CORRUPT)
    yield HardImage("zero_bytes", "jpg", b"", ErrorCode.IMAGE_EMPTY)
    yield HardImage("html_page", "jpg", _HTML, ErrorCode.IMAGE_NOT_AN_IMAGE)
    yield HardImage("decompression_bomb", "png", png_bomb(20_000), ErrorCode.IMAGE_TOO_MANY_PIXELS)
    thin = Image.new("RGB", (20_000, 20), (90, 140, 200))
    yield HardImage("long_and_thin", "png", encode(thin, "PNG"), ErrorCode.IMAGE_TOO_NARROW)
    frames = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    yield HardImage("animated_gif", "gif", _animated(frames, "GIF"), ErrorCode.IMAGE_ANIMATED)
    yield HardImage("animated_webp", "webp", _animated(frames, "WEBP"), ErrorCode.IMAGE_ANIMATED)
    too_large = png + bytes(max(0, max_image_bytes + 1 - len(png)))
    yield HardImage("too_many_bytes", "png", too_large, ErrorCode.IMAGE_TOO_MANY_BYTES)


def _legal_images(picture: Image.Image) -> Iterator[HardImage]:
    yield HardImage("one_pixel", "png", encode(Image.new("RGB", (1, 1), (200, 80, 40)), "PNG"))
    yield HardImage("cmyk_jpeg", "jpg", encode(picture.convert("CMYK"), "JPEG"))
    yield HardImage("png_16_bit", "png", encode(_grey_16_bit(picture), "PNG"))
    yield HardImage("palette_with_transparency", "png", _palette_with_transparency(picture))
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = _ROTATED_90
    yield HardImage("exif_rotated_jpeg", "jpg", encode(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif))
    yield HardImage("wrong_extension", "jpg", encode(picture, "PNG"))


def hard_fields(forbidden_uri: str | None = None) -> Iterator[HardFields]:
    """Every hard kind that one field makes. ``forbidden_uri``: an object that answers 403, where there is one."""
    yield HardFields("missing_object", {"image_uri": MISSING_OBJECT}, ErrorCode.IMAGE_NOT_FOUND)
    if forbidden_uri is not None:
        yield HardFields("forbidden_object", {"image_uri": forbidden_uri}, ErrorCode.IMAGE_FORBIDDEN)
    yield HardFields("very_long_name", {"image_uri": LONG_NAME}, ErrorCode.BAD_IMAGE_URI)
    yield HardFields("unknown_scheme", {"image_uri": "ftp://host/a.png"}, ErrorCode.URI_SCHEME_NOT_ALLOWED)
    yield HardFields("foreign_bucket", {"image_uri": "s3://somebody-else/a.png"}, ErrorCode.BUCKET_NOT_ALLOWED)
    yield HardFields("no_image", {"image_uri": None, "image": None}, ErrorCode.MISSING_IMAGE)
    yield HardFields("null_prompt", {"prompt": None}, ErrorCode.MISSING_PROMPT)
    yield HardFields("empty_prompt", {"prompt": ""})
    long_prompt = ("a red ball on a green meadow, " * _LONG_PROMPT_CHARACTERS)[:_LONG_PROMPT_CHARACTERS]
    yield HardFields("very_long_prompt", {"prompt": long_prompt}, ErrorCode.PROMPT_TOO_LONG)
    yield HardFields(
        "nul_and_emoji_in_prompt", {"prompt": "a happy \x00 cat \U0001f408\u200d\u2b1b and a ball \U0001f3c0"}
    )
    yield HardFields("null_id", {"generation_id": None}, ErrorCode.MISSING_ID)


def hard_json_fields() -> Iterator[HardFields]:
    """Kinds that only JSON can hold: text that is no Unicode, and values of the wrong type."""
    yield HardFields("lone_surrogate_in_prompt", {"prompt": "a red \ud800 ball"}, ErrorCode.BAD_PROMPT)
    yield HardFields("prompt_is_a_number", {"prompt": 42}, ErrorCode.BAD_PROMPT)
    yield HardFields("unparsable_timestamp", {"created_at": "yesterday noon"}, ErrorCode.BAD_TIMESTAMP)
    yield HardFields("image_is_no_base64", {"image_uri": None, "image": "é"}, ErrorCode.IMAGE_NOT_AN_IMAGE)
    nested: list[Any] = []
    for _ in range(_NESTED_LEVELS):
        nested = [nested]
    yield HardFields("nested_too_deep", {"workflow": nested}, ErrorCode.ROW_UNREADABLE)


def hard_parquet_fields() -> Iterator[HardFields]:
    """Times that a Parquet file can hold and Python cannot, in units of their columns since 1970."""
    yield HardFields("far_date_in_an_extra_column", {VALID_UNTIL: _FAR_DAYS})
    yield HardFields("far_timestamp", {"created_at": _FAR_MICROSECONDS, VALID_UNTIL: None}, ErrorCode.BAD_TIMESTAMP)


# Lines of a JSONL log that are no rows.
HARD_LINES = {
    "line_is_not_json": b'{"generation_id": "cut-off", "prompt": "a re',
    "line_is_not_an_object": b'["a", "list"]',
    "line_is_not_utf8": b'{"generation_id": "latin-1", "prompt": "caf\xe9"}',
}

UNREADABLE_PARQUET = b"PAR1" + b"this was a log before the disk was full " * 20

_HTML = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>Try again later.</body></html>"


def encode(picture: Image.Image, image_format: str, **options: Any) -> bytes:
    """The picture as a file of that format (a name of Pillow's)."""
    buffer = BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_bomb(side: int) -> bytes:
    """A valid PNG of ``side`` x ``side`` black pixels, one bit each, made row by row: a few KiB stand for all.

    At 20,000 its 49 KiB decode to 1.2 GB of RGB.
    """
    compressor = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)  # filter byte 0, then the pixels
    data = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return _PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _corrupt_middle(png: bytes) -> bytes:
    middle = len(png) // 2
    return png[:middle] + bytes(byte ^ 0xFF for byte in png[middle : middle + 64]) + png[middle + 64 :]


def _grey_16_bit(picture: Image.Image) -> Image.Image:
    grey = picture.convert("L")
    # High byte the grey value, low byte 0: 16-bit pixels are little-endian in this mode.
    pairs = bytes(value for byte in grey.tobytes() for value in (0, byte))
    return Image.frombytes("I;16", grey.size, pairs)


def _palette_with_transparency(picture: Image.Image) -> bytes:
    palette = picture.quantize(32)
    return encode(palette, "PNG", transparency=bytes([0, 128] + [255] * 30))


def _animated(frames: list[Image.Image], image_format: str) -> bytes:
    return encode(frames[0], image_format, save_all=True, append_images=frames[1:], duration=200)
