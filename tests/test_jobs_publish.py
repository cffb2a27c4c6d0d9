"""Staged rows -> published night; and what verify, query, rejudge and gc make of it."""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import manifest as manifests
from jobs.garbage import collect
from jobs.lock import NightLock
from jobs.manifest import InputObject, Manifest
from jobs.parquet import PUBLISHED_SCHEMA
from jobs.publish import Target, check_rows, write_content
from jobs.query import as_text, dead_letters, run_query
from jobs.rejudge import content_fields, rejudge
from jobs.verify import VerificationError, verify_night
from model.errors import ConfigError, InfrastructureError
from model.perspectives import PERSPECTIVES
from model.schema import COLUMNS, SCHEMA_VERSION
from model.storage import head
from tests.job_helpers import CHECKPOINT, NIGHT, policy, staged_row, write_staged


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "logs/a.parquet"
    path.parent.mkdir()
    path.write_bytes(b"whatever: only its version counts here")
    return head(str(path))


def rows_of(log, count=10, **changes):
    # Rewards -5 … 4, and row 3 is a dead letter.
    return [staged_row(log.uri, log.version, i, None if i == 3 else i - 5.0, **changes) for i in range(count)]


def publish(output, log, sources, version=1, rows_per_part=1000, rows=10, **fields):
    target = Target(str(output), NIGHT, "k" * 16, version, f"20261120T000000Z-{version:08d}", rows_per_part, {})
    content = write_content(sources, target, policy())
    check_rows(content, rows)
    manifest = Manifest(
        date=NIGHT, version=version, previous_version=version - 1 or None, reason="scored", run_key="k" * 16,
        run_id=target.run_id, published_at=datetime.now(UTC), via="pool",
        inputs=(InputObject(uri=log.uri, version=log.version, rows=rows),), schema_version=SCHEMA_VERSION,
        checkpoints=dict.fromkeys(PERSPECTIVES, CHECKPOINT), preprocessing_hash="p", policy_id="p",
        policy_hash=policy().content_hash, code_version="0", is_trained=False, **content_fields(content), **fields,
    )  # fmt: skip
    manifests.write(str(output), manifest)
    return manifest, content


@pytest.fixture
def night(tmp_path, log):
    staged = write_staged(tmp_path / "staged.parquet", rows_of(log))
    output = tmp_path / "out"
    manifest, _ = publish(output, log, [[staged]], rows_per_part=4)
    return output, manifest


def test_every_row_once_sorted_judged_and_cut_into_parts(night, log):
    output, manifest = night
    assert [file.rows for file in manifest.files] == [4, 4, 2]
    rows = [row for file in manifest.files for row in pq.read_table(output / file.path).to_pylist()]
    assert [row["row_key"] for row in rows] == sorted(row["row_key"] for row in rows)
    verdicts = {row["source_row"]: (row["verdict"], row["severity"], row["flags"]) for row in rows}
    assert verdicts[0] == ("review", "medium", ["safety"])  # reward -5 < 0
    assert verdicts[5] == ("allow", "none", [])  # reward 0 is not below 0
    assert verdicts[3] == (None, None, [])  # a dead letter is never "allow"
    assert manifest.rows_by_status == {"scored": 9, "error": 1}
    assert manifest.rows_by_verdict == {"review": 4, "allow": 5, "none": 1}
    assert manifest.error_share == pytest.approx(0.1)


def test_files_say_what_they_are(night):
    output, manifest = night
    parquet = pq.ParquetFile(output / manifest.files[0].path)
    assert parquet.schema_arrow.metadata[b"assay.schema_version"] == SCHEMA_VERSION.encode()
    assert parquet.schema_arrow.names == [column.name for column in COLUMNS]
    assert parquet.schema_arrow.field("reward_safety").metadata[b"unit"]
    column = parquet.metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
    assert column.is_stats_set


