"""The nightly job on real parts: Ray, S3, Serve, Parquet; killed, repeated, retried and re-judged."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import boto3
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import manifest as manifests
from jobs.demo_data import write_demo_night
from jobs.query import run_query
from jobs.verify import verify_night
from model import storage
from model.perspectives import PERSPECTIVES
from model.schema import RUN_COLUMNS, Generation
from model.scorer import load, read_identity
from tests.job_helpers import NIGHT, NOON

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "night"
ROWS = 60
# Its other metadata columns.
DIFFUSION_DB = {"user_name": "u", "seed": 1, "step": 50, "cfg": 7.0, "sampler": 8, "width": 512, "height": 512}
REWARDS = [f"reward_{perspective}" for perspective in PERSPECTIVES]


@pytest.fixture(scope="module")
def environment(stack):
    """This process reaches the stack's S3 and Ray as its jobs do."""
    before = dict(os.environ)
    os.environ.update(stack.env)
    boto3.Session().client("s3").create_bucket(Bucket=BUCKET)
    yield stack
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def demo(environment):
    return write_demo_night(f"s3://{BUCKET}/logs", f"s3://{BUCKET}/images", NIGHT, ROWS)


@pytest.fixture(scope="module")
def published(environment, demo):
    """The night, scored once through the real command and Serve; the output other tests compare with."""
    output = f"s3://{BUCKET}/scored"
    command = ["python", "jobs/score_logs.py", *arguments(output), "--max-error-rate", "0.9"]
    lines: list[str] = []
    assert environment.submit(command, on_line=lines.append) == 0, "\n".join(lines)
    return output


