"""Finds the log files of a night and reads their rows, whatever state they are in. Knows no Ray."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from model import storage
from model.errors import ConfigError, TransientError

Format = Literal["parquet", "jsonl", "jsonl.gz"]

_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
}
_ROWS_PER_READ = 256  # rows of one Parquet read, fewer where they are large
_BYTES_PER_READ = 64 * 2**20
_BUFFER_BYTES = 2**20  # of each Parquet column, and of a JSONL stream
# Writers keep row groups near 128 MiB. A page has no limit of its own, so this one bounds what it can cost.
MAX_ROW_GROUP_BYTES = 4 * 2**30
_ROWS_FOR_NAMES = 100  # JSONL rows whose keys tell which columns there are
MAX_JSON_DEPTH = 200  # far below what Python's recursion limit lets the steps after this one handle
_PARTITION = re.compile(r"dt=(\d{4}-\d{2}-\d{2})")
# Dates out of Python's range, text that is not UTF-8, zones that nobody knows, maps with a key twice.
_CONVERSION_ERRORS = (pa.ArrowException, ValueError, OverflowError, KeyError, TypeError)
# How pyarrow words a refusal by the store: code of the AWS SDK, or the bare status of a HEAD.
_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE"
    r"|MISSING_AUTHENTICATION_TOKEN|REQUEST_EXPIRED|REQUEST_TIME_TOO_SKEWED|SIGNATURE_DOES_NOT_MATCH"
    r"|UNRECOGNIZED_CLIENT)\b"
    r"|AWS Error \w+ \(HTTP status 40[13]\)"
)


@dataclass(frozen=True)
class LogFile:
    """One log object as it was listed."""

    uri: str
    version: str
    size_bytes: int
    format: Format


@dataclass(frozen=True)
class Fault:
    """A row that could not be read as one; ``reason`` says what stands there instead."""

    reason: str


@dataclass(frozen=True)
class UnreadableValue:
    """One value that Python cannot hold, such as a date past the year 9999; the rest of its row is sound."""

    reason: str


class UnreadableLogError(Exception):
    """The file as a whole cannot be read: one dead letter stands for it."""


def list_logs(root: str, night: date) -> tuple[list[LogFile], bool]:
    """The log files of ``night`` and whether they are partitioned by ``dt=``, sorted by URI.

    Folders below ``root`` count as partitions, and so does ``root`` itself where it lies in ``dt=<date>``.
    Raises ``ConfigError`` for an absent path, refused access, a folder without logs, logs inside and outside of
    partitions, or an empty night.
    """
    try:
        objects = list(storage.list_objects(root, is_probe=True))
    except FileNotFoundError as error:
        raise ConfigError(f"--input: {error}") from error
    except PermissionError as error:
        raise ConfigError(f"--input: {error}") from error
    logs = [LogFile(o.uri, o.version, o.size_bytes, kind) for o in objects if (kind := format_of(o.uri))]
    if not logs:
        found = f"{len(objects)} other objects" if objects else "nothing"
        raise ConfigError(f"--input {root}: found {found}, no log ending in {', '.join(_SUFFIXES)}")
    logs.sort(key=lambda log: log.uri)
    own = [match[1] for part in root.split("/") if (match := _PARTITION.fullmatch(part))]
    if own and own[-1] != str(night):
        raise ConfigError(f"--input {root} lies in dt={own[-1]}, which is not the night {night}")
    return (logs, True) if own else _of_night(logs, root, night)


def _of_night(logs: list[LogFile], root: str, night: date) -> tuple[list[LogFile], bool]:
    """The logs of the partition ``dt=<night>``, or all of them where there are no partitions."""
    partitions = [_partition_below(root, log.uri) for log in logs]
    inside = [log for log, partition in zip(logs, partitions, strict=True) if partition is not None]
    outside = [log for log, partition in zip(logs, partitions, strict=True) if partition is None]
    if not inside:
        return logs, False
    if outside:
        raise ConfigError(
            f"--input {root} mixes logs in dt= folders ({inside[0].uri}) with logs outside of them "
            f"({outside[0].uri}), whose rows would be left out; give the one or the other"
        )
    found = [log for log, partition in zip(logs, partitions, strict=True) if partition == f"dt={night}"]
    if not found:
        nights = sorted({partition for partition in partitions if partition is not None})
        raise ConfigError(f"no logs for dt={night} under {root}; it has {nights[0]} to {nights[-1]}")
    return found, True


def _partition_below(root: str, uri: str) -> str | None:
    """The innermost folder ``dt=…`` between ``root`` and the file."""
    base = root if storage.is_s3(root) else str(storage.local_path(root))
    folders = uri.removeprefix(base).split("/")[:-1]
    return next((folder for folder in reversed(folders) if folder.startswith("dt=")), None)


def format_of(uri: str) -> Format | None:
    """Log format by file name; None for anything else. Names that start with ``_`` or ``.`` are markers."""
    name = uri.rsplit("/", 1)[-1]
    if name.startswith(("_", ".")):
        return None
    for suffix, kind in sorted(_SUFFIXES.items(), key=lambda item: -len(item[0])):
        if name.endswith(suffix):
            return kind
    return None


def column_names(log: LogFile, max_line_bytes: int) -> set[str]:
    """Column names of a Parquet file, or keys of the first readable JSONL rows. Raises ``UnreadableLogError``."""
    if log.format == "parquet":
        with _open_parquet(log) as file:
            return set(file.schema_arrow.names)
    names: set[str] = set()
    for _, row in read_rows(log, max_line_bytes, end_row=_ROWS_FOR_NAMES):
        if isinstance(row, dict):
            names |= set(row)
    return names


def read_rows(
    log: LogFile,
    max_line_bytes: int,
    columns: set[str] | None = None,
    *,
    first_row: int = 0,
    end_row: int | None = None,
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Row number and row, for rows in [first_row, end_row), in file order; numbers count from 0 in the file.

    ``columns`` limits what is read (Parquet) or kept (JSONL). Row groups outside of the range are not read.
    A value in a row may be an ``UnreadableValue``.
    Raises ``UnreadableLogError`` when it cannot be opened, or where a compressed stream breaks off;
    ``PermissionError`` where the store refuses it, ``TransientError`` where the store is away.
    """
    wanted = range(first_row, sys.maxsize if end_row is None else end_row)
    if log.format == "parquet":
        yield from _read_parquet(log, columns, wanted)
    else:
        yield from _read_jsonl(log, max_line_bytes, columns, wanted)


