"""A small published night, for the tests of what comes after scoring."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from jobs import manifest as manifests
from jobs.manifest import InputObject, Manifest
from jobs.publish import Content, Target, check_rows, write_content
from jobs.rejudge import content_fields
from model.perspectives import PERSPECTIVES
from model.schema import SCHEMA_VERSION
from model.storage import StoredObject, head
from tests.job_helpers import CHECKPOINT, NIGHT, policy, staged_row, write_staged

RUN_KEY = "k" * 16


def make_log(folder) -> StoredObject:
    path = folder / "logs/a.parquet"
    path.parent.mkdir()
    path.write_bytes(b"whatever: only its version counts here")
    return head(str(path))


def row_of(log, position, reward, **changes) -> dict[str, Any]:
    checkpoints = {f"checkpoint_{perspective}": CHECKPOINT for perspective in PERSPECTIVES}
    return staged_row(log.uri, log.version, position, reward, **(checkpoints | changes))


def rows_of(log, count=10, **changes) -> list[dict[str, Any]]:
    # Rewards -5 … 4, and row 3 is a dead letter.
    return [row_of(log, i, None if i == 3 else i - 5.0, **changes) for i in range(count)]


def publish(output, log, sources, version=1, rows_per_part=1000, rows=10, **fields) -> tuple[Manifest, Content]:
    target = Target(str(output), NIGHT, RUN_KEY, version, f"20261120T000000Z-{version:08d}", rows_per_part, {})
    content = write_content(sources, target, policy())
    check_rows(content, rows)
    facts = {
        "date": NIGHT,
        "version": version,
        "previous_version": version - 1 or None,
        "reason": "scored",
        "run_key": RUN_KEY,
        "run_id": target.run_id,
        "published_at": datetime.now(UTC),
        "via": "pool",
        "inputs": (InputObject(uri=log.uri, version=log.version, rows=rows),),
        "schema_version": SCHEMA_VERSION,
        "checkpoints": dict.fromkeys(PERSPECTIVES, CHECKPOINT),
        "preprocessing_hash": "p" * 64,
        "policy_id": "p",
        "policy_hash": policy().content_hash,
        "code_version": "0",
        "is_trained": False,
    }
    manifest = Manifest(**(facts | content_fields(content) | fields))
    manifests.write(str(output), manifest)
    return manifest, content


def publish_night(folder, log, rows_per_part=4, **fields):
    """Ten rows in three parts; returns the output root and the manifest."""
    staged = write_staged(folder / "staged.parquet", rows_of(log))
    manifest, _ = publish(folder / "out", log, [[staged]], rows_per_part=rows_per_part, **fields)
    return folder / "out", manifest
