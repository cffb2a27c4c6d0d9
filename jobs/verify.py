"""Checks a published night against its manifest, its logs and the rules of the schema; names the first fault."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import manifest as manifests
from jobs.manifest import InputObject, Manifest, PublishedFile
from jobs.parquet import PUBLISHED_SCHEMA
from jobs.publish import ContentHash
from jobs.rows import row_key
from model import storage
from model.errors import ConfigError, ErrorCode
from model.perspectives import PERSPECTIVES
from model.schema import STATUS_ERROR, STATUS_SCORED

_BATCH_ROWS = 16_384


class VerificationError(Exception):
    """The night is not what its manifest says; the message names the first thing that is wrong."""


def verify_night(output: str, night: date, *, check_inputs: bool = True) -> Manifest:
    """The verified manifest. Raises ``VerificationError``; ``ConfigError`` when nothing is published.

    ``check_inputs``: also that the logs are still those that were read; they may have expired since.
    """
    manifest = manifests.latest(output, night)
    if manifest is None:
        raise ConfigError(f"the night {night} is not published under {output}")
    if check_inputs:
        for log in manifest.inputs:
            _check_input(log)
    rows = _Rows(manifest)
    with tempfile.TemporaryDirectory(prefix="assay-verify-") as folder:
        for file in manifest.files:
            path = Path(folder) / "part.parquet"
            _download(output, file, path)
            _check_file(file, path, rows)
    rows.check_totals()
    return manifest


def _check_input(log: InputObject) -> None:
    try:
        version = storage.head(log.uri).version
    except FileNotFoundError:
        raise VerificationError(f"log {log.uri} is gone; use --skip-inputs if it has expired") from None
    if version != log.version:
        raise VerificationError(f"log {log.uri} has version {version}, the night was scored from {log.version}")


def _download(output: str, file: PublishedFile, path: Path) -> None:
    uri = storage.join(output, file.path)
    try:
        size = storage.head(uri).size_bytes
        if size != file.size_bytes:
            raise VerificationError(f"{uri} has {size} bytes, the manifest says {file.size_bytes}")
        storage.get_file(uri, path)
    except FileNotFoundError:
        raise VerificationError(f"{uri} is named by the manifest and missing") from None
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != file.sha256:
        raise VerificationError(f"{uri} has sha256 {digest}, the manifest says {file.sha256}")


def _check_file(file: PublishedFile, path: Path, rows: _Rows) -> None:
    with pq.ParquetFile(path) as parquet:
        for field in PUBLISHED_SCHEMA:
            if field.name not in parquet.schema_arrow.names:
                raise VerificationError(f"{file.path} lacks column {field.name}")
            if parquet.schema_arrow.field(field.name).type != field.type:
                found = parquet.schema_arrow.field(field.name).type
                raise VerificationError(f"{file.path}: column {field.name} is {found}, not {field.type}")
        if parquet.metadata.num_rows != file.rows:
            raise VerificationError(f"{file.path} has {parquet.metadata.num_rows} rows, the manifest says {file.rows}")
        for batch in parquet.iter_batches(_BATCH_ROWS):
            rows.add(pa.Table.from_batches([batch]).to_pylist())


class _Rows:
    """Checks rows as they stream by, and the totals at the end."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._logs = {log.uri: log for log in manifest.inputs}
        self._last_key = ""
        self._status: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()
        self._per_log: Counter[str] = Counter()
        self._digest = ContentHash()

    def add(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._check_key(row)
            self._check_result(row)
            self._status[row["status"]] += 1
            self._per_log[row["source_file"]] += 1
            if row["error_code"] is not None:
                self._codes[row["error_code"]] += 1
        self._digest.add(rows)

    def check_totals(self) -> None:
        manifest = self._manifest
        for name, found, expected in (
            ("rows", sum(self._status.values()), manifest.rows),
            ("rows by status", dict(self._status), manifest.rows_by_status),
            ("rows by code", dict(self._codes), manifest.rows_by_code),
            ("rows per log", dict(self._per_log), {log.uri: log.rows for log in manifest.inputs if log.rows}),
            ("content hash", self._digest.hexdigest(), manifest.content_sha256),
        ):
            if found != expected:
                raise VerificationError(f"{name}: the files give {found}, the manifest says {expected}")

    def _check_key(self, row: dict[str, Any]) -> None:
        key, log = row["row_key"], self._logs.get(row["source_file"])
        if log is None:
            raise VerificationError(f"row {key}: {row['source_file']} is no input of this night")
        if key != row_key(log.uri, log.version, row["source_row"]):
            raise VerificationError(f"row {key}: the key is not that of row {row['source_row']} of {log.uri}")
        if key <= self._last_key:
            raise VerificationError(f"row {key}: repeated or out of order")
        self._last_key = key

    def _check_result(self, row: dict[str, Any]) -> None:
        key = row["row_key"]
        scored = [
            str(p) for p in PERSPECTIVES if row[f"reward_{p}"] is not None or row[f"reward_{p}_vector"] is not None
        ]
        if row["status"] == STATUS_ERROR:
            if (
                row["error_code"] not in set(ErrorCode)
                or not row["error_message"]
                or scored
                or row["verdict"] is not None
            ):
                raise VerificationError(
                    f"row {key}: a dead letter needs a known code and a message, and has no reward or verdict"
                )
        elif row["status"] != STATUS_SCORED or row["error_code"] is not None or not scored:
            raise VerificationError(f"row {key}: status {row['status']!r} does not fit its rewards and error code")
        if sorted(row["not_scored"]) != sorted(set(map(str, PERSPECTIVES)) - set(scored)):
            raise VerificationError(f"row {key}: not_scored {row['not_scored']} does not fit its rewards")
