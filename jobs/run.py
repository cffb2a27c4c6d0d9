"""One night, from configuration to manifest: decides what is left to do, stages it, publishes it.

Every step may be killed and run again. What is done is known from storage alone: committed blocks (Ray's
checkpoint), a marker per finished shard, and in the end the manifest.
"""

from __future__ import annotations

import _thread
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import ray

from jobs import manifest as manifests
from jobs import report
from jobs.backends import ScoringPlan
from jobs.config import JobConfig
from jobs.fetch import check_image_root
from jobs.lock import NightLock
from jobs.logs import list_logs
from jobs.manifest import InputObject, Manifest, Reading
from jobs.parquet import check_rewritable
from jobs.pipeline import check_resources, check_scan_resources, run_shard
from jobs.precision_file import Precision, precision_of
from jobs.progress import OutageRule, Progress, Reporter, Snapshot, SystemicFailureError
from jobs.publish import Target, check_rows, write_content
from jobs.query import dead_letters
from jobs.rejudge import content_fields, file_facts, rejudge
from jobs.scan import Scan, Slice, row_reader, scan_night, shards
from jobs.stages import HASH_KEY_VARIABLE, RunFacts
from jobs.staging import Staging, Via
from jobs.via import choose_via
from model import storage
from model.code_version import code_version
from model.errors import ConfigError, InfrastructureError, TransientError
from model.identity import reward_facts
from model.modes import EXACT
from model.policy import Policy, check_applies
from model.policy_file import load_policy
from model.schema import SCHEMA_VERSION
from model.scorer import ScorerIdentity, read_identity, resolve, system_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Run:
    """What stays the same through one run."""

    config: JobConfig
    identity: ScorerIdentity
    policy: Policy
    precision: Precision
    run_id: str
    lock: NightLock
    say: Say


@dataclass(frozen=True)
class _Work:
    """What has to be staged. ``base``: the published night whose other rows a retry keeps."""

    reason: Literal["scored", "retried"]
    staging: Staging
    shards: list[list[Slice]]
    rows: int
    base: Manifest | None = None


def run_night(config: JobConfig, connect: Callable[[], None], say: Say) -> Manifest:
    """Scores, retries or re-judges one night, whichever is left to do, and returns it as published.

    ``connect`` joins the cluster; it is called once all that can be checked without one is known to be right.
    Raises ``ConfigError`` before any work, ``SystemicFailureError`` for an outage, ``InfrastructureError``.
    """
    identity, policy = check_configuration(config)
    precision = precision_of(resolve(config.checkpoint), identity)
    list_logs(config.input, config.date)
    manifests.latest(config.output, config.date)
    connect()
    run_id = new_run_id()
    with NightLock(config.output, config.date, run_id, say, on_lost=_thread.interrupt_main) as lock:
        run = _Run(config, identity, policy, precision, run_id, lock, say)
        try:
            return _run_locked(run)
        except KeyboardInterrupt:
            # The lock's thread interrupts this one when another run has taken over.
            lock.check()
            raise


