"""Checks a published night against its manifest, its logs and the rules of the schema; names the first fault."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import manifest as manifests
from jobs.logs import LogFile, UnreadableLogError, format_of, read_rows
from jobs.manifest import InputObject, Manifest, PublishedFile, Reading
from jobs.parquet import PUBLISHED_SCHEMA, check_readable, version_of
from jobs.publish import BATCH_ROWS, ContentHash, judgement
from jobs.rows import RowReader, row_key
from model import storage
from model.errors import ConfigError, ErrorCode
from model.perspectives import PERSPECTIVES
from model.policy import Policy, Verdict
from model.schema import SCHEMA_VERSION, STATUS_ERROR, STATUS_SCORED

_CODES = frozenset(ErrorCode)
_VERDICTS = frozenset([*Verdict, None])


class VerificationError(Exception):
    """The night is not what its manifest says; the message names the first thing that is wrong."""


def verify_night(output: str, night: date, *, check_inputs: bool = True, policy: Policy | None = None) -> Manifest:
    """The verified manifest. Raises ``VerificationError``; ``ConfigError`` when there is nothing that can be checked.

    ``check_inputs``: also that the logs are still those that were read, and hold as many rows of the night; they may
    have expired since. ``policy``: the one of the night; every verdict is given again and compared.
    """
    manifest = manifests.latest(output, night)
    if manifest is None:
        raise ConfigError(f"the night {night} is not published under {output}")
    check_readable(manifest.schema_version, f"the night {night}")
    if policy is not None and policy.content_hash != manifest.policy_hash:
        raise ConfigError(
            f"the night {night} is judged by policy {manifest.policy_id} (hash {manifest.policy_hash}), "
            f"and the given one is {policy.id} (hash {policy.content_hash})"
        )
    if check_inputs:
        for log in manifest.inputs:
            _check_input(log, manifest)
    rows = _Rows(manifest, policy)
    with tempfile.TemporaryDirectory(prefix="assay-verify-") as folder:
        for file in manifest.files:
            path = Path(folder) / "part.parquet"
            _download(output, file, path)
            _check_file(file, path, rows, manifest)
    rows.check_totals()
    return manifest


def _check_input(log: InputObject, manifest: Manifest) -> None:
    try:
        entry = storage.head(log.uri)
    except FileNotFoundError:
        raise VerificationError(f"log {log.uri} is gone; use --skip-inputs if it has expired") from None
    if entry.version != log.version:
        raise VerificationError(f"log {log.uri} has version {entry.version}, the night was scored from {log.version}")
    if manifest.reading is None:
        return  # published before the manifest said how the logs were read
    found = _count_rows(entry, manifest.reading, manifest.date)
    if found != (log.rows, log.is_unreadable):
        raise VerificationError(
            f"log {log.uri} holds {_rows_text(*found)}, the manifest says {_rows_text(log.rows, log.is_unreadable)}"
        )


def _count_rows(entry: storage.StoredObject, reading: Reading, night: date) -> tuple[int, bool]:
    """Rows of the night in one log, and whether it is unreadable: then it counts as one row."""
    kind = format_of(entry.uri)
    if kind is None:
        raise VerificationError(f"log {entry.uri} is no log by its name")
    log = LogFile(entry.uri, entry.version, entry.size_bytes, kind)
    reader = RowReader(reading.columns, night, reading.is_partitioned, max_image_bytes=0)
    # The columns of the job's own scan: damage to another one must not change the count.
    wanted = {reading.columns["generation_id"]}
    if not reading.is_partitioned:
        wanted.add(reading.columns["created_at"])
    try:
        return sum(reader.in_night(raw) for _, raw in read_rows(log, reading.max_line_bytes, wanted)), False
    except UnreadableLogError:
        return 1, True


def _rows_text(rows: int, is_unreadable: bool) -> str:
    return "no readable row" if is_unreadable else f"{rows} rows of the night"


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


def _check_file(file: PublishedFile, path: Path, rows: _Rows, manifest: Manifest) -> None:
    try:
        parquet = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise VerificationError(f"{file.path} is no Parquet file: {error}") from error
    with parquet:
        _check_schema(file.path, parquet.schema_arrow, manifest.schema_version)
        if parquet.metadata.num_rows != file.rows:
            raise VerificationError(f"{file.path} has {parquet.metadata.num_rows} rows, the manifest says {file.rows}")
        rows.use_columns(file.path, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(BATCH_ROWS):
            rows.add(batch.to_pylist())


def _check_schema(path: str, found: pa.Schema, schema_version: str) -> None:
    """Minor versions differ by nullable columns: an older file may lack some, a newer one may have others."""
    stated = (found.metadata or {}).get(b"assay.schema_version", b"").decode(errors="replace")
    if stated != schema_version:
        raise VerificationError(f"{path} has schema version {stated!r}, the manifest says {schema_version!r}")
    is_older = version_of(schema_version) < version_of(SCHEMA_VERSION)
    for field in PUBLISHED_SCHEMA:
        if field.name not in found.names:
            if is_older and field.nullable:
                continue
            raise VerificationError(f"{path} lacks column {field.name}")
        if found.field(field.name).type != field.type:
            raise VerificationError(f"{path}: column {field.name} is {found.field(field.name).type}, not {field.type}")
    is_newer = version_of(schema_version) > version_of(SCHEMA_VERSION)
    for field in found:
        if field.name in PUBLISHED_SCHEMA.names:
            continue
        if not is_newer:
            raise VerificationError(f"{path}: column {field.name} is not one of schema {schema_version}")
        if field.type not in PUBLISHED_SCHEMA.types:
            raise ConfigError(f"{path}: column {field.name} of schema {schema_version} is newer than this code")


class _Rows:
    """Checks rows as they stream by, and the totals at the end."""

    def __init__(self, manifest: Manifest, policy: Policy | None) -> None:
        self._manifest = manifest
        self._policy = policy
        self._logs = {log.uri: log for log in manifest.inputs}
        # The same in every row, also after a retry (same weights, or it were another night) and a re-judgement.
        self._constant = {
            "policy_id": manifest.policy_id,
            "policy_hash": manifest.policy_hash,
            "preprocessing_hash": manifest.preprocessing_hash,
            **{f"checkpoint_{p}": manifest.checkpoints.get(p) for p in PERSPECTIVES},
        }
        self._last_key = ""
        self._status: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._per_log: Counter[str] = Counter()
        self._columns: Sequence[str] | None = None
        self._absent: dict[str, None] = {}
        self._digest = ContentHash()

    def use_columns(self, path: str, columns: Sequence[str]) -> None:
        """The columns of the next file: all files of a night have the same, and the content hash is over them."""
        if self._columns is None:
            self._columns = columns
            self._absent = dict.fromkeys(set(PUBLISHED_SCHEMA.names) - set(columns))
            self._digest = ContentHash(columns)
        elif columns != self._columns:
            raise VerificationError(f"{path} has other columns than the files before it")

    def add(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row |= self._absent
            self._check_key(row)
            self._check_facts(row)
            self._check_result(row)
            self._check_judgement(row)
            self._status[row["status"]] += 1
            self._verdicts[row["verdict"] or "none"] += 1
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
            ("rows by verdict", dict(self._verdicts), manifest.rows_by_verdict),
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
        if row["source_version"] != log.version:
            raise VerificationError(f"row {key}: source_version is {row['source_version']!r}, not {log.version!r}")
        if key <= self._last_key:
            raise VerificationError(f"row {key}: repeated or out of order")
        self._last_key = key

    def _check_facts(self, row: dict[str, Any]) -> None:
        for name, expected in self._constant.items():
            if row[name] != expected:
                raise VerificationError(
                    f"row {row['row_key']}: {name} is {row[name]!r}, the manifest says {expected!r}"
                )

    def _check_result(self, row: dict[str, Any]) -> None:
        key, scored = row["row_key"], [str(p) for p in PERSPECTIVES if _rewards(row, p)]
        for perspective in scored:
            if not all(map(math.isfinite, _rewards(row, perspective))):
                raise VerificationError(f"row {key}: the {perspective} reward is not finite")
        if row["status"] == STATUS_ERROR:
            if row["error_code"] not in _CODES or not row["error_message"] or scored or row["verdict"] is not None:
                raise VerificationError(
                    f"row {key}: a dead letter needs a known code and a message, and has no reward or verdict"
                )
        elif row["status"] != STATUS_SCORED or row["error_code"] is not None or not scored:
            raise VerificationError(f"row {key}: status {row['status']!r} does not fit its rewards and error code")
        if sorted(row["not_scored"] or []) != sorted(set(map(str, PERSPECTIVES)) - set(scored)):
            raise VerificationError(f"row {key}: not_scored {row['not_scored']} does not fit its rewards")

    def _check_judgement(self, row: dict[str, Any]) -> None:
        key = row["row_key"]
        if row["verdict"] not in _VERDICTS or (row["verdict"] is None) != (row["severity"] is None):
            raise VerificationError(f"row {key}: verdict {row['verdict']!r} with severity {row['severity']!r}")
        if self._policy is None:
            return
        for name, expected in judgement(row, self._policy).items():
            if row[name] != expected:
                raise VerificationError(f"row {key}: {name} is {row[name]!r}, the policy says {expected!r}")


def _rewards(row: dict[str, Any], perspective: str) -> list[float]:
    """The scalar reward of a row or the elements of its vector; empty where it has neither."""
    scalar = row[f"reward_{perspective}"]
    return [*([] if scalar is None else [scalar]), *(row[f"reward_{perspective}_vector"] or [])]
