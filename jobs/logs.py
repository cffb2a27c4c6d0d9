"""Finds the log files of a night and reads their rows, whatever state they are in. Knows no Ray."""

from __future__ import annotations

import io
import json
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
_ROWS_PER_READ = 256  # rows of one Parquet read: with inline images of a megabyte still only 256 MB


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


class UnreadableLogError(Exception):
    """The file as a whole cannot be read: one dead letter stands for it."""


def list_logs(root: str, night: date) -> tuple[list[LogFile], bool]:
    """The log files of ``night`` and whether they are partitioned by ``dt=``, sorted by URI.

    Raises ``ConfigError`` for an absent path, refused access, a folder without logs, or an empty night.
    """
    partition = f"dt={night}"
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
    is_partitioned = any("/dt=" in log.uri for log in logs)
    if is_partitioned:
        nights = sorted({part for log in logs for part in log.uri.split("/") if part.startswith("dt=")})
        logs = [log for log in logs if partition in log.uri.split("/")]
        if not logs:
            raise ConfigError(f"no logs for {partition} under {root}; it has {nights[0]} to {nights[-1]}")
    return sorted(logs, key=lambda log: log.uri), is_partitioned


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
    for position, row in read_rows(log, max_line_bytes):
        if isinstance(row, dict):
            names |= set(row)
        if position >= 100:
            break
    return names


def read_rows(
    log: LogFile, max_line_bytes: int, columns: set[str] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Row number and row, from 0 in file order. ``columns`` limits what is read (Parquet) or kept (JSONL).

    Raises ``UnreadableLogError`` when it cannot be opened, or where a compressed stream breaks off.
    """
    if log.format == "parquet":
        yield from _read_parquet(log, columns)
    else:
        yield from _read_jsonl(log, max_line_bytes, columns)


def _open_parquet(log: LogFile) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(log.uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
        _raise_if_storage(log, error)
        raise UnreadableLogError(_reason(error)) from error


def _read_parquet(log: LogFile, columns: set[str] | None) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    with _open_parquet(log) as file:
        names = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
        first = 0
        for group in range(file.metadata.num_row_groups):
            yield from _read_group(file, log, group, first, names)
            first += file.metadata.row_group(group).num_rows


def _read_group(
    file: pq.ParquetFile, log: LogFile, group: int, first: int, names: list[str] | None
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Rows of one row group; where its pages are damaged, faults for the rows that cannot be had any more."""
    position, end = first, first + file.metadata.row_group(group).num_rows
    if names == []:  # no column left to read: the count of rows alone
        yield from ((number, {}) for number in range(first, end))
        return
    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ, row_groups=[group], columns=names):
            for row in batch.to_pylist():
                yield position, row
                position += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        _raise_if_storage(log, error)
        reason = f"row group {group} is damaged: {_reason(error)}"
        yield from ((number, Fault(reason)) for number in range(position, end))


def _raise_if_storage(log: LogFile, error: Exception) -> None:
    # pyarrow has one exception for a damaged page and for a store that is away. The second says so in its
    # text, and must end the run: those rows are not bad.
    if "AWS Error" in str(error):
        raise TransientError(f"reading {log.uri} failed: {_reason(error)}") from error


def _read_jsonl(log: LogFile, max_line_bytes: int, columns: set[str] | None) -> Iterator[tuple[int, Any]]:
    filesystem, path = storage.arrow_filesystem(log.uri)
    compression = "gzip" if log.format == "jsonl.gz" else None
    position = 0
    try:
        with filesystem.open_input_stream(path, compression=compression, buffer_size=2**20) as stream:
            # An empty gzip stream is refused by pyarrow only when it is read.
            for line in _lines(io.BufferedReader(stream, 2**20), max_line_bytes):
                if isinstance(line, bytes) and not line.strip():
                    continue
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
    return row if columns is None else {name: row[name] for name in columns if name in row}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
