"""Publishes stored rewards under another policy: no model, no logs, no cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from jobs import manifest as manifests
from jobs import report
from jobs.lock import NightLock
from jobs.manifest import Manifest
from jobs.parquet import check_rewritable
from jobs.progress import Snapshot
from jobs.publish import Content, Target, check_rows, write_content
from model import storage
from model.code_version import code_version
from model.perspectives import Perspective
from model.policy import Policy, check_applies
from model.schema import SCHEMA_VERSION


def rejudge(
    output: str,
    published: Manifest,
    policy: Policy,
    run_id: str,
    rows_per_part: int,
    lock: NightLock,
    say: Callable[[str], None],
) -> Manifest:
    """A new manifest version with the same rewards; the published one where the policy is that of the night.

    Raises ``ConfigError`` when the policy is for other weights, or the night of a newer schema.
    """
    if published.policy_hash == policy.content_hash:
        say(f"the night {published.date} is judged by policy {policy.id} already; nothing to do")
        return published
    check_rewritable(published.schema_version, f"the night {published.date}")
    check_applies(policy, published.checkpoints, published.vector_perspectives)
    say(f"judging the stored rewards of {published.date} again with policy {policy.id}; no model is needed")
    started = time.monotonic()
    facts = file_facts(published.checkpoints, policy)
    target = Target(output, published.date, published.run_key, published.version + 1, run_id, rows_per_part, facts)
    content = write_content([[storage.join(output, file.path) for file in published.files]], target, policy)
    check_rows(content, published.rows)
    manifest = _manifest_of(published, policy, run_id, content)
    # The report first: a kill after the manifest must find nothing left to do.
    report.write(output, manifest, Snapshot(), time.monotonic() - started, published.rows, content.repeated)
    lock.check()
    manifests.write(output, manifest)
    return manifest


def _manifest_of(published: Manifest, policy: Policy, run_id: str, content: Content) -> Manifest:
    update = {
        **content_fields(content),
        "version": published.version + 1,
        "previous_version": published.version,
        "reason": "rejudged",
        "run_id": run_id,
        "published_at": datetime.now(UTC),
        "policy_id": policy.id,
        "policy_hash": policy.content_hash,
        "code_version": code_version(),
        "schema_version": SCHEMA_VERSION,
    }
    return published.model_copy(update=update)


def content_fields(content: Content) -> dict[str, Any]:
    """The fields of a manifest that describe its rows."""
    return {
        "files": tuple(content.files),
        "rows": content.rows,
        "rows_by_status": dict(content.by_status),
        "rows_by_code": dict(content.by_code),
        "rows_by_verdict": dict(content.by_verdict),
        "content_sha256": content.sha256,
    }


def file_facts(checkpoints: Mapping[Perspective, str], policy: Policy) -> dict[str, str]:
    """What every published file repeats in its own metadata."""
    return {
        "checkpoints": json.dumps({str(p): value for p, value in checkpoints.items()}, sort_keys=True),
        "policy": policy.content_hash,
    }
