"""What gc removes, and what it must not touch."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest

from jobs import cli
from jobs.garbage import collect
from jobs.lock import NightLock
from jobs.staging import Staging
from jobs.verify import verify_night
from model.errors import ConfigError
from tests.job_helpers import NIGHT, write_staged
from tests.publish_helpers import make_log, publish, publish_night, rows_of

DAY_S = 86_400


@pytest.fixture
def log(tmp_path):
    return make_log(tmp_path)


def removed(output, **options):
    said: list[str] = []
    collect(str(output), said.append, **options)
    return [line for line in said if line.startswith(("removing", "would remove"))]


def age(path, days):
    for file in [path] if path.is_file() else path.rglob("*"):
        os.utime(file, (time.time() - days * DAY_S,) * 2)


def put(path, days=30.0, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    age(path, days)
    return path


def put_lock(output, night="2026-11-20", number=1, minutes=0.0, is_released=False):
    content = json.dumps({"run_id": "r", "beat": 5, "is_released": is_released}).encode()
    return put(output / f"locks/dt={night}/{number:08d}.json", minutes / 1440, content)


def put_unit(output, key, *days):
    """Staged blocks with their checkpoints, of these ages, and the marker of their shard."""
    staging = Staging(str(output), key, 10, 1)
    folders = (staging.rows_uri(0), staging.checkpoint_uri(0))
    blocks = [
        put(output / f"{folder}/{number}.parquet", block_days)
        for number, block_days in enumerate(days)
        for folder in folders
    ]
    return [*blocks, put(output / f"{staging.rows_uri(0)}.done", max(days))]


def two_versions(tmp_path, log, days):
    """Version 2 took the place of version 1 so many days ago; all files are a month old."""
    publish_night(tmp_path, log)
    output = tmp_path / "out"
    staged = write_staged(tmp_path / "x.parquet", rows_of(log))
    published_at = datetime.now(UTC) - timedelta(days=days)
    publish(output, log, [[staged]], version=2, published_at=published_at)
    age(output, 30)
    return output


def test_the_newest_version_stays_and_the_one_before_it_goes(tmp_path, log):
    output = two_versions(tmp_path, log, days=8)
    assert len(removed(output, dry_run=True)) == 3
    assert len(list((output / "scores").rglob("*.parquet"))) == 4
    assert len(removed(output)) == 3
    assert verify_night(str(output), NIGHT).version == 2
    assert removed(output) == []


def test_a_superseded_part_is_kept_from_when_it_was_superseded(tmp_path, log):
    """Written a month ago, replaced yesterday: who reads the former version is not cut off."""
    output = two_versions(tmp_path, log, days=1)
    assert removed(output) == []
    assert len(removed(output, older_than_days=0.5)) == 3


def test_a_later_version_does_not_prolong_what_was_superseded_before(tmp_path, log):
    output = two_versions(tmp_path, log, days=8)
    staged = write_staged(tmp_path / "y.parquet", rows_of(log))
    publish(output, log, [[staged]], version=3)
    # Version 1 was replaced 8 days ago, version 2 just now.
    assert len(removed(output)) == 3


@pytest.mark.parametrize("spelling", ["./out", "out/", "../{folder}/out", "file://{path}/out"])
def test_the_root_may_be_spelt_in_any_way(tmp_path, log, monkeypatch, spelling):
    publish_night(tmp_path, log)
    age(tmp_path / "out", 30)
    monkeypatch.chdir(tmp_path)
    assert removed(spelling.format(folder=tmp_path.name, path=tmp_path)) == []


def test_a_run_that_can_be_resumed_is_one_unit(tmp_path):
    """Its oldest block is beyond the limit, its newest is not: without either the other is worth nothing."""
    kept = put_unit(tmp_path, "a" * 16, 30, 6.9)
    gone = put_unit(tmp_path, "b" * 16, 30, 7.1)
    removed(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


def test_the_record_of_a_unit_goes_before_its_rows(tmp_path):
    put_unit(tmp_path, "a" * 16, 30)
    names = [line.removeprefix(f"removing {tmp_path}/") for line in removed(tmp_path)]
    assert [name.split("/")[0] for name in names] == ["checkpoints", "staging", "staging"]
    assert [name.rsplit(".")[-1] for name in names] == ["parquet", "done", "parquet"]


def test_a_live_lock_keeps_its_night_and_all_unpublished_work(tmp_path, log):
    output = two_versions(tmp_path, log, days=8)
    unit = put_unit(output, "a" * 16, 30)
    put_lock(output, minutes=9)
    said: list[str] = []
    assert collect(str(output), said.append, older_than_days=0).objects == 0
    assert any("2026-11-20 is being worked on; nothing of it" in line for line in said)
    assert any("staged rows and checkpoints are left alone" in line for line in said)
    assert all(path.exists() for path in unit)


def test_the_live_lock_of_one_night_leaves_the_parts_of_another_to_gc(tmp_path, log):
    output = two_versions(tmp_path, log, days=8)
    unit = put_unit(output, "a" * 16, 30)
    put_lock(output, night="2026-11-21")
    assert len(removed(output)) == 3
    assert all(path.exists() for path in unit)


@pytest.mark.parametrize("lock", [{"minutes": 11}, {"is_released": True}])
def test_a_dead_or_released_lock_keeps_nothing(tmp_path, lock):
    unit = put_unit(tmp_path, "a" * 16, 30)
    newest = put_lock(tmp_path, number=2, **lock)
    older = put_lock(tmp_path, number=1, minutes=60 * 24 * 30)
    removed(tmp_path)
    assert not any(path.exists() for path in [*unit, older])
    assert newest.exists()  # its number is counted on


def test_a_lock_that_cannot_be_read_is_taken_for_live(tmp_path):
    unit = put_unit(tmp_path, "a" * 16, 30)
    put(tmp_path / "locks/dt=2026-11-20/00000001.json", 0, b"?")
    removed(tmp_path, older_than_days=0)
    assert all(path.exists() for path in unit)


def test_a_real_lock_is_seen(tmp_path):
    unit = put_unit(tmp_path, "a" * 16, 30)
    with NightLock(str(tmp_path), NIGHT, "r", lambda line: None, lambda: None):
        assert removed(tmp_path) == []
    assert len(removed(tmp_path)) == len(unit)


def test_a_run_that_begins_while_units_are_removed_keeps_the_rest(tmp_path):
    for key in "abc":
        put_unit(tmp_path, key * 16, 30)
    said: list[str] = []

    def say(line):
        if not said:
            put_lock(tmp_path)
        said.append(line)

    assert collect(str(tmp_path), say).objects == 3  # the first unit, which was being removed
    assert "left alone" in said[-1]


def test_a_night_that_is_published_while_gc_looks_loses_nothing(tmp_path, log, monkeypatch):
    """Listed before its manifest existed, and its run is gone when the locks are looked at: the limit is 0 days."""
    from jobs import manifest as manifests

    find = manifests.versions_by_night

    def slow(output):
        found = find(output)
        with NightLock(output, NIGHT, "r", lambda line: None, lambda: None):
            publish_night(tmp_path, log)
        return found

    stray = put(tmp_path / "out/scores/dt=2026-11-20/run=x/part-00000001-x-00000.parquet")
    monkeypatch.setattr("jobs.manifest.versions_by_night", slow)
    assert removed(tmp_path / "out", older_than_days=0) == []
    assert stray.exists()


def test_files_that_a_killed_write_left_are_removed(tmp_path, log):
    publish_night(tmp_path, log)
    output = tmp_path / "out"
    age(output, 30)
    names = [
        "manifests/dt=2026-11-20/.tmp-1-ab-00000002.json",
        "scores/dt=2026-11-20/run=x/.tmp-1-ab-_report-00000001.json",
        "locks/dt=2026-11-20/.tmp-1-ab-00000001.json",
        f"staging/{'a' * 16}/.tmp-1-ab-run.json",
    ]
    old = [put(output / name) for name in names]
    young = [put(output / name.replace("-ab-", "-cd-"), 1) for name in names[:3]]
    report = put(output / "scores/dt=2026-11-20/run=x/_report-00000001.json")
    assert len(removed(output)) == 4
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in [*young, report])
    assert verify_night(str(output), NIGHT).version == 1


@pytest.mark.parametrize("days", [-1.0, float("nan")])
def test_a_limit_below_zero_is_refused(tmp_path, days):
    with pytest.raises(ConfigError, match="older-than-days"):
        collect(str(tmp_path), print, older_than_days=days)
    assert cli.main(["gc", "--output", str(tmp_path), f"--older-than-days={days}"]) == 2
