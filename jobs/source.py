"""Ray Data source over log slices: one read task each, so that one bad file costs nothing but itself.

``read_parquet`` over many files would fail the whole night on one of them. A custom source also is what
Ray's checkpoint filter attaches to: rows whose key is committed are dropped right after the read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from jobs.logs import read_rows
from jobs.rows import ROW_SCHEMA, RowReader, unreadable_log
from jobs.scan import Slice

_ROWS_PER_TABLE = 256
_BYTES_PER_TABLE = 64 * 2**20  # of inline images: a table ends early where they are large


class LogSource(Datasource):  # type: ignore[misc]
    """The slices of one shard."""

    def __init__(self, slices: list[Slice], reader: RowReader, max_line_bytes: int) -> None:
        super().__init__()
        self._slices = slices
        self._reader = reader
        self._max_line_bytes = max_line_bytes

    def get_name(self) -> str:
        return "Logs"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(piece.file.log.size_bytes for piece in self._slices)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per slice, whatever parallelism is asked for."""
        tasks = []
        for piece in self._slices:
            metadata = BlockMetadata(
                num_rows=None,
                size_bytes=piece.file.log.size_bytes,
                input_files=[piece.file.log.uri],
                exec_stats=None,
            )
            read = partial(read_tables, piece, self._reader, self._max_line_bytes)
            tasks.append(ReadTask(read, metadata, schema=ROW_SCHEMA, per_task_row_limit=per_task_row_limit))
        return tasks


def read_tables(piece: Slice, reader: RowReader, max_line_bytes: int) -> Iterator[pa.Table]:
    """Tables of ``ROW_SCHEMA`` with every row of the slice that belongs to the night, each exactly once."""
    rows: list[dict[str, Any]] = []
    image_bytes = 0
    for row in _rows(piece, reader, max_line_bytes):
        rows.append(row)
        image_bytes += len(row["image"] or b"")
        if len(rows) == _ROWS_PER_TABLE or image_bytes >= _BYTES_PER_TABLE:
            yield pa.Table.from_pylist(rows, ROW_SCHEMA)
            rows, image_bytes = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, ROW_SCHEMA)


def _rows(piece: Slice, reader: RowReader, max_line_bytes: int) -> Iterable[dict[str, Any]]:
    file = piece.file
    if file.unreadable is not None:
        yield unreadable_log(file.log, file.unreadable)
        return
    wanted = piece.wanted()
    for position, raw in read_rows(file.log, max_line_bytes, first_row=piece.first_row, end_row=piece.end_row):
        if position in wanted:
            yield reader.row(file.log, position, raw, is_repeated=position in file.repeated)