def test_rows_staged_twice_are_published_once(tmp_path, log):
    rows = rows_of(log)
    first = write_staged(tmp_path / "1.parquet", rows)
    again = write_staged(tmp_path / "2.parquet", rows[2:5])
    _, content = publish(tmp_path / "out", log, [[first, again]])
    assert (content.rows, content.repeated) == (10, 3)


def test_retried_rows_replace_old_ones(tmp_path, log):
    old = write_staged(tmp_path / "1.parquet", rows_of(log))
    new = write_staged(tmp_path / "2.parquet", [staged_row(log.uri, log.version, 3, 9.0)])
    manifest, _ = publish(tmp_path / "out", log, [[new], [old]])
    assert manifest.rows_by_status == {"scored": 10}


def test_a_lost_row_stops_the_publication(tmp_path, log):
    staged = write_staged(tmp_path / "1.parquet", rows_of(log)[1:])
    with pytest.raises(InfrastructureError, match=r"hold 10 rows .* 9 were staged"):
        publish(tmp_path / "out", log, [[staged]])
    assert manifests.latest(str(tmp_path / "out"), NIGHT) is None


def test_the_content_hash_ignores_run_and_time_only(tmp_path, log):
    hashes = []
    variants = [{}, {"run_id": "other", "scored_at": datetime(2030, 1, 1, tzinfo=UTC)}, {"prompt": "else"}]
    for number, changes in enumerate(variants):
        staged = write_staged(tmp_path / f"{number}.parquet", rows_of(log, **changes))
        hashes.append(publish(tmp_path / f"out{number}", log, [[staged]])[0].content_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_version_is_published_once(night, tmp_path, log):
    output, _ = night
    with pytest.raises(InfrastructureError, match="published by another run"):
        publish(output, log, [[write_staged(tmp_path / "x.parquet", rows_of(log))]])


def test_a_sound_night_is_verified(night):
    assert verify_night(str(night[0]), NIGHT).rows == 10


def _rewrite(path, change):
    rows = pq.read_table(path).to_pylist()
    change(rows)
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows, PUBLISHED_SCHEMA), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, log: path.unlink(), "missing"),
        (lambda path, log: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda path, log: path.write_bytes(path.read_bytes()[:-1] + b"\0"), "sha256"),
        (lambda path, log: os.utime(log.uri, (0, 0)), "the night was scored from"),
        (lambda path, log: Path(log.uri).unlink(), "is gone"),
    ],
)
def test_damage_is_named(night, log, damage, message):
    output, manifest = night
    damage(output / manifest.files[1].path, log)
    with pytest.raises(VerificationError, match=message):
        verify_night(str(output), NIGHT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.__setitem__(0, {**rows[0], "reward_safety": 99.0}), "content hash"),
        (lambda rows: rows.reverse(), "out of order"),
        (lambda rows: rows.__setitem__(1, rows[0]), "repeated"),
        (lambda rows: rows[0].update(source_row=77), "key is not that of row 77"),
        (lambda rows: rows[0].update(source_file="s3://else/x"), "is no input"),
        (lambda rows: rows[0].update(status="error", error_code="nonsense"), "known code"),
        (lambda rows: rows[0].update({f"reward_{p}": None for p in PERSPECTIVES}), "does not fit"),
        (lambda rows: rows.pop(), "rows"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, log, change, message):
    """A file and its manifest entry agree, but the rows are wrong: verify looks inside."""
    staged = write_staged(tmp_path / "s.parquet", [row for row in rows_of(log) if row["source_row"] != 3])
    output = tmp_path / "out"
    manifest, _ = publish(output, log, [[staged]], rows=9)
    path = output / manifest.files[0].path
    _rewrite(path, change)
    import hashlib

    data = path.read_bytes()
    count = pq.ParquetFile(path).metadata.num_rows
    update = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": count}
    file = manifest.files[0].model_copy(update=update)
    forged = manifest.model_copy(update={"files": (file,), "version": 2})
    manifests.write(str(output), forged)
    with pytest.raises(VerificationError, match=message):
        verify_night(str(output), NIGHT)


