"""What an earlier attempt has left, and what of it may be believed."""

from __future__ import annotations

import pytest

from jobs.staging import Staging
from tests.job_helpers import staged_row, write_staged


@pytest.fixture
def staging(tmp_path):
    return Staging(str(tmp_path), "key", rows_per_shard=100, shards=2)


def test_a_kill_between_copy_and_delete_of_a_commit_leaves_the_committed_one(staging, tmp_path):
    folder = tmp_path / "checkpoints/key/100-0/shard-00000"
    folder.mkdir(parents=True)
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet", "c.parquet"):
        (folder / name).touch()
    staging.settle(0)
    # b was never committed: Ray removes it together with its data.
    assert sorted(path.name for path in folder.iterdir()) == ["a.parquet", "b.pending.parquet", "c.parquet"]


def test_only_committed_rows_count(staging):
    rows = [staged_row("log", "v", i) for i in range(5)]
    write_staged(tmp := staging_path(staging, "a.parquet"), rows)
    write_staged(staging_path(staging, "b.pending.parquet"), rows)
    assert tmp.exists()
    assert staging.committed_rows() == 5


def test_shards_of_another_size_are_other_shards(staging, tmp_path):
    staging.mark_done(0)
    staging.mark_done(1)
    assert staging.is_complete()
    assert not Staging(str(tmp_path), "key", rows_per_shard=50, shards=2).is_complete()


def test_the_way_of_scoring_is_kept_and_all_of_it_can_be_forgotten(staging, tmp_path):
    assert staging.stored_via() is None
    staging.store_via("serve")
    staging.mark_done(0)
    assert staging.stored_via() == "serve"
    staging.remove()
    assert staging.stored_via() is None
    assert not staging.is_done(0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_tasks_of_abandoned_work_write_where_nobody_reads(tmp_path):
    first = Staging.open(str(tmp_path), "key", 100, 1)
    first.abandon()
    write_staged(staging_path(first, "late.parquet"), [staged_row("log", "v", 1)])
    first.mark_done(0)
    again = Staging.open(str(tmp_path), "key", 100, 1)
    assert (again.generation, again.committed_rows(), again.is_complete()) == (1, 0, False)
    again.abandon()
    assert Staging.open(str(tmp_path), "key", 100, 1).generation == 2


def staging_path(staging, name):
    from pathlib import Path

    return Path(staging.checkpoint_uri(0)) / name
