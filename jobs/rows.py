"""One raw log row -> the job's row: typed fields, a ``row_key``, and the first thing that is wrong with it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pyarrow as pa

from jobs.logs import Fault, LogFile, UnreadableValue
from model.errors import ErrorCode, InputError, Stage

WHOLE_FILE = -1  # row number of the one dead letter that stands for an unreadable file

# What the read step hands to the others. ``image`` holds inline bytes until the fetch step has seen them.
ROW_SCHEMA = pa.schema(
    [
        pa.field("row_key", pa.string(), nullable=False),
        pa.field("generation_id", pa.string()),
        pa.field("created_at", pa.timestamp("us", "UTC")),
        pa.field("prompt", pa.large_string()),
        pa.field("image_uri", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("generator", pa.string()),
        pa.field("generator_version", pa.string()),
        pa.field("extras", pa.large_string()),
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_version", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_stage", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)


@dataclass(frozen=True)
class RowReader:
    """How rows of one night are understood. ``is_partitioned``: the folder already says which night it is."""

    columns: dict[str, str]  # field -> log column
    night: date
    is_partitioned: bool
    max_image_bytes: int  # of an image in the row itself

    def in_night(self, raw: dict[str, Any] | Fault) -> bool:
        """Whether the row belongs to the night; one without a usable time belongs to the night asked for."""
        if self.is_partitioned or isinstance(raw, Fault):
            return True
        try:
            created_at = parse_time(raw.get(self.columns["created_at"]))
        except InputError:
            return True
        return created_at is None or created_at.date() == self.night

    def row(self, log: LogFile, position: int, raw: dict[str, Any] | Fault, *, is_repeated: bool) -> dict[str, Any]:
        """A row of ``ROW_SCHEMA``. The first fault found is its error; everything legible is kept."""
        row = _blank(log, position)
        if isinstance(raw, Fault):
            return _failed(row, ErrorCode.ROW_UNREADABLE, f"row {position} of {log.uri}: {raw.reason}")
        fields = dict(self.columns)
        for name, parse in _parsers(self.max_image_bytes).items():
            try:
                row[name] = parse(raw.get(fields[name]))
            except InputError as error:
                _failed(row, error.code, error.message)
        row["extras"] = _extras(raw, used=set(fields.values()))
        self._check(row, is_repeated)
        return row

    def _check(self, row: dict[str, Any], is_repeated: bool) -> None:
        if row["generation_id"] is None:
            _failed(row, ErrorCode.MISSING_ID, "generation_id is null or empty; every generation needs its own")
        elif is_repeated:
            _failed(row, ErrorCode.DUPLICATE_ID, f"generation_id {row['generation_id']!r} stood in this night before")
        if row["created_at"] is None and not self.is_partitioned:
            _failed(row, ErrorCode.BAD_TIMESTAMP, "created_at is null, and the log is not partitioned by dt=")
        if row["prompt"] is None:
            _failed(row, ErrorCode.MISSING_PROMPT, "prompt is null; an empty one must be an empty string")
        if row["image"] is None and row["image_uri"] is None:
            _failed(row, ErrorCode.MISSING_IMAGE, "neither image nor image_uri is given")


def unreadable_log(log: LogFile, reason: str) -> dict[str, Any]:
    """The dead letter of a file that cannot be read."""
    return _failed(_blank(log, WHOLE_FILE), ErrorCode.LOG_UNREADABLE, f"cannot read {log.uri}: {reason}")


def row_key(log_uri: str, log_version: str, position: int) -> str:
    """sha256 over input object, its version and row number: never null, unique, the same in every run."""
    return hashlib.sha256(f"{log_uri}\n{log_version}\n{position}".encode()).hexdigest()


def parse_id(value: Any) -> str | None:
    """``generation_id`` as text; None when null or empty. Numbers are legal ids."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, UnreadableValue):
        raise InputError(ErrorCode.MISSING_ID, Stage.READ, f"generation_id cannot be read: {value.reason}")
    text = str(value)
    _require_utf8(text, ErrorCode.MISSING_ID, "generation_id")
    return text or None


