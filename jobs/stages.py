"""The steps a row goes through: ``FetchImages`` and ``Prepare`` on CPUs, ``ScoreBatch`` on a device or via Serve.

Each takes and gives Arrow tables, one row out for one row in. A row that fails carries its error on and is
skipped by the later steps; only what ``model/errors.py`` lists is caught. Verdicts are not made here: they are
given to the stored rewards at publication, by the same code for a first run and for a re-judged night.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray

from jobs.backends import Backend, ScoringPlan
from jobs.config import JobConfig
from jobs.fetch import FetchRules, fetch_all
from jobs.parquet import FACTS_SCHEMA
from jobs.progress import SystemicFailureError
from jobs.rows import ROW_SCHEMA
from model.errors import ConfigError, InputError, Stage
from model.perspectives import PERSPECTIVES
from model.prepared_bytes import pack_arrays
from model.schema import STATUS_ERROR, STATUS_SCORED, Generation, ImageInfo, RowError, ScoreRecord
from model.scorer import ScorerIdentity, load_preprocessor

HASH_KEY_VARIABLE = "ASSAY_HASH_KEY"

_IMAGE_FIELDS = [
    pa.field("image_sha256", pa.string()),
    pa.field("image_size", pa.int64()),
    pa.field("image_width", pa.int32()),
    pa.field("image_height", pa.int32()),
    pa.field("image_format", pa.string()),
]
# After ``Prepare``: compact arrays instead of the encoded image, so that only uint8 travels to the device.
PREPARED_SCHEMA = pa.schema(
    [f for f in ROW_SCHEMA if f.name != "image"] + _IMAGE_FIELDS + [pa.field("prepared", pa.large_binary())]
)


class FetchImages:
    """Reads the image of each row, many at a time."""

    def __init__(self, rules: FetchRules, progress: Any) -> None:
        self._rules = rules
        self._progress = progress

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        rows = table.to_pylist()
        wanted = [row for row in rows if row["error_code"] is None and row["image"] is None]
        fetched = asyncio.run(fetch_all([row["image_uri"] for row in wanted], self._rules))
        for row, result in zip(wanted, fetched, strict=True):
            if isinstance(result, InputError):
                set_error(row, result)
            else:
                row["image"] = result
        size = sum(len(result) for result in fetched if isinstance(result, bytes))
        self._progress.stage.remote("fetch", len(wanted), time.perf_counter() - started, size)
        return pa.Table.from_pylist(rows, ROW_SCHEMA)


class Prepare:
    """Decodes images and tokenises prompts: the scorer's CPU step, in the job's own workers."""

    def __init__(self, checkpoint: str, mode: str, progress: Any) -> None:
        self._preprocessor = load_preprocessor(checkpoint, mode=mode)
        self._progress = progress

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        rows = table.to_pylist()
        sound = [row for row in rows if row["error_code"] is None]
        generations = [Generation(row["generation_id"], row["prompt"], row["image"]) for row in sound]
        for row in rows:
            _set_image(row, _bare_image(row.pop("image")))
            row["prepared"] = None
        for row, prepared in zip(sound, self._preprocessor.preprocess(generations), strict=True):
            if prepared.image is not None:
                _set_image(row, prepared.image)
            if prepared.error is not None:
                set_error(row, prepared.error)
            else:
                row["prepared"] = pack_arrays(prepared.arrays)
        self._progress.stage.remote("prepare", len(sound), time.perf_counter() - started, 0)
        return pa.Table.from_pylist(rows, PREPARED_SCHEMA)


@dataclass(frozen=True)
class RunFacts:
    """What every row of a run carries. ``checkpoints``: perspective -> id@sha256:hash."""

    run_id: str
    checkpoints: dict[str, str]
    preprocessing_hash: str
    code_version: str
    drop_columns: tuple[str, ...] = ()
    hash_columns: tuple[str, ...] = ()
    hash_key_print: str = ""  # of the driver's key, so that no worker hashes with another one, or with none

    @classmethod
    def of(cls, config: JobConfig, identity: ScorerIdentity, run_id: str, code_version: str) -> RunFacts:
        """The facts of a run."""
        checkpoints = {str(perspective): value for perspective, value in identity.checkpoints.items()}
        return cls(
            run_id,
            checkpoints,
            identity.preprocessing_hash,
            code_version,
            config.drop_columns,
            config.hash_columns,
            key_print(hash_key()),
        )


class ScoreBatch:
    """Scores prepared rows through a backend and gives them their final form, of ``FACTS_SCHEMA``.

    Raises ``SystemicFailureError`` when the first rows of the night say that this is an outage.
    """

    def __init__(self, plan: ScoringPlan, facts: RunFacts, progress: Any) -> None:
        self._backend: Backend = plan.connect()
        self._facts = facts
        self._progress = progress
        self._hash_key = check_hash_key(facts)

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        rows = table.to_pylist()
        sound = [row for row in rows if row["error_code"] is None]
        records = self._backend.score([_prepared(row) for row in sound]) if sound else []
        by_row = dict(zip((id(row) for row in sound), records, strict=True))
        finished = [finish(row, by_row.get(id(row)), self._facts) for row in rows]
        for row in finished:
            hide(row, self._facts, self._hash_key)
        self._progress.stage.remote("score", len(sound), time.perf_counter() - started, 0)
        stop = ray.get(self._progress.rows.remote([row["error_code"] for row in finished]))
        if stop:
            raise SystemicFailureError(stop)
        return pa.Table.from_pylist(finished, FACTS_SCHEMA)


def finish(row: dict[str, Any], record: ScoreRecord | None, facts: RunFacts) -> dict[str, Any]:
    """Adds rewards and the facts of the run. ``record``: None for a row that failed before it could be scored."""
    if record is not None and record.error is not None:
        set_error(row, record.error)
    is_scored = record is not None and record.error is None
    rewards = record.rewards if record is not None and is_scored else {}
    vectors = record.reward_vectors if record is not None and is_scored else {}
    for perspective in PERSPECTIVES:
        row[f"reward_{perspective}"] = rewards.get(perspective)
        row[f"reward_{perspective}_vector"] = vectors.get(perspective)
        row[f"checkpoint_{perspective}"] = facts.checkpoints.get(perspective)
    row["not_scored"] = [str(p) for p in PERSPECTIVES if p not in rewards and p not in vectors]
    row["status"] = STATUS_SCORED if row["error_code"] is None else STATUS_ERROR
    row["preprocessing_hash"] = facts.preprocessing_hash
    row["code_version"] = facts.code_version
    row["run_id"] = facts.run_id
    row["scored_at"] = datetime.now(UTC)
    return row


def hash_key() -> bytes:
    """The key of ``--hash-columns`` in this process's environment; empty when there is none."""
    return os.environ.get(HASH_KEY_VARIABLE, "").encode()