def new_run_id() -> str:
    """Sortable by time, unique."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"


def check_configuration(config: JobConfig) -> tuple[ScorerIdentity, Policy]:
    """Everything that can be wrong before a log is opened. Raises ``ConfigError``."""
    system = system_of(config.checkpoint)
    if system != config.scorer:
        raise ConfigError(f"--checkpoint {config.checkpoint} belongs to scorer {system!r}, not {config.scorer!r}")
    identity = read_identity(config.checkpoint, dtype=config.dtype, mode=config.mode)
    policy = load_policy(config.policy)
    check_applies(policy, identity.checkpoints, identity.vector_perspectives)
    check_image_root(config.image_root)
    if config.hash_columns and not os.environ.get(HASH_KEY_VARIABLE):
        raise ConfigError(f"--hash-columns needs a secret key in {HASH_KEY_VARIABLE}, where Ray was started")
    return identity, policy


def key_of(config: JobConfig, scan: Scan, identity: ScorerIdentity) -> str:
    """16 hex digits over everything that decides the stored facts: the same work has the same key after a kill."""
    content = {
        "date": str(config.date),
        "inputs": [[file.log.uri, file.log.version] for file in scan.files],
        "checkpoints": {str(perspective): value for perspective, value in identity.checkpoints.items()},
        "preprocessing": identity.preprocessing_hash,
        "dtype": identity.dtype,
        # Not named where it is exact, so that nights from before there were modes keep their keys.
        **({} if identity.mode == EXACT else {"mode": identity.mode}),
        # How rows are read: another mapping finds other rows in the same logs.
        "reading": [config.map, config.image_root, sorted(config.allow_bucket)],
        "limits": [config.limits.max_image_bytes, config.limits.max_line_bytes],
        "hidden": [config.drop_columns, config.hash_columns],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _run_locked(run: _Run) -> Manifest:
    started = time.monotonic()
    config = run.config
    check_scan_resources(run.say)
    run.say(f"reading the logs of {config.date} under {config.input}")
    scan = scan_night(config)
    key = key_of(config, scan, run.identity)
    run.say(f"{scan.rows} rows in {len(scan.files)} files; run key {key}")
    published = manifests.latest(config.output, config.date)
    is_finished = published is not None and published.run_key == key
    if config.retry_errors:
        if published is None or not is_finished:
            raise ConfigError(f"--retry-errors: the night {config.date} is not published from these logs and weights")
        check_rewritable(published.schema_version, f"the night {config.date}")
        work = _dead_letters_of(published, config, scan)
        if work.rows == 0:
            run.say("nothing to retry: no dead letter of this night could end otherwise")
            return published
    elif published is not None and is_finished:
        return _finished(run, published)
    else:
        pieces = shards(scan, config.rows_per_shard)
        work = _Work("scored", Staging.open(config.output, key, config.rows_per_shard, len(pieces)), pieces, scan.rows)
    via, snapshot, rows_before = _stage(run, work, scan)
    return _publish(run, work, scan, key, published, via, snapshot, rows_before, started)


def _finished(run: _Run, published: Manifest) -> Manifest:
    if published.policy_hash == run.policy.content_hash:
        run.say(f"the night {published.date} is published already, as version {published.version}; nothing to do")
        return published
    rows_per_part = run.config.rows_per_part
    return rejudge(run.config.output, published, run.policy, run.run_id, rows_per_part, run.lock, run.say)


def _dead_letters_of(published: Manifest, config: JobConfig, scan: Scan) -> _Work:
    """The rows that failed, to be read and scored again; a file that is still unreadable stays as it is."""
    failed = dead_letters(config.output, published)
    slices = []
    for file in scan.files:
        numbers = failed.get(file.log.uri, frozenset())
        if numbers and file.unreadable is None:
            slices.append(Slice(file, min(numbers), max(numbers) + 1, numbers))
    # One key per published version: a retry that is killed resumes, the next retry starts afresh.
    key = hashlib.sha256(f"{published.run_key}:retry:{published.version}".encode()).hexdigest()[:16]
    pieces = [slices] if slices else []
    rows = sum(len(piece.only_rows or ()) for piece in slices)
    return _Work(
        "retried", Staging.open(config.output, key, config.rows_per_shard, len(pieces)), pieces, rows, base=published
    )


def _stage(run: _Run, work: _Work, scan: Scan) -> tuple[Via, Snapshot, int]:
    """Stages what is left. Returns the way of scoring, this run's counts, and the rows that were done before."""
    config, identity, staging = run.config, run.identity, work.staging
    stored = staging.stored_via()
    if stored and staging.is_complete():
        run.say("all rows were scored before; what is left is to publish them")
        return stored, Snapshot(), work.rows
    code = code_version()
    expected = reward_facts(identity, code)
    via = choose_via(config, staging, expected, run.say)
    check_resources(config, via, run.say)
    rows_before = staging.committed_rows()
    if rows_before:
        run.say(f"resuming: {rows_before} of {work.rows} rows were done before")
    progress = ray.remote(num_cpus=0)(Progress).remote(_outage_rule(config, work))
    plan = ScoringPlan.of(config, via, expected)
    facts = RunFacts.of(config, identity, run.run_id, code)
    reader = row_reader(config, scan.is_partitioned)
    with Reporter(progress, work.rows, rows_before, run.say):
        for shard, slices in enumerate(work.shards):
            if staging.is_done(shard):
                continue
            try:
                run_shard(config, slices, reader, plan, facts, staging, shard, progress)
            except ray.exceptions.RayError:
                if reason := ray.get(progress.stop_reason.remote()):
                    # Committed rows would come back as results when the outage is over.
                    staging.abandon()
                    raise SystemicFailureError(reason) from None
                raise
            staging.mark_done(shard)
    return via, ray.get(progress.snapshot.remote()), rows_before


