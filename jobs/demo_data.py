"""Writes a demo night: logs in every accepted form, images that they name, and hard rows among the plain ones."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.hard_rows import (
    HARD_LINES,
    LONG_NAME,
    LONG_NAME_CHARACTERS,
    MISSING_OBJECT,
    UNREADABLE_PARQUET,
    VALID_UNTIL,
    HardFields,
    HardRow,
    encode,
    hard_fields,
    hard_images,
    hard_json_fields,
    hard_parquet_fields,
)
from jobs.rows import WHOLE_FILE
from model import storage
from model.errors import ErrorCode
from model.images import MAX_IMAGE_BYTES
from model.scenes import SIZES, draw

_DRAWING_THREADS = 4  # drawing holds the interpreter lock half of the time; the rest is encoding and uploads

# Format (Pillow's name), suffix, options: the fastest of each, for the disk matters less than the wait.
_FORMATS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("JPEG", "jpg", {"quality": 90}),
    ("JPEG", "jpg", {"quality": 75}),
    ("PNG", "png", {"compress_level": 1}),
    ("WEBP", "webp", {"quality": 85, "method": 0}),
)

_FIELDS = [
    ("generation_id", pa.string()),
    ("created_at", pa.timestamp("us", "UTC")),
    ("prompt", pa.string()),
    ("image_uri", pa.string()),
    ("image", pa.binary()),
    ("generator", pa.string()),
    ("generator_version", pa.string()),
    ("seed", pa.int64()),
    ("steps", pa.int32()),
    ("cfg", pa.float32()),
    ("user_name", pa.string()),
]

_NAMES_BELOW_IMAGES = {MISSING_OBJECT: "no-such-object.png", LONG_NAME: f"{'x' * LONG_NAME_CHARACTERS}.png"}

Row = dict[str, Any]


@dataclass(frozen=True)
class DemoNight:
    """What was written. ``row_count``: rows that a scored night must have, dead letters included."""

    logs_uri: str
    images_uri: str
    date: date
    row_count: int
    hard_rows: tuple[HardRow, ...]


@dataclass(frozen=True)
class _Entry:
    """A row of a log on its way into a file; ``line`` stands for a JSONL line that is no row."""

    row: Row
    kind: str | None = None  # None: a plain row
    expected_error_code: ErrorCode | None = None
    line: bytes | None = None


def write_demo_night(
    logs_uri: str,
    images_uri: str,
    night: date,
    rows: int = 600,
    seed: int = 0,
    *,
    with_hard_rows: bool = True,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    forbidden_uri: str | None = None,
) -> DemoNight:
    """Writes logs under ``logs_uri/dt=<night>/`` and images under ``images_uri/`` (S3 or local).

    ``rows``: plain rows, at least 20; hard ones come on top. The same arguments write the same bytes.
    ``max_image_bytes``: the limit that one hard row exceeds by a byte.
    ``forbidden_uri``: an object that answers 403 to the job, for servers that can refuse.
    """
    if rows < 20:
        raise ValueError(f"rows={rows}; a demo night needs at least 20")
    plain = _plain_rows(images_uri, night, rows, seed)
    files = _split(plain)
    if with_hard_rows:
        _add_hard_rows(files, images_uri, seed, max_image_bytes, forbidden_uri)
    folder = storage.join(logs_uri, f"dt={night}")
    for name, entries in files.items():
        storage.put(storage.join(folder, name), _encode_log(name, entries))
    hard_rows = list(_hard_rows(folder, files))
    if with_hard_rows:
        broken = storage.join(folder, "part-005-unreadable.parquet")
        storage.put(broken, UNREADABLE_PARQUET)
        hard_rows.append(HardRow("unreadable_log", None, ErrorCode.LOG_UNREADABLE, broken, WHOLE_FILE))
    row_count = sum(map(len, files.values())) + with_hard_rows
    return DemoNight(logs_uri, images_uri, night, row_count, tuple(hard_rows))


def _plain_rows(images_uri: str, night: date, rows: int, seed: int) -> list[Row]:
    midnight = datetime(night.year, night.month, night.day, tzinfo=UTC)

    def one(number: int) -> Row:
        scene = draw(seed * 1_000_000 + number, size=SIZES[number % len(SIZES)])
        # one step further after each round of sizes: every size meets every format
        image_format, suffix, options = _FORMATS[(number + number // len(SIZES)) % len(_FORMATS)]
        data = encode(scene.image, image_format, **options)
        generation_id = f"gen-{night:%Y%m%d}-{seed}-{number:06d}"
        is_inline = number * 10 // rows == 9 or number % 37 == 0
        uri = None if is_inline else storage.join(images_uri, f"{generation_id}.{suffix}")
        if uri is not None:
            storage.put(uri, data)
        return {
            "generation_id": generation_id,
            "created_at": midnight + timedelta(seconds=86_400 * number // rows),
            "prompt": scene.prompt,
            "image_uri": uri,
            "image": data if is_inline else None,
            "generator": ("scene-painter", "scene-sketcher")[number % 2],
            "generator_version": f"1.{number % 3}",
            "seed": seed * 1_000_000 + number,
            "steps": 20 + 10 * (number % 4),
            "cfg": 4.5 + 0.5 * (number % 6),
            "user_name": f"user-{number * 7919 % 97:02d}",
        }

    with ThreadPoolExecutor(_DRAWING_THREADS) as pool:
        return list(pool.map(one, range(rows)))


def _split(plain: Sequence[Row]) -> dict[str, list[_Entry]]:
    """Log files by name. The last tenth of the rows has its images inline, in a Parquet file of its own."""
    entries = [_Entry(row) for row in plain]
    cuts = [len(entries) * tenth // 10 for tenth in (0, 5, 7, 9, 10)]
    names = ("part-000.parquet", "part-001.jsonl", "part-002.jsonl.gz", "part-003-inline.parquet")
    return {name: entries[a:b] for name, a, b in zip(names, cuts, cuts[1:], strict=False)}


def _add_hard_rows(
    files: dict[str, list[_Entry]], images_uri: str, seed: int, max_image_bytes: int, forbidden_uri: str | None
) -> None:
    parquet, jsonl, gzipped = (files[name] for name in ("part-000.parquet", "part-001.jsonl", "part-002.jsonl.gz"))
    template = next(entry.row for entry in parquet if entry.row["image_uri"])
    in_parquet = _image_entries(template, images_uri, seed, max_image_bytes)
    in_parquet += _field_entries(template, hard_fields(forbidden_uri), images_uri)
    in_jsonl = _field_entries(template, hard_json_fields(), images_uri)
    in_jsonl += [_Entry({}, kind, ErrorCode.ROW_UNREADABLE, line) for kind, line in HARD_LINES.items()]
    # The first row of each file stands before everything that is put among its rows: it is the one repeated.
    in_jsonl.append(_Entry(jsonl[0].row, "repeated_id", ErrorCode.DUPLICATE_ID))
    in_gzip = [_Entry(parquet[0].row, "repeated_id_in_another_file", ErrorCode.DUPLICATE_ID)]
    files["part-000.parquet"] = _among(parquet, in_parquet)
    files["part-001.jsonl"] = _among(jsonl, in_jsonl)
    files["part-002.jsonl.gz"] = _among(gzipped, in_gzip)
    files["part-004-text-times.parquet"] = _text_times(template)
    files["part-006-far-times.parquet"] = _field_entries(template, hard_parquet_fields(), images_uri)


def _image_entries(template: Row, images_uri: str, seed: int, max_image_bytes: int) -> list[_Entry]:
    scene = draw(seed * 1_000_000 + 999_999, size=(384, 256))
    entries = []
    for image in hard_images(scene.image, max_image_bytes):
        uri = storage.join(images_uri, f"hard-{image.kind}.{image.suffix}")
        storage.put(uri, image.data)
        row = template | {"generation_id": f"hard-{image.kind}", "prompt": scene.prompt, "image_uri": uri}
        entries.append(_Entry(row, image.kind, image.expected_error_code))
    return entries


def _field_entries(template: Row, kinds: Iterable[HardFields], images_uri: str) -> list[_Entry]:
    entries = []
    for fields in kinds:
        changes = dict(fields.changes)
        name = _NAMES_BELOW_IMAGES.get(str(changes.get("image_uri")))
        if name is not None:
            changes["image_uri"] = storage.join(images_uri, name)
        row = template | {"generation_id": f"hard-{fields.kind}"} | changes
        entries.append(_Entry(row, fields.kind, fields.expected_error_code))
    return entries


def _text_times(template: Row) -> list[_Entry]:
    """A file whose ``created_at`` is text: legal as ISO 8601, and one odd value costs its own row alone."""
    kinds: tuple[tuple[str, str, ErrorCode | None], ...] = (
        ("timestamp_as_text", template["created_at"].isoformat(), None),
        ("timestamp_as_other_text", "not a time", ErrorCode.BAD_TIMESTAMP),
        ("timestamp_as_text_with_z", f"{template['created_at']:%Y-%m-%dT%H:%M:%SZ}", None),
    )
    return [
        _Entry(template | {"generation_id": f"hard-{kind}", "created_at": text}, kind, code)
        for kind, text, code in kinds
    ]


def _among(plain: Sequence[_Entry], hard: Sequence[_Entry]) -> list[_Entry]:
    """The hard entries spread evenly among the plain ones, never before the first of them."""
    mixed = list(plain)
    for number, entry in reversed(list(enumerate(hard))):
        mixed.insert(1 + (len(plain) - 1) * number // max(1, len(hard)), entry)
    return mixed


def _hard_rows(folder: str, files: dict[str, list[_Entry]]) -> Iterable[HardRow]:
    for name, entries in files.items():
        uri = storage.join(folder, name)
        for position, entry in enumerate(entries):
            if entry.kind is not None:
                yield HardRow(entry.kind, entry.row.get("generation_id"), entry.expected_error_code, uri, position)


def _encode_log(name: str, entries: Sequence[_Entry]) -> bytes:
    if name.endswith(".parquet"):
        return _parquet([entry.row for entry in entries])
    lines = b"".join(_json_line(entry) + b"\n" for entry in entries)
    # mtime 0: the same night gives the same bytes, and so the same ETag
    return gzip.compress(lines, 6, mtime=0) if name.endswith(".gz") else lines


def _parquet(rows: list[Row]) -> bytes:
    has_text_times = any(isinstance(row["created_at"], str) for row in rows)
    fields = [(name, pa.string() if name == "created_at" and has_text_times else kind) for name, kind in _FIELDS]
    if any(VALID_UNTIL in row for row in rows):
        fields.append((VALID_UNTIL, pa.date32()))
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), buffer, compression="zstd")
    return buffer.getvalue()


def _json_line(entry: _Entry) -> bytes:
    if entry.line is not None:
        return entry.line
    row = {name: value for name, value in entry.row.items() if name != "image"}
    if isinstance(row["created_at"], datetime):
        row["created_at"] = row["created_at"].isoformat()
    image = entry.row["image"]
    if image is not None:
        row["image"] = base64.b64encode(image).decode() if isinstance(image, bytes) else image
    return json.dumps(row).encode()