def check_hash_key(facts: RunFacts) -> bytes:
    """This process's key. Raises ``ConfigError`` when columns are to be hashed and it is not the driver's."""
    key = hash_key()
    if facts.hash_columns and key_print(key) != facts.hash_key_print:
        raise ConfigError(f"{HASH_KEY_VARIABLE} of a worker is not that of the driver; set it where Ray is started")
    return key


def key_print(key: bytes) -> str:
    """A fingerprint that tells keys apart and gives none away."""
    return hmac.new(key, b"assay hash key", hashlib.sha256).hexdigest()[:16]


def hide(row: dict[str, Any], facts: RunFacts, key: bytes) -> None:
    """Empties or hashes the columns that must stay out of the output; equal values have equal hashes under one key."""
    if row["error_stage"] == Stage.FETCH and "image_uri" in facts.drop_columns + facts.hash_columns:
        # Messages of this stage name the URI, which is what must stay out (it may even be a signed one).
        row["error_message"] = f"{row['error_code']}; the details name image_uri, which is kept out of the output"
    for name in facts.drop_columns:
        row[name] = None
    for name in facts.hash_columns:
        if row[name] is not None:
            row[name] = hmac.new(key, row[name].encode(), hashlib.sha256).hexdigest()


def set_error(row: dict[str, Any], error: InputError | RowError) -> None:
    """Makes the row a dead letter."""
    row["error_code"] = error.code.value
    row["error_stage"] = error.stage.value
    row["error_message"] = error.message


def _prepared(row: dict[str, Any]) -> tuple[str, bytes]:
    return row["generation_id"], row["prepared"]


def _bare_image(data: bytes | None) -> ImageInfo | None:
    """Hash and size are known as soon as there are bytes, whether or not they decode."""
    return None if data is None else ImageInfo(hashlib.sha256(data).hexdigest(), len(data))


def _set_image(row: dict[str, Any], image: ImageInfo | None) -> None:
    row["image_sha256"] = image.sha256 if image else None
    row["image_size"] = image.size_bytes if image else None
    row["image_width"] = image.width if image else None
    row["image_height"] = image.height if image else None
    row["image_format"] = image.format if image else None