def arguments(output, logs=f"s3://{BUCKET}/logs", **flags):
    flags = {"config": "infra/job.yaml", **flags}
    base = ["--date", str(NIGHT), "--input", str(logs), "--output", output]
    return base + [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def start(*args):
    """The job as a process of its own, in the environment of the stack."""
    command = [sys.executable, "-m", "jobs.score_logs", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*args):
    process = start(*args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def rows(output, night=NIGHT):
    manifest = manifests.latest(output, night)
    files = [storage.join(output, file.path) for file in manifest.files]
    tables = []
    for uri in files:
        filesystem, path = storage.arrow_filesystem(uri)
        tables.append(pq.read_table(path, filesystem=filesystem, partitioning=None))
    return pa.concat_tables(tables).to_pylist()


def assert_same_rows(left, right, tolerance=1e-5):
    """Equal but for run id, times and the last digits of rewards."""
    assert [row["row_key"] for row in left] == [row["row_key"] for row in right]
    for one, other in zip(left, right, strict=True):
        for name in one.keys() - set(RUN_COLUMNS) - set(REWARDS):
            assert one[name] == other[name], (name, one["row_key"])
        for name in REWARDS:
            if one[name] is None or other[name] is None:
                assert one[name] == other[name]
            else:
                assert abs(one[name] - other[name]) <= tolerance


def test_every_row_is_published_once_with_the_outcome_it_was_made_for(published, demo):
    manifest = verify_night(published, NIGHT)
    table = rows(published)
    assert len(table) == len({row["row_key"] for row in table}) == demo.row_count == manifest.rows
    by_place = {(row["source_file"], row["source_row"]): row for row in table}
    for hard in demo.hard_rows:
        row = by_place.pop((hard.source_file, hard.source_row))
        assert row["error_code"] == hard.expected_error_code, hard.kind
        assert (row["verdict"] is None) == (hard.expected_error_code is not None), hard.kind
    assert {row["status"] for row in by_place.values()} == {"scored"}  # no hard row cost another one
    assert manifest.via == "serve"
    assert manifest.is_trained


def test_a_dead_letter_says_what_is_wrong_and_has_no_verdict(published):
    dead = [row for row in rows(published) if row["status"] == "error"]
    assert dead
    for row in dead:
        assert row["error_code"]
        assert row["error_stage"]
        assert len(row["error_message"]) > 15
        assert [row[name] for name in REWARDS] == [None] * 4
        assert (row["verdict"], row["severity"]) == (None, None)
        assert row["not_scored"] == [str(perspective) for perspective in PERSPECTIVES]


def test_rewards_are_those_of_the_scorer_and_each_row_says_where_they_come_from(published, demo):
    sample = [row for row in rows(published) if row["status"] == "scored" and row["image_uri"]][:8]
    assert len(sample) == 8
    scorer = load("demo")
    identity = read_identity("demo")
    for row in sample:
        image = storage.get(row["image_uri"])
        (record,) = scorer.score([Generation("x", row["prompt"], image)])
        for perspective in PERSPECTIVES:
            assert row[f"reward_{perspective}"] == pytest.approx(record.rewards[perspective], abs=1e-5)
            assert row[f"checkpoint_{perspective}"] == identity.checkpoints[perspective]
        assert row["image_sha256"] == record.image.sha256
        assert (row["image_width"], row["image_height"]) == (record.image.width, record.image.height)
        assert row["preprocessing_hash"] == identity.preprocessing_hash
        assert json.loads(row["extras"])["steps"] > 0


def test_a_report_lies_beside_the_parquet(published):
    manifest = manifests.latest(published, NIGHT)
    report = json.loads(
        storage.get(storage.join(published, f"scores/dt={NIGHT}/run={manifest.run_key}/_report-00000001.json"))
    )
    assert report["night"]["rows"] == manifest.rows == report["this_run"]["rows"]
    assert set(report["this_run"]["stages"]) == {"fetch", "prepare", "score"}
    assert report["this_run"]["rows_per_s"] > 0
    assert report["bytes_fetched"] > 0


def test_running_a_finished_night_again_changes_nothing(published, demo):
    before = {entry.uri: entry.version for entry in storage.list_objects(published) if "/locks/" not in entry.uri}
    code, out, _ = run(*arguments(published, max_error_rate=0.9))
    assert code == 0
    assert "nothing to do" in out
    after = {entry.uri: entry.version for entry in storage.list_objects(published) if "/locks/" not in entry.uri}
    assert before == after


def test_too_many_dead_letters_are_exit_code_3_and_published(published):
    code, _, err = run(*arguments(published, max_error_rate=0.01))
    assert code == 3
    assert "dead letters" in err


def test_the_pool_gives_the_rewards_of_serve(published, demo):
    output = f"s3://{BUCKET}/pool"
    code, out, err = run(*arguments(output, via="pool", max_error_rate=0.9))
    assert code == 0, err
    assert "scoring via pool" in out
    pooled, served = rows(output), rows(published)
    assert_same_rows(pooled, served)
    scored = [row for row in pooled if row["status"] == "scored"]
    assert len({(row["image_width"], row["image_height"]) for row in scored}) >= 3
    assert len({len(row["prompt"]) for row in scored}) >= 3
    for name in REWARDS:
        assert np.std([row[name] for row in scored]) > 0.01


def test_killed_and_started_again_the_night_is_that_of_an_undisturbed_run(published, demo, tmp_path):
    output = f"s3://{BUCKET}/killed"
    # In two shards, so that a resumed run also meets one that has not begun.
    config = tmp_path / "job.yaml"
    config.write_text("rows_per_shard: 60\nrows_per_block: 8\nmax_error_rate: 0.9\n")
    flags = arguments(output, config=config)
    before = job_items_scored()
    blocks = -(-demo.row_count // 8)
    with start(*flags) as process:
        try:
            _wait_for(f"{output}/locks", at_least=1)
            # While the first holds the night, a second run is refused at once and told by whom.
            code, _, err = run(*flags)
            assert code == 2
            assert f"pid {process.pid}" in err
            committed = _wait_for(f"{output}/checkpoints", at_least=2)
        finally:
            process.send_signal(signal.SIGKILL)
    assert 2 <= committed < blocks
    assert manifests.latest(output, NIGHT) is None
    code, out, err = run(*flags)
    assert code == 0, err
    assert "resuming" in out
    assert_same_rows(rows(output), rows(published))
    verify_night(output, NIGHT)
    resumed_by = manifests.latest(output, NIGHT).run_id
    scored = [row for row in rows(output) if row["status"] == "scored"]
    kept = sum(row["run_id"] != resumed_by for row in scored)
    twice = job_items_scored() - before - len(scored)
    print(f"{committed} of {blocks} blocks were committed at the kill; {kept} scored rows kept, {twice} scored twice")
    # A committed block is never scored again, and what was in flight at most once more.
    in_night = [row for row in rows(output) if row["run_id"] != resumed_by]
    assert len(in_night) >= 8 * (committed - 1)
    assert 0 <= twice <= len(scored) - kept


def job_items_scored():
    """What the replica has scored for jobs; asked from a process that began with the stack's token."""
    script = (
        "import ray; from ray import serve; ray.init(address='auto', log_to_driver=False);"
        "print(serve.get_deployment_handle('Replica', 'assay').counts.remote().result(timeout_s=30)['job'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout.split()[-1])


def _wait_for(folder, at_least):
    """Number of objects in the folder, as soon as there are enough; pending checkpoints are none."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = sum(".pending" not in entry.uri for entry in storage.list_if_any(folder))
        if found >= at_least:
            return found
        time.sleep(0.05)
    raise AssertionError(f"fewer than {at_least} objects in {folder} after 120 s")


def test_a_replica_killed_under_the_job_costs_no_row(published, demo):
    output = f"s3://{BUCKET}/replica"
    process = start(*arguments(output, max_error_rate=0.9, rows_per_block=8, via="serve"))
    _wait_for(f"{output}/checkpoints", at_least=1)
    replicas = [one for one in psutil.process_iter(["cmdline"]) if _is_replica(one)]
    assert replicas
    for replica in replicas:
        replica.kill()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_rows(rows(output), rows(published))


def _is_replica(process):
    return any("ServeReplica:assay:Replica" in part for part in process.info["cmdline"] or [])


def test_another_policy_rejudges_and_retry_scores_what_failed(environment, published, demo, tmp_path):
    output = f"s3://{BUCKET}/retry"
    logs, images = f"s3://{BUCKET}/retry-logs", f"s3://{BUCKET}/retry-images"
    night = write_demo_night(logs, images, NIGHT, 24, seed=5, with_hard_rows=False)
    victim = next(entry.uri for entry in storage.list_objects(images))
    data = storage.get(victim)
    storage.delete(victim)
    flags = {"max_error_rate": 0.9, "logs": logs}
    code, _, err = run(*arguments(output, **flags))
    assert code == 0, err
    first = rows(output)
    assert [row["error_code"] for row in first if row["status"] == "error"] == ["image_not_found"]

    strict = tmp_path / "strict.yaml"
    text = (ROOT / "infra/policies/default.yaml").read_text().replace("id: default", "id: strict")
    # Every threshold 100 higher: no reward of the demo checkpoint is above it.
    strict.write_text(re.sub(r"below: (-?[\d.]+)", lambda found: f"below: {float(found[1]) + 100}", text))
    code, out, err = run(*arguments(output, policy=strict, **flags))
    assert code == 0, err
    assert "no model is needed" in out
    second = rows(output)
    assert {row["policy_id"] for row in second} == {"strict"}
    assert {row["verdict"] for row in second if row["status"] == "scored"} == {"block"}
    assert [[row[name] for name in REWARDS] for row in first] == [[row[name] for name in REWARDS] for row in second]

    storage.put(victim, data)
    code, _, err = run(*arguments(output, **flags), "--retry-errors")
    assert code == 0, err
    third = rows(output)
    assert {row["status"] for row in third} == {"scored"}
    assert {row["policy_id"] for row in third} == {"default"}
    changed = [new["row_key"] for old, new in zip(first, third, strict=True) if old["run_id"] != new["run_id"]]
    assert len(changed) == 1
    assert verify_night(output, NIGHT).version == 3
    assert len(third) == night.row_count


def test_an_outage_publishes_nothing(environment, demo):
    output = f"s3://{BUCKET}/outage"
    logs = f"s3://{BUCKET}/outage-logs"
    write_demo_night(logs, f"s3://{BUCKET}/outage-images", NIGHT, 40, seed=6, with_hard_rows=False)
    images = {entry.uri: storage.get(entry.uri) for entry in storage.list_objects(f"s3://{BUCKET}/outage-images")}
    for uri in images:
        storage.delete(uri)
    code, _, err = run(*arguments(output, logs=logs, rows_per_block=8))
    assert code == 4
    assert "image_not_found" in err
    assert "outage" in err
    assert manifests.latest(output, NIGHT) is None
    # When it is over, nothing of it may be left: rows that failed then are scored now.
    for uri, data in images.items():
        storage.put(uri, data)
    code, _, err = run(*arguments(output, logs=logs, rows_per_block=8))
    assert code == 0, err
    assert {row["status"] for row in rows(output)} == {"scored"}


def test_killed_while_publishing_it_publishes_what_was_scored(published, demo):
    output = f"s3://{BUCKET}/publishing"
    flags = arguments(output, max_error_rate=0.9)
    with start(*flags) as process:
        for line in process.stdout:
            if line.startswith("publishing"):
                break
        process.send_signal(signal.SIGKILL)
    before = job_items_scored()
    code, out, err = run(*flags)
    assert code == 0, err
    assert "all rows were scored before" in out or "nothing to do" in out
    assert job_items_scored() == before
    assert_same_rows(rows(output), rows(published))
    verify_night(output, NIGHT)


def test_other_peoples_logs_through_a_column_mapping(environment, demo, tmp_path):
    """DiffusionDB's metadata columns, not partitioned, on local disk."""
    images, output = tmp_path / "images", str(tmp_path / "out")
    images.mkdir()
    source = [entry.uri for entry in storage.list_objects(f"s3://{BUCKET}/images") if "hard" not in entry.uri][:5]
    records = []
    for number, uri in enumerate(source):
        name = uri.rsplit("/", 1)[-1]
        (images / name).write_bytes(storage.get(uri))
        when = NOON + timedelta(days=0 if number < 3 else 1)
        records.append({**DIFFUSION_DB, "image_name": name, "prompt": f"p{number}", "timestamp": when})
    (tmp_path / "logs").mkdir()
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "logs/metadata.parquet")
    mapping = ["--map", "generation_id=image_name", "--map", "image_uri=image_name", "--map", "created_at=timestamp"]
    flags = arguments(output, logs=tmp_path / "logs", image_root=images, drop_columns="prompt")
    code, _, err = run(*flags, *mapping)
    assert code == 0, err
    table = rows(output)
    assert sorted(row["generation_id"] for row in table) == sorted(record["image_name"] for record in records[:3])
    assert {row["status"] for row in table} == {"scored"}
    assert {row["prompt"] for row in table} == {None}
    assert json.loads(table[0]["extras"])["sampler"] == 8
    assert run_query(output, "SELECT count(*) AS n FROM scores").to_pylist() == [{"n": 3}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logs": "s3://night/nowhere"}, "found nothing"),
        ({"logs": "s3://no-such-bucket/logs"}, "no such bucket: no-such-bucket"),
        ({"checkpoint": "demp"}, "demp"),
        ({"policy": "nowhere.yaml"}, "nowhere.yaml"),
        ({"scorer": "vp_score"}, "vp_score"),
        ({"date": "2026-11-01"}, "no logs for dt=2026-11-01"),
        ({"map": "prompt=caption"}, "no column 'caption'"),
        ({"output": "s3://no-such-bucket/x"}, "no such bucket: no-such-bucket"),
        ({"image_root": "/nowhere"}, "/nowhere"),
        ({"hash_columns": "prompt"}, "ASSAY_HASH_KEY"),
    ],
)
def test_wrong_arguments_end_at_once_with_code_2_in_one_line(demo, changes, message):
    logs = changes.pop("logs", f"s3://{BUCKET}/logs") if "logs" in changes else f"s3://{BUCKET}/logs"
    started = time.monotonic()
    code, _, err = run(*arguments(f"s3://{BUCKET}/none", logs=logs), *arguments_of(changes))
    assert code == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert time.monotonic() - started < 60


def test_a_cluster_that_is_too_small_is_refused_instead_of_waited_for(demo, tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("pool_num_gpus: 1\n")
    started = time.monotonic()
    code, _, err = run(*arguments(f"s3://{BUCKET}/small", config=config, via="pool"))
    assert code == 4
    assert "1 GPU do not fit" in err
    assert time.monotonic() - started < 60


def test_a_cluster_that_does_not_answer_is_an_error_soon(demo, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, _, err = run(*arguments(f"s3://{BUCKET}/lonely"))
    assert code == 4
    assert "no Ray cluster at RAY_ADDRESS=127.0.0.1:9" in err


def arguments_of(changes):
    return [part for name, value in changes.items() for part in (f"--{name.replace('_', '-')}", value)]