def _open_parquet(log: LogFile) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(log.uri)
    try:
        # Pages as they are needed: ``pre_buffer`` would load each row group whole, with all its inline images.
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        _raise_if_storage(log, error)
        raise UnreadableLogError(_reason(error)) from error


def _read_parquet(
    log: LogFile, columns: set[str] | None, wanted: range
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    with _open_parquet(log) as file:
        names = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
        first = 0
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            part = range(max(first, wanted.start), min(end, wanted.stop))
            if part:
                yield from _read_group(file, log, group, range(first, end), part, names)
            first = end


def _read_group(
    file: pq.ParquetFile, log: LogFile, group: int, rows: range, wanted: range, names: list[str] | None
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """The wanted ``rows`` of one row group; where its pages are damaged, faults for those that cannot be had."""
    if not (file.schema_arrow.names if names is None else names):  # no column left to read: the count of rows alone
        yield from ((number, {}) for number in wanted)
        return
    size = _group_bytes(file, group, names)
    if size > MAX_ROW_GROUP_BYTES:
        reason = f"row group {group} has {size} bytes, above the limit of {MAX_ROW_GROUP_BYTES}; write smaller ones"
        yield from ((number, Fault(reason)) for number in wanted)
        return
    per_read = max(1, min(_ROWS_PER_READ, _BYTES_PER_READ * len(rows) // max(size, 1)))
    first = rows.start
    try:
        for batch in file.iter_batches(batch_size=per_read, row_groups=[group], columns=names):
            part = range(max(first, wanted.start), min(first + len(batch), wanted.stop))
            if part:
                yield from zip(part, _python_rows(batch.slice(part.start - first, len(part))), strict=True)
            first += len(batch)
            if first >= wanted.stop:
                return
    except (pa.ArrowException, OSError) as error:
        _raise_if_storage(log, error)
        reason = f"row group {group} is damaged: {_reason(error)}"
        yield from ((number, Fault(reason)) for number in range(max(first, wanted.start), wanted.stop))


def _group_bytes(file: pq.ParquetFile, group: int, names: list[str] | None) -> int:
    """Uncompressed bytes of the columns that are read."""
    facts = file.metadata.row_group(group)
    chunks = (facts.column(index) for index in range(facts.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if names is None or any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names)
    )


def _python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as Python objects. Column by column, so that an odd value costs itself and no other."""
    names = batch.schema.names
    columns = [_python_values(column) for column in batch.columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _python_values(column: pa.Array) -> list[Any]:
    """The values of one column; ``UnreadableValue`` in the place of each that Python cannot hold."""
    as_text = _with_text_times(column.type)
    if as_text != column.type:
        column = column.cast(as_text)
    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    except _CONVERSION_ERRORS:
        return [_python_value(value) for value in column]
    return values


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py(maps_as_pydicts="strict")
    except _CONVERSION_ERRORS:
        pass  # a map with a key twice stays the list of pairs that it is
    try:
        return value.as_py()
    except _CONVERSION_ERRORS as error:
        return UnreadableValue(_reason(error))


def _with_text_times(kind: pa.DataType) -> pa.DataType:
    """The type with text in the place of times of day in nanoseconds, which Python would cut to microseconds."""
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.string()
    if pa.types.is_map(kind):
        return pa.map_(_with_text_times(kind.key_type), _with_text_times(kind.item_type))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_text_times(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_text_times(field.type)) for field in kind])
    return kind


def _raise_if_storage(log: LogFile, error: Exception) -> None:
    # pyarrow has one exception for a damaged page and for a store that refuses or is away. The store's say so
    # in their text, and must end the run: those rows are not bad.
    if isinstance(error, PermissionError) or _REFUSED.search(str(error)):
        raise PermissionError(f"access to the log {log.uri} was refused: {_reason(error)}") from error
    if "AWS Error" in str(error):
        raise TransientError(f"reading {log.uri} failed: {_reason(error)}") from error


def _read_jsonl(
    log: LogFile, max_line_bytes: int, columns: set[str] | None, wanted: range
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    filesystem, path = storage.arrow_filesystem(log.uri)
    compression = "gzip" if log.format == "jsonl.gz" else None
    position = 0
    try:
        with filesystem.open_input_stream(path, compression=compression, buffer_size=_BUFFER_BYTES) as stream:
            # An empty gzip stream is refused by pyarrow only when it is read.
            for line in _lines(io.BufferedReader(stream, _BUFFER_BYTES), max_line_bytes):
                if isinstance(line, bytes) and not line.strip():
                    continue
                if position >= wanted.stop:
                    return
                if position in wanted:
                    yield position, _parse_line(line, columns)
                position += 1
    except (pa.ArrowException, OSError) as error:
        _raise_if_storage(log, error)
        raise UnreadableLogError(_reason(error)) from error


def _lines(stream: io.BufferedReader, max_line_bytes: int) -> Iterator[bytes | Fault]:
    """Lines of bounded length; a longer one becomes a fault and is skipped to its end."""
    while line := stream.readline(max_line_bytes + 1):
        if len(line) <= max_line_bytes or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(max_line_bytes)
        yield Fault(f"line longer than max_line_bytes={max_line_bytes}")


def _parse_line(line: bytes | Fault, columns: set[str] | None) -> dict[str, Any] | Fault:
    if isinstance(line, Fault):
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Fault(f"not JSON: {error}")
    if not isinstance(row, dict):
        return Fault(f"a JSON {type(row).__name__}, not an object")
    if _is_deeper(row, MAX_JSON_DEPTH):
        return Fault(f"nested deeper than {MAX_JSON_DEPTH} levels")
    return row if columns is None else {name: row[name] for name in columns if name in row}


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists are nested deeper than ``limit``; without recursion, which is what may run out."""
    level = [value]
    for _ in range(limit):
        items = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
