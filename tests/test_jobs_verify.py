"""What verify finds, and what it rightly lets pass."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from jobs import manifest as manifests
from jobs.lock import NightLock
from jobs.manifest import InputObject, Reading
from jobs.parquet import PUBLISHED_SCHEMA
from jobs.publish import ContentHash
from jobs.rejudge import rejudge
from jobs.verify import VerificationError, verify_night
from model.errors import ConfigError
from model.perspectives import PERSPECTIVES
from model.storage import head
from tests.job_helpers import NIGHT, policy, write_jsonl, write_staged
from tests.publish_helpers import make_log, publish, publish_night, row_of, rows_of

FIELDS = ("generation_id", "created_at", "prompt", "image_uri", "image", "generator", "generator_version")


@pytest.fixture
def log(tmp_path):
    return make_log(tmp_path)


@pytest.fixture
def night(tmp_path, log):
    return publish_night(tmp_path, log)


def test_a_sound_night_is_verified(night):
    assert verify_night(str(night[0]), NIGHT).rows == 10


def forge(output, manifest, change=lambda rows: None, schema=PUBLISHED_SCHEMA, **fields):
    """Publishes version 2 with changed rows; sizes and hashes of the files agree with its manifest."""
    files = []
    for file in manifest.files:
        path = output / file.path
        rows = pq.read_table(path).to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
        data = path.read_bytes()
        update = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": len(rows)}
        files.append(file.model_copy(update=update))
    forged = manifest.model_copy(update={"files": tuple(files), "version": 2} | fields)
    manifests.write(str(output), forged)
    return forged


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
        (lambda rows: rows[4].update(policy_id="else"), "policy_id is 'else', the manifest says 'p'"),
        (lambda rows: rows[4].update(policy_hash="else"), "policy_hash is 'else'"),
        (lambda rows: rows[4].update(preprocessing_hash="else"), "preprocessing_hash is 'else'"),
        (lambda rows: rows[4].update(checkpoint_overall=None), "checkpoint_overall is None"),
        (lambda rows: rows[4].update(source_version="else"), "source_version is 'else'"),
        (lambda rows: rows[4].update(verdict="maybe"), "verdict 'maybe'"),
        (lambda rows: rows[4].update(severity=None), "with severity None"),
        (lambda rows: rows[4].update(reward_safety=float("nan")), "safety reward is not finite"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, log, change, message):
    """A file and its manifest entry agree, but the rows are wrong: verify looks inside."""
    staged = write_staged(tmp_path / "s.parquet", [row for row in rows_of(log) if row["source_row"] != 3])
    output = tmp_path / "out"
    manifest, _ = publish(output, log, [[staged]], rows=9)
    forge(output, manifest, change)
    with pytest.raises(VerificationError, match=message):
        verify_night(str(output), NIGHT)


def test_expired_logs_can_be_left_out(night, log):
    Path(log.uri).unlink()
    assert verify_night(str(night[0]), NIGHT, check_inputs=False).rows == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows_by_verdict": {"block": 10}}, "rows by verdict: the files give"),
        ({"policy_id": "else"}, "policy_id is 'p', the manifest says 'else'"),
        ({"policy_hash": "else"}, "policy_hash is"),
        ({"preprocessing_hash": "else"}, "preprocessing_hash is"),
        ({"checkpoints": {}}, "checkpoint_alignment is 'c@sha256:.*', the manifest says None"),
        ({"schema_version": "1.9"}, "has schema version '1.0', the manifest says '1.9'"),
    ],
)
def test_a_manifest_that_does_not_fit_its_rows_is_named(night, fields, message):
    output, manifest = night
    manifests.write(str(output), manifest.model_copy(update={"version": 2} | fields))
    with pytest.raises(VerificationError, match=message):
        verify_night(str(output), NIGHT)


def test_a_retried_and_then_rejudged_night_is_verified(night, tmp_path, log):
    output, manifest = night
    retried = row_of(log, 3, 9.0, run_id="run-2", code_version="1")
    kept = [str(output / file.path) for file in manifest.files]
    sources = [[write_staged(tmp_path / "r.parquet", [retried])], kept]
    again, _ = publish(output, log, sources, version=2, reason="retried")
    assert verify_night(str(output), NIGHT).rows_by_status == {"scored": 10}
    with NightLock(str(output), NIGHT, "r", lambda line: None, lambda: None) as lock:
        rejudge(str(output), again, policy(3.0, "q"), "20261121T000000Z-x", 1000, lock, lambda _: None)
    assert verify_night(str(output), NIGHT, policy=policy(3.0, "q")).version == 3


def test_verdicts_are_given_again_when_the_policy_is_at_hand(night):
    output, manifest = night
    assert verify_night(str(output), NIGHT, policy=policy()).rows == 10

    def swap(rows):
        for row in rows:
            if row["verdict"] == "allow":
                row |= {"verdict": "review", "severity": "medium"}

    rows = [row for file in manifest.files for row in pq.read_table(output / file.path).to_pylist()]
    swap(rows)
    digest = ContentHash()
    digest.add(rows)
    verdicts = {"review": 9, "none": 1}
    forge(output, manifest, swap, content_sha256=digest.hexdigest(), rows_by_verdict=verdicts)
    assert verify_night(str(output), NIGHT).version == 2  # nothing but the policy can tell
    with pytest.raises(VerificationError, match="verdict is 'review', the policy says 'allow'"):
        verify_night(str(output), NIGHT, policy=policy())


def test_another_policy_than_that_of_the_night_verifies_nothing(night, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"judged by policy p .* the given one is q "):
        verify_night(str(night[0]), NIGHT, policy=policy(1.0, "q"))
    arguments = ["verify", "--output", str(night[0]), "--date", str(NIGHT), "--policy", str(tmp_path / "none.yaml")]
    assert cli.main(arguments) == 2
    assert "none.yaml" in capsys.readouterr().err


def night_of_log(tmp_path, lines, rows, *, is_partitioned=True, is_unreadable=False, reading=True):
    """A night of ten published rows, whatever the log holds: only the counts of the manifest are told of it."""
    file = write_jsonl(tmp_path / "logs/a.jsonl", lines)
    if is_unreadable:
        (tmp_path / "logs/a.jsonl").rename(tmp_path / "logs/a.parquet")
        file = head(str(tmp_path / "logs/a.parquet"))
    log = head(file.uri)
    columns = dict(zip(FIELDS, FIELDS, strict=True)) | {"created_at": "time"}
    how = Reading(columns=columns, is_partitioned=is_partitioned, max_line_bytes=1000) if reading else None
    staged = write_staged(tmp_path / "s.parquet", [row_of(log, i, 1.0) for i in range(rows)])
    inputs = (InputObject(uri=log.uri, version=log.version, rows=rows, is_unreadable=is_unreadable),)
    publish(tmp_path / "out", log, [[staged]], rows=rows, inputs=inputs, reading=how)
    return str(tmp_path / "out")


def test_the_rows_of_the_logs_are_counted_again(tmp_path):
    lines = [{"generation_id": str(i)} for i in range(9)] + ["not JSON"]
    assert verify_night(night_of_log(tmp_path, lines, rows=10), NIGHT).rows == 10


def test_rows_that_were_never_published_are_missed(tmp_path):
    output = night_of_log(tmp_path, [{"generation_id": str(i)} for i in range(500)], rows=10)
    with pytest.raises(VerificationError, match=r"a\.jsonl holds 500 rows of the night, the manifest says 10 rows"):
        verify_night(output, NIGHT)
    assert verify_night(output, NIGHT, check_inputs=False).rows == 10


def test_rows_of_other_nights_are_not_counted(tmp_path):
    noon = datetime(2026, 11, 20, 12, tzinfo=UTC)
    times = [noon, noon - timedelta(days=1), noon + timedelta(days=1), None, "no time"]
    lines = [{"generation_id": "x", "time": str(time) if time else None} for time in times]
    # Noon, and the two rows without a usable time.
    assert verify_night(night_of_log(tmp_path, lines, rows=3, is_partitioned=False), NIGHT).rows == 3


def test_an_unreadable_log_is_one_row(tmp_path):
    assert verify_night(night_of_log(tmp_path, ["x"] * 5, rows=1, is_unreadable=True), NIGHT).rows == 1


def test_a_log_that_became_unreadable_is_named(tmp_path):
    output = night_of_log(tmp_path, ["x"], rows=1, is_unreadable=True)
    path = next(Path(output).rglob("00000001.json"))
    text = json.loads(path.read_text())
    text["inputs"][0]["is_unreadable"] = False
    path.write_text(json.dumps(text))
    with pytest.raises(VerificationError, match="holds no readable row, the manifest says 1 rows"):
        verify_night(output, NIGHT)


def test_a_manifest_from_before_reading_was_recorded_is_read(tmp_path):
    output = night_of_log(tmp_path, ["{}"] * 7, rows=3, reading=False)
    path = next(Path(output).rglob("00000001.json"))
    text = json.loads(path.read_text())
    del text["reading"]
    path.write_text(json.dumps(text))
    assert verify_night(output, NIGHT).rows == 3


def _hash(rows, schema):
    digest = ContentHash(schema.names)
    digest.add([{name: row.get(name) for name in schema.names} for row in rows])
    return digest.hexdigest()


def _republished(night, schema, version):
    output, manifest = night
    rows = [row for file in manifest.files for row in pq.read_table(output / file.path).to_pylist()]
    schema = schema.with_metadata({"assay.schema_version": version})
    forge(output, manifest, schema=schema, schema_version=version, content_sha256=_hash(rows, schema))
    return str(output)


def test_a_night_of_an_older_minor_schema_is_verified(night, monkeypatch):
    monkeypatch.setattr("jobs.verify.SCHEMA_VERSION", "1.5")  # so 1.4 had no image_format yet
    index = PUBLISHED_SCHEMA.get_field_index("image_format")
    output = _republished(night, PUBLISHED_SCHEMA.remove(index), "1.4")
    assert verify_night(output, NIGHT).schema_version == "1.4"


def test_a_night_of_a_newer_minor_schema_is_verified(night):
    output = _republished(night, PUBLISHED_SCHEMA.insert(3, pa.field("tag", pa.string())), "1.7")
    assert verify_night(output, NIGHT).schema_version == "1.7"


def test_a_column_of_a_type_that_is_not_known_yet_cannot_be_verified(night):
    output = _republished(night, PUBLISHED_SCHEMA.append(pa.field("tag", pa.bool_())), "1.7")
    with pytest.raises(ConfigError, match=r"column tag of schema 1\.7 is newer than this code"):
        verify_night(output, NIGHT)


def test_another_major_schema_is_refused(night):
    output = _republished(night, PUBLISHED_SCHEMA, "2.0")
    with pytest.raises(ConfigError, match=r"has schema 2\.0, and this code reads 1\.\d+; use the Assay"):
        verify_night(output, NIGHT)


@pytest.mark.parametrize("name", ["image_format", "row_key"])
def test_a_lost_column_of_this_schema_is_named(night, name):
    schema = PUBLISHED_SCHEMA.remove(PUBLISHED_SCHEMA.get_field_index(name))
    with pytest.raises(VerificationError, match=f"lacks column {name}"):
        verify_night(_republished(night, schema, "1.0"), NIGHT)


def test_a_column_that_this_schema_does_not_have_is_named(night):
    output = _republished(night, PUBLISHED_SCHEMA.append(pa.field("tag", pa.string())), "1.0")
    with pytest.raises(VerificationError, match=r"column tag is not one of schema 1\.0"):
        verify_night(output, NIGHT)
