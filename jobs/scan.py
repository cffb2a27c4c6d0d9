"""The first pass over the logs: how many rows each file has in the night, and which ids are repeated.

Reads ids and times only (Parquet) or parses lines without keeping them (JSONL); images are never touched.
It makes progress, shards and the count of rows exact before any device time is spent, and decides which rows
belong to the night. Costs 24 bytes of driver memory a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from jobs.config import FIELDS, JobConfig
from jobs.logs import LogFile, UnreadableLogError, column_names, list_logs, read_rows
from jobs.rows import RowReader, parse_id
from model.errors import ConfigError, InputError

_SCANS_IN_FLIGHT = 32


@dataclass(frozen=True)
class ScannedLog:
    """One file's part of the night. ``rows``: their number, 1 for an unreadable file (its dead letter)."""

    log: LogFile
    rows: int
    first_row: int = 0  # row numbers in the night lie in [first_row, end_row)
    end_row: int = 0
    unreadable: str | None = None
    repeated: frozenset[int] = frozenset()
    scattered: np.ndarray | None = None  # the row numbers themselves, where rows of other nights lie between them


@dataclass(frozen=True)
class Scan:
    """The night as it lies in the logs."""

    files: tuple[ScannedLog, ...]
    is_partitioned: bool

    @property
    def rows(self) -> int:
        """Rows of the night, dead letters included: exactly so many are published."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class _Pass:
    """What one scan task returns: 16-byte digests of the ids, and the row each one stands in."""

    positions: np.ndarray
    digests: np.ndarray
    names: frozenset[str] = frozenset()
    unreadable: str | None = None


def scan_night(config: JobConfig) -> Scan:
    """Lists and scans the logs. Raises ``ConfigError`` for a wrong path, missing columns or an empty night."""
    logs, is_partitioned = list_logs(config.input, config.date)
    reader = row_reader(config, is_partitioned)
    passes = _scan_all(logs, reader, config.limits.max_line_bytes)
    check_columns(config, is_partitioned, logs, [set(found.names) for found in passes if found.unreadable is None])
    repeated = _repeated(passes)
    files = []
    for log, found, rows in zip(logs, passes, repeated, strict=True):
        if found.unreadable is not None:
            files.append(ScannedLog(log, rows=1, unreadable=found.unreadable))
        elif len(found.positions):
            first, end, count = int(found.positions[0]), int(found.positions[-1]) + 1, len(found.positions)
            scattered = None if end - first == count else found.positions
            files.append(ScannedLog(log, count, first, end, repeated=rows, scattered=scattered))
    scan = Scan(tuple(files), is_partitioned)
    if not any(file.unreadable is None for file in files):
        if files:
            reason = f"{files[0].log.uri}: {files[0].unreadable}"
            raise ConfigError(f"no log of {config.date} under {config.input} can be read; the first: {reason}")
        raise ConfigError(f"the night {config.date} is empty: no row under {config.input} belongs to it")
    return scan


def row_reader(config: JobConfig, is_partitioned: bool) -> RowReader:
    """How rows of this run are understood."""
    columns = {name: config.column_of(name) for name in FIELDS}
    return RowReader(columns, config.date, is_partitioned, config.limits.max_image_bytes)


def check_columns(config: JobConfig, is_partitioned: bool, logs: list[LogFile], found: list[set[str]]) -> None:
    """Raises ``ConfigError`` when no readable file has a column that the night cannot do without."""
    if not found:
        return
    everywhere = set().union(*found)
    required = ["generation_id", "prompt"] + ([] if is_partitioned else ["created_at"])
    for name in required:
        column = config.column_of(name)
        if column not in everywhere:
            shown = ", ".join(sorted(everywhere)) or "no column at all"
            raise ConfigError(f"no column {column!r} in {logs[0].uri} (it has {shown}); use --map {name}=COLUMN")
    if not {config.column_of("image"), config.column_of("image_uri")} & everywhere:
        shown = ", ".join(sorted(everywhere))
        raise ConfigError(
            f"no column 'image' or 'image_uri' in {logs[0].uri} (it has {shown}); use --map image_uri=COLUMN"
        )


def _scan_all(logs: list[LogFile], reader: RowReader, max_line_bytes: int) -> list[_Pass]:
    task = ray.remote(num_cpus=1, max_retries=3)(_scan_one)
    pending: dict[Any, int] = {}
    passes: list[_Pass | None] = [None] * len(logs)
    for index, log in enumerate(logs):
        if len(pending) >= _SCANS_IN_FLIGHT:
            _collect(pending, passes)
        pending[task.remote(log, reader, max_line_bytes)] = index
    while pending:
        _collect(pending, passes)
    return [found for found in passes if found is not None]


def _collect(pending: dict[Any, int], passes: list[_Pass | None]) -> None:
    done, _ = ray.wait(list(pending), num_returns=1)
    for reference in done:
        passes[pending.pop(reference)] = ray.get(reference)


def _scan_one(log: LogFile, reader: RowReader, max_line_bytes: int) -> _Pass:
    wanted = {reader.columns["generation_id"]} | (set() if reader.is_partitioned else {reader.columns["created_at"]})
    positions: list[int] = []
    digests: list[bytes] = []
    try:
        names = column_names(log, max_line_bytes)
        for position, raw in read_rows(log, max_line_bytes, wanted):
            if reader.in_night(raw):
                positions.append(position)
                digests.append(_digest(raw.get(reader.columns["generation_id"]) if isinstance(raw, dict) else None))
    except UnreadableLogError as error:
        return _Pass(np.empty(0, np.int64), np.empty(0, "V16"), unreadable=str(error))
    return _Pass(np.array(positions, np.int64), np.frombuffer(b"".join(digests), "V16"), frozenset(names))


def _digest(value: Any) -> bytes:
    """16 bytes of the id; null ids are never repeats of one another."""
    try:
        text = parse_id(value)
    except InputError:
        text = None
    if text is None:
        return b"\0" * 16
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _repeated(passes: list[_Pass]) -> list[frozenset[int]]:
    """Per file, the rows whose id stood before, in file and row order; the first of equal ids is not among them."""
    digests = np.concatenate([found.digests for found in passes]) if passes else np.empty(0, "V16")
    pairs = (
        digests.view([("high", "<u8"), ("low", "<u8")])
        if len(digests)
        else np.empty(0, [("high", "<u8"), ("low", "<u8")])
    )
    order = np.lexsort((np.arange(len(pairs)), pairs["low"], pairs["high"]))
    ordered = pairs[order]
    is_repeat = np.zeros(len(pairs), bool)
    if len(pairs) > 1:
        same = ordered[1:] == ordered[:-1]
        is_null = (ordered[1:]["high"] == 0) & (ordered[1:]["low"] == 0)
        is_repeat[order[1:]] = same & ~is_null
    result, start = [], 0
    for found in passes:
        stop = start + len(found.positions)
        result.append(frozenset(found.positions[is_repeat[start:stop]].tolist()))
        start = stop
    return result


@dataclass(frozen=True)
class Slice:
    """Rows of one file that one read task yields: those of the night in [first_row, end_row)."""

    file: ScannedLog
    first_row: int
    end_row: int
    only_rows: frozenset[int] | None = None  # --retry-errors reads these alone

    def wanted(self) -> Container[int]:
        """The row numbers to yield. Decided by the scan alone, so that both passes agree on every row."""
        if self.only_rows is not None:
            return self.only_rows
        numbers = self.file.scattered
        if numbers is None:
            return range(self.first_row, self.end_row)
        return frozenset(numbers[(numbers >= self.first_row) & (numbers < self.end_row)].tolist())


def shards(scan: Scan, rows_per_shard: int) -> list[list[Slice]]:
    """Consecutive slices, at most about ``rows_per_shard`` rows each; a longer file is cut by row number."""
    result: list[list[Slice]] = [[]]
    room = rows_per_shard
    for file in scan.files:
        if file.unreadable is not None:
            pieces = [Slice(file, -1, 0)]
        else:
            starts = range(file.first_row, file.end_row, rows_per_shard)
            pieces = [Slice(file, start, min(start + rows_per_shard, file.end_row)) for start in starts]
        for piece in pieces:
            size = piece.end_row - piece.first_row
            if size > room and result[-1]:
                result.append([])
                room = rows_per_shard
            result[-1].append(piece)
            room -= size
    return result