def _outage_rule(config: JobConfig, work: _Work) -> OutageRule | None:
    # Dead letters that are tried again are expected to fail in the way they did.
    if work.reason == "retried" or work.rows < config.outage_min_rows:
        return None
    return OutageRule(min(config.outage_window_rows, work.rows), config.outage_share)


def _publish(
    run: _Run,
    work: _Work,
    scan: Scan,
    key: str,
    published: Manifest | None,
    via: Via,
    snapshot: Snapshot,
    rows_before: int,
    started: float,
) -> Manifest:
    config, identity, policy = run.config, run.identity, run.policy
    run.lock.check()
    _check_logs_unchanged(scan)
    run.say("publishing")
    version = published.version + 1 if published else 1
    facts = file_facts(identity.checkpoints, policy)
    target = Target(config.output, config.date, key, version, run.run_id, config.rows_per_part, facts)
    kept = [storage.join(config.output, file.path) for file in work.base.files] if work.base else []
    content = write_content([work.staging.files(), kept], target, policy)
    if content.rows < scan.rows:
        # What is missing will not come back by itself: the next run must not believe the markers.
        work.staging.abandon()
    check_rows(content, scan.rows)
    manifest = Manifest(
        date=config.date,
        version=version,
        previous_version=published.version if published else None,
        reason=work.reason,
        run_key=key,
        run_id=run.run_id,
        published_at=datetime.now(UTC),
        via=via,
        inputs=_inputs(scan),
        schema_version=SCHEMA_VERSION,
        checkpoints=dict(identity.checkpoints),
        vector_perspectives=identity.vector_perspectives,
        preprocessing_hash=identity.preprocessing_hash,
        policy_id=policy.id,
        policy_hash=policy.content_hash,
        code_version=code_version(),
        is_trained=identity.is_trained,
        precision=run.precision,
        reading=Reading(
            columns=row_reader(config, scan.is_partitioned).columns,
            is_partitioned=scan.is_partitioned,
            max_line_bytes=config.limits.max_line_bytes,
        ),
        **content_fields(content),
    )
    # A retry replaces rows on purpose; only what was staged twice counts as repeated work.
    repeated = content.repeated - (work.rows if work.base else 0)
    report.write(config.output, manifest, snapshot, time.monotonic() - started, rows_before, repeated)
    run.lock.check()
    manifests.write(config.output, manifest)
    _tidy(work.staging, run.say)
    return manifest


def _tidy(staging: Staging, say: Say) -> None:
    """The night is published: what fails from here on is no failure of the run."""
    try:
        staging.remove()
    except (TransientError, PermissionError) as error:
        say(f"warning: staged rows were not removed ({error}); assay gc will")


def _inputs(scan: Scan) -> tuple[InputObject, ...]:
    return tuple(
        InputObject(
            uri=file.log.uri, version=file.log.version, rows=file.rows, is_unreadable=file.unreadable is not None
        )
        for file in scan.files
    )


def _check_logs_unchanged(scan: Scan) -> None:
    for file in scan.files:
        try:
            version = storage.head(file.log.uri).version
        except FileNotFoundError:
            version = "absent"
        if version != file.log.version:
            raise InfrastructureError(f"{file.log.uri} changed while it was being scored; run the night again")
