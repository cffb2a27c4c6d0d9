"""The manifest: what a published night consists of. The highest version is the night, and nothing else is."""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.precision_file import Precision
from model import storage
from model.errors import ConfigError, InfrastructureError
from model.perspectives import Perspective

_NAME = re.compile(r"dt=(\d{4}-\d{2}-\d{2})/(\d{8})\.json$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedFile(_Strict):
    """One Parquet file; ``path`` is relative to the output root."""

    path: str
    size_bytes: int
    sha256: str
    rows: int


class InputObject(_Strict):
    """One log object and how many rows of the night it gave (1 for an unreadable one: its dead letter)."""

    uri: str
    version: str
    rows: int
    is_unreadable: bool = False


class Reading(_Strict):
    """How rows were found in the logs: what it takes to count them again. ``columns``: field -> log column."""

    columns: dict[str, str]
    is_partitioned: bool
    max_line_bytes: int


class Manifest(_Strict):
    """One version of one night. ``content_sha256``: over all rows sorted by ``row_key``, without run id and times."""

    manifest_format: Literal[1] = 1
    date: date
    version: int
    previous_version: int | None
    reason: Literal["scored", "rejudged", "retried"]
    run_key: str
    run_id: str
    published_at: datetime
    via: Literal["serve", "pool"]
    files: tuple[PublishedFile, ...]
    inputs: tuple[InputObject, ...]
    rows: int
    rows_by_status: dict[str, int]
    rows_by_code: dict[str, int]
    rows_by_verdict: dict[str, int]
    content_sha256: str
    schema_version: str
    checkpoints: dict[Perspective, str]
    vector_perspectives: tuple[Perspective, ...] = ()
    preprocessing_hash: str
    policy_id: str
    policy_hash: str
    code_version: str
    is_trained: bool
    reading: Reading | None = None
    # Absent in nights from before there were modes, which are all exact.
    precision: Precision | None = None

    @property
    def error_share(self) -> float:
        """Share of dead letters, 0 to 1."""
        return self.rows_by_status.get("error", 0) / self.rows


def uri_of(output: str, night: date, version: int) -> str:
    """Where a version of a night lies."""
    return storage.join(output, f"manifests/dt={night}/{version:08d}.json")


def latest(output: str, night: date) -> Manifest | None:
    """The published night, or None."""
    versions = versions_by_night(output).get(night)
    return read(output, night, versions[-1]) if versions else None


def versions_by_night(output: str) -> dict[date, list[int]]:
    """All manifest versions, ascending, of all nights. Raises ``ConfigError`` for an unusable output root."""
    found: dict[date, list[int]] = {}
    try:
        for entry in storage.list_objects(storage.join(output, "manifests"), is_probe=True):
            if match := _NAME.search(entry.uri):
                found.setdefault(date.fromisoformat(match[1]), []).append(int(match[2]))
    except FileNotFoundError as error:
        # A local root that does not exist yet is an empty one; an S3 bucket must be there.
        if storage.is_s3(output):
            raise ConfigError(f"--output: {error}") from error
    except PermissionError as error:
        raise ConfigError(f"--output: {error}") from error
    return {night: sorted(found[night]) for night in sorted(found)}


def read(output: str, night: date, version: int) -> Manifest:
    """One manifest. Raises ``InfrastructureError`` when it is not one that this code understands."""
    uri = uri_of(output, night, version)
    try:
        return Manifest.model_validate_json(storage.get(uri))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise InfrastructureError(
            f"{uri} is not a manifest that this version reads: {place}: {fault['msg']}"
        ) from error


def write(output: str, manifest: Manifest) -> str:
    """Publishes: one conditional put, after everything that the manifest names. Returns its URI.

    Raises ``InfrastructureError`` when this version exists already: another run was faster.
    """
    uri = uri_of(output, manifest.date, manifest.version)
    try:
        storage.put(uri, manifest.model_dump_json(indent=1).encode(), if_absent=True)
    except FileExistsError as error:
        raise InfrastructureError(
            f"{uri} was published by another run in the meantime; nothing was replaced"
        ) from error
    return uri