def parse_time(value: Any) -> datetime | None:
    """UTC time from a timestamp, ISO 8601 text, or seconds (from 1e11 on: milliseconds) since 1970.

    A time without zone is UTC. Raises ``InputError`` (``bad_timestamp``) for anything else but null.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        elif isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day, tzinfo=UTC)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=value / (1000 if abs(value) >= 1e11 else 1))
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except (ValueError, OverflowError):
        pass  # named below, like a value of another type
    raise InputError(
        ErrorCode.BAD_TIMESTAMP, Stage.READ, f"created_at {_shown(value)} is not a time; use ISO 8601 with a zone"
    )


def _parse_prompt(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(ErrorCode.BAD_PROMPT, Stage.READ, f"prompt is a {_kind_of(value)}, not text")
    _require_utf8(value or "", ErrorCode.BAD_PROMPT, "prompt")
    return value


def _parse_image(value: Any, max_bytes: int) -> bytes | None:
    """Bytes, base64 text (JSONL has no bytes), or a ``{"bytes": …}`` struct as image data sets write it."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        return None
    if not isinstance(value, bytes | str):
        raise InputError(ErrorCode.IMAGE_NOT_AN_IMAGE, Stage.READ, f"image is a {_kind_of(value)}, not bytes")
    size = len(value) if isinstance(value, bytes) else len(value) * 3 // 4 - value[-2:].count("=")
    if size > max_bytes:
        message = f"image has {size} bytes, which exceed max_image_bytes={max_bytes}"
        raise InputError(ErrorCode.IMAGE_TOO_MANY_BYTES, Stage.READ, message)
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        message = f"image is neither bytes nor base64: {error}"
        raise InputError(ErrorCode.IMAGE_NOT_AN_IMAGE, Stage.READ, message) from error


def _parse_uri(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(ErrorCode.BAD_IMAGE_URI, Stage.READ, f"image_uri is a {_kind_of(value)}, not text")
    _require_utf8(value or "", ErrorCode.BAD_IMAGE_URI, "image_uri")
    return value or None


def _parse_label(value: Any) -> str | None:
    # Names and versions decide nothing here: numbers are welcome, and broken text is mended rather than refused.
    return (
        None
        if value is None or isinstance(value, UnreadableValue)
        else str(value).encode("utf-8", "replace").decode("utf-8")
    )


def _parsers(max_image_bytes: int) -> dict[str, Callable[[Any], Any]]:
    """How each field is read. In this order: the first fault found is the row's error."""
    return {
        "generation_id": parse_id,
        "created_at": parse_time,
        "prompt": _parse_prompt,
        "image_uri": _parse_uri,
        "image": partial(_parse_image, max_bytes=max_image_bytes),
        "generator": _parse_label,
        "generator_version": _parse_label,
    }


def _require_utf8(text: str, code: ErrorCode, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"{field} holds a lone surrogate at character {error.start}, which is no text"
        raise InputError(code, Stage.READ, message) from error


def _extras(raw: dict[str, Any], used: set[str]) -> str | None:
    others = {name: value for name, value in raw.items() if name not in used}
    if not others:
        return None
    text = json.dumps(_plain(others), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    """JSON has fewer types than Parquet: times become ISO text, bytes base64, NaN and infinities text.

    Keys become text; a value that could not be read is null. Depth is bounded where the row was read.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta):
        return str(value)
    if value is None or isinstance(value, UnreadableValue):
        return None
    return value if isinstance(value, int | float | str) else str(value)


def _shown(value: Any) -> str:
    return f"({value.reason[:80]})" if isinstance(value, UnreadableValue) else repr(value)[:80]


def _kind_of(value: Any) -> str:
    return "value that cannot be read" if isinstance(value, UnreadableValue) else type(value).__name__


def _blank(log: LogFile, position: int) -> dict[str, Any]:
    row = dict.fromkeys(ROW_SCHEMA.names)
    row |= {"row_key": row_key(log.uri, log.version, position), "source_file": log.uri}
    return row | {"source_version": log.version, "source_row": position}


def _failed(row: dict[str, Any], code: ErrorCode, message: str) -> dict[str, Any]:
    if row["error_code"] is None:
        row |= {"error_code": code.value, "error_stage": Stage.READ.value, "error_message": message}
    return row