def test_expired_logs_can_be_left_out(night, log):
    Path(log.uri).unlink()
    assert verify_night(str(night[0]), NIGHT, check_inputs=False).rows == 10


def test_query_reads_the_newest_version_only(night, tmp_path, log):
    output, _ = night
    changed = [staged_row(log.uri, log.version, i, 100.0) for i in range(10)]
    publish(output, log, [[write_staged(tmp_path / "x.parquet", changed)]], version=2)
    table = run_query(str(output), "SELECT dt, count(*) AS n, min(reward_safety) AS low FROM scores GROUP BY dt")
    assert table.to_pylist() == [{"dt": NIGHT, "n": 10, "low": 100.0}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT nothing FROM scores",
        "not sql",
        "SELECT * FROM read_text('/etc/passwd')",
        "COPY scores TO '/tmp/assay-x.csv'",
    ],
)
def test_bad_or_reaching_queries_are_refused(night, sql):
    with pytest.raises(ConfigError, match="query failed"):
        run_query(str(night[0]), sql)


def test_query_without_a_night(tmp_path):
    with pytest.raises(ConfigError, match="no manifest of any night"):
        run_query(str(tmp_path), "SELECT 1")


def test_text_tables_are_safe_to_print(night):
    table = run_query(str(night[0]), "SELECT 'a' || chr(27) || '[31m' || chr(10) AS x, repeat('y', 99) AS long")
    assert "\x1b" not in as_text(table)
    assert "\N{HORIZONTAL ELLIPSIS}" in as_text(table)
    assert len(as_text(table).splitlines()) == 3


def test_dead_letters_to_retry(night, log):
    output, manifest = night
    assert dead_letters(str(output), manifest) == {log.uri: frozenset({3})}


def test_another_policy_rejudges_without_touching_a_reward(night):
    output, manifest = night
    lock = NightLock(str(output), NIGHT, "r", lambda line: None, lambda: None)
    with lock:
        again = rejudge(
            str(output), manifest, policy(3.0, "stricter"), "20261121T000000Z-rejudged", 1000, lock, lambda _: None
        )
    assert (again.version, again.reason, again.policy_id) == (2, "rejudged", "stricter")
    # Rewards -5 … 4 without -2 (the dead letter): 7 of them are below 3.
    assert again.rows_by_verdict == {"review": 7, "allow": 2, "none": 1}
    verify_night(str(output), NIGHT)
    before = [pq.read_table(output / file.path) for file in manifest.files]
    after = pq.read_table(output / again.files[0].path)
    import pyarrow as pa

    assert pa.concat_tables(before)["reward_safety"].to_pylist() == after["reward_safety"].to_pylist()


def test_a_policy_for_other_weights_is_refused(night):
    output, manifest = night
    lock = NightLock(str(output), NIGHT, "r", lambda line: None, lambda: None)
    other = policy(checkpoint="c@sha256:" + "1" * 64)
    with lock, pytest.raises(ConfigError, match="1111"):
        rejudge(str(output), manifest, other, "run", 1000, lock, lambda _: None)


def test_gc_removes_what_no_newest_manifest_names_and_only_when_old(night, tmp_path, log):
    output, first = night
    second, _ = publish(output, log, [[write_staged(tmp_path / "x.parquet", rows_of(log))]], version=2)
    stray = output / "staging/dead/shard-00000/x.parquet"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    assert collect(str(output), lambda _: None).objects == 0  # all of it is young
    old = time.time() - 8 * 86_400
    for path in output.rglob("*"):
        os.utime(path, (old, old))
    said: list[str] = []
    assert collect(str(output), said.append, dry_run=True).objects == 4
    assert stray.exists()
    assert collect(str(output), said.append).objects == 4  # the three parts of version 1, and the stray
    assert Counter(path.exists() for path in [output / file.path for file in first.files]) == {False: 3}
    assert not stray.exists()
    assert verify_night(str(output), NIGHT).version == second.version
