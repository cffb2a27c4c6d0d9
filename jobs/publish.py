"""Staged rows -> a published night: sorted, one row per key, judged by the policy, the manifest last.

The same path serves a first run, a retry of dead letters (new rows before old ones) and a re-judged night (old
rows, new policy). Memory is bounded: DuckDB sorts with spill to disk, and rows stream through in batches.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.manifest import PublishedFile
from jobs.parquet import FACTS_SCHEMA, PUBLISHED_SCHEMA, schema_with
from jobs.query import scores
from model import storage
from model.errors import InfrastructureError
from model.perspectives import Perspective
from model.policy import Policy, decide
from model.schema import RUN_COLUMNS, STATUS_SCORED

BATCH_ROWS = 16_384  # rows that are Python objects at one time
ROW_GROUP_ROWS = 65_536
_ROW_GROUP_BYTES = 256 * 2**20  # rows with long prompts end a row group sooner, so that memory stays bounded
_SORT_MEMORY = "1GB"  # beyond it DuckDB spills to the temporary folder


@dataclass
class Content:
    """What was written, for the manifest. ``repeated``: rows dropped because their key was there already."""

    files: list[PublishedFile] = field(default_factory=list)
    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    by_code: Counter[str] = field(default_factory=Counter)
    by_verdict: Counter[str] = field(default_factory=Counter)
    sha256: str = ""
    repeated: int = 0


@dataclass(frozen=True)
class Target:
    """Where the parts of one version go, and the facts that each file repeats in its metadata."""

    output: str
    night: date
    run_key: str
    version: int
    run_id: str
    rows_per_part: int
    facts: dict[str, str]

    def part(self, index: int) -> str:
        """Path below the output root. The run id keeps a run that lost its lock from touching published files."""
        name = f"part-{self.version:08d}-{self.run_id[-8:]}-{index:05d}.parquet"
        return f"scores/dt={self.night}/run={self.run_key}/{name}"


class ContentHash:
    """sha256 over canonical JSON of each row in order, without the columns that two equal runs may differ in.

    ``columns``: those of the files, in their order. A night of another minor schema version has others.
    """

    def __init__(self, columns: Iterable[str] = PUBLISHED_SCHEMA.names) -> None:
        self._columns = tuple(name for name in columns if name not in RUN_COLUMNS)
        self._hash = hashlib.sha256()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds published rows."""
        for row in rows:
            values = [_canonical(row[name]) for name in self._columns]
            self._hash.update(json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")

    def hexdigest(self) -> str:
        """Hash of the rows so far."""
        return self._hash.hexdigest()


def write_content(sources: Sequence[Sequence[str]], target: Target, policy: Policy) -> Content:
    """Writes the parts. ``sources``: lists of Parquet URIs; where two hold a key, the earlier list wins."""
    content, digest, last_key = Content(), ContentHash(), None
    with tempfile.TemporaryDirectory(prefix="assay-publish-") as folder:
        writer = _PartWriter(target, Path(folder))
        for batch in sorted_rows(sources, Path(folder)):
            rows = _unique(batch, last_key)
            content.repeated += batch.num_rows - len(rows)
            last_key = batch["row_key"][-1].as_py() if batch.num_rows else last_key
            judge(rows, policy)
            digest.add(rows)
            for row in rows:
                content.by_status[row["status"]] += 1
                content.by_verdict[row["verdict"] or "none"] += 1
                if row["error_code"] is not None:
                    content.by_code[row["error_code"]] += 1
            content.rows += len(rows)
            writer.write(pa.Table.from_pylist(rows, PUBLISHED_SCHEMA))
        content.files = writer.finish()
    content.sha256 = digest.hexdigest()
    return content


def sorted_rows(sources: Sequence[Sequence[str]], spill: Path) -> Iterator[pa.Table]:
    """Rows of ``FACTS_SCHEMA`` of all sources, by key and then by source, streamed."""
    connection = duckdb.connect(config={"temp_directory": str(spill), "memory_limit": _SORT_MEMORY})
    try:
        connection.execute("SET TimeZone = 'UTC'")
        parts = []
        for index, uris in enumerate(sources):
            if uris:
                connection.register(f"source_{index}", scores(uris, FACTS_SCHEMA, with_partitions=False))
                parts.append(f"SELECT *, {index} AS source_index FROM source_{index}")  # noqa: S608 - our own names
        names = ", ".join(FACTS_SCHEMA.names)
        union = " UNION ALL ".join(parts)
        query = f"SELECT {names} FROM ({union}) ORDER BY row_key, source_index"  # noqa: S608
        for batch in connection.sql(query).to_arrow_reader(BATCH_ROWS):
            yield pa.Table.from_batches([batch]).cast(FACTS_SCHEMA)
    finally:
        connection.close()


def judge(rows: Sequence[dict[str, Any]], policy: Policy) -> None:
    """Fills the judgement columns from the reward columns."""
    for row in rows:
        row |= judgement(row, policy)


def judgement(row: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """The judgement columns of one row. A dead letter has no rewards, and so no verdict."""
    rewards = {Perspective(p): row[f"reward_{p}"] for p in Perspective} if row["status"] == STATUS_SCORED else {}
    decision = decide(rewards, policy)
    return {
        "verdict": decision.verdict.value if decision.verdict else None,
        "severity": decision.severity.value if decision.severity else None,
        "flags": [flag.value for flag in decision.flags],
        "policy_id": policy.id,
        "policy_hash": policy.content_hash,
    }


def _unique(batch: pa.Table, last_key: str | None) -> list[dict[str, Any]]:
    """The rows without those whose key stood before them: equal keys are neighbours, also across batches."""
    rows = []
    for row in batch.to_pylist():
        if row["row_key"] != last_key:
            rows.append(row)
        last_key = row["row_key"]
    return rows


class _PartWriter:
    """Cuts a stream of tables into files of at most ``rows_per_part`` rows, and uploads each when it is full.

    Tables wait until a row group is full: readers skip by row group, and small ones compress badly.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._path = folder / "part.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._rows = 0  # written to the open file
        self._files: list[PublishedFile] = []

    def write(self, table: pa.Table) -> None:
        self._waiting.append(table)
        while (waiting := sum(part.num_rows for part in self._waiting)) >= self._room():
            self._write_group(self._room())
        if sum(part.nbytes for part in self._waiting) >= _ROW_GROUP_BYTES:
            self._write_group(waiting)

    def finish(self) -> list[PublishedFile]:
        """The files, all uploaded."""
        self._write_group(sum(part.num_rows for part in self._waiting))
        if self._writer is not None:
            self._upload()
        return self._files

    def _room(self) -> int:
        """Rows that fill the row group, or the file."""
        return min(ROW_GROUP_ROWS, self._target.rows_per_part - self._rows)

    def _write_group(self, rows: int) -> None:
        if not rows:
            return
        if self._writer is None:
            schema = schema_with(self._target.facts)
            self._writer = pq.ParquetWriter(self._path, schema, compression="zstd", write_statistics=True)
        table = pa.concat_tables(self._waiting)
        self._writer.write_table(table.slice(0, rows), row_group_size=rows)
        self._waiting = [table.slice(rows)] if rows < table.num_rows else []
        self._rows += rows
        if self._rows == self._target.rows_per_part:
            self._upload()

    def _upload(self) -> None:
        assert self._writer is not None
        self._writer.close()
        path = self._target.part(len(self._files))
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        storage.put_file(storage.join(self._target.output, path), self._path)
        size = self._path.stat().st_size
        self._files.append(PublishedFile(path=path, size_bytes=size, sha256=digest, rows=self._rows))
        self._writer, self._rows = None, 0


def _canonical(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def check_rows(content: Content, expected: int) -> None:
    """One row in is one row out. Raises ``InfrastructureError`` when the night would not be whole."""
    if content.rows != expected:
        raise InfrastructureError(
            f"the logs hold {expected} rows of this night, but {content.rows} were staged; nothing was published. "
            "A log that changed during the run does this: run the night again"
        )
