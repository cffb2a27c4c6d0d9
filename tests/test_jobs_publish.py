"""Staged rows -> published night; and what query and rejudge make of it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli, report
from jobs import manifest as manifests
from jobs.lock import NightLock
from jobs.parquet import FACTS_SCHEMA, check_readable, check_rewritable
from jobs.publish import ROW_GROUP_ROWS, Target, write_content
from jobs.query import as_text, dead_letters, run_query
from jobs.rejudge import rejudge
from jobs.verify import verify_night
from model import storage
from model.errors import ConfigError, InfrastructureError
from model.schema import COLUMNS, SCHEMA_VERSION
from tests.job_helpers import CHECKPOINT, NIGHT, policy, write_staged
from tests.publish_helpers import make_log, publish, publish_night, row_of, rows_of


@pytest.fixture
def log(tmp_path):
    return make_log(tmp_path)


@pytest.fixture
def night(tmp_path, log):
    return publish_night(tmp_path, log)


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


def test_row_groups_are_full_and_no_part_is_longer_than_asked(tmp_path, log):
    count = ROW_GROUP_ROWS + 10_000
    table = pa.Table.from_pylist([row_of(log, 0, 1.0)] * count, FACTS_SCHEMA)
    keys = pa.array([f"{i:064x}" for i in range(count)])
    staged = tmp_path / "s.parquet"
    pq.write_table(table.set_column(0, FACTS_SCHEMA.field(0), keys), staged)
    target = Target(str(tmp_path / "out"), NIGHT, "k" * 16, 1, "run-00000001", ROW_GROUP_ROWS + 6_000, {})
    content = write_content([[str(staged)]], target, policy())
    groups = []
    for file in content.files:
        metadata = pq.ParquetFile(tmp_path / "out" / file.path).metadata
        groups.append([metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)])
    # 75,536 rows: a part of 71,536 in a full row group and the rest of it, and one of the remaining 4,000.
    assert groups == [[65_536, 6_000], [4_000]]
    assert [file.rows for file in content.files] == [71_536, 4_000]


def test_long_prompts_end_a_row_group_sooner(tmp_path, log, monkeypatch):
    monkeypatch.setattr("jobs.publish._ROW_GROUP_BYTES", 20_000)
    batches = [pa.Table.from_pylist(rows_of(log)[i : i + 2], FACTS_SCHEMA) for i in (0, 4, 6)]
    for number, batch in enumerate(batches):
        keys = pa.array([f"{number}{i:063x}" for i in range(2)])
        prompts = pa.array(["x" * 6_000] * 2)
        batch = batch.set_column(0, FACTS_SCHEMA.field(0), keys)
        batches[number] = batch.set_column(3, FACTS_SCHEMA.field(3), prompts)
    monkeypatch.setattr("jobs.publish.sorted_rows", lambda sources, spill: iter(batches))
    target = Target(str(tmp_path / "out"), NIGHT, "k" * 16, 1, "run-00000001", 1000, {})
    [file] = write_content([], target, policy()).files
    metadata = pq.ParquetFile(tmp_path / "out" / file.path).metadata
    # Two batches of 12 kB reach the 20 kB; the third comes last.
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [4, 2]


def test_rows_staged_twice_are_published_once(tmp_path, log):
    rows = rows_of(log)
    first = write_staged(tmp_path / "1.parquet", rows)
    again = write_staged(tmp_path / "2.parquet", rows[2:5])
    _, content = publish(tmp_path / "out", log, [[first, again]])
    assert (content.rows, content.repeated) == (10, 3)


def test_retried_rows_replace_old_ones(tmp_path, log):
    old = write_staged(tmp_path / "1.parquet", rows_of(log))
    new = write_staged(tmp_path / "2.parquet", [row_of(log, 3, 9.0)])
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


def test_query_reads_the_newest_version_only(night, tmp_path, log):
    output, _ = night
    changed = [row_of(log, i, 100.0) for i in range(10)]
    publish(output, log, [[write_staged(tmp_path / "x.parquet", changed)]], version=2)
    table = run_query(str(output), "SELECT dt, count(*) AS n, min(reward_safety) AS low FROM scores GROUP BY dt")
    assert table.to_pylist() == [{"dt": NIGHT, "n": 10, "low": 100.0}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT nothing FROM scores",
        "not sql",
        "",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM tables",
        "COPY scores TO 'x.csv'",
        "COPY scores TO '.tmp/x.csv'",
        "EXPORT DATABASE 'x'",
        "ATTACH 'x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "CREATE PERSISTENT SECRET s (TYPE http, BEARER_TOKEN 'x')",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SET temp_directory = 'x'",
        "SET profiling_output = 'x.json'",
        "PRAGMA enable_profiling = 'json'",
        "SET log_query_path = 'x.log'",
        "CALL enable_logging(storage = 'file', storage_path = 'x')",
    ],
)
def test_bad_or_reaching_queries_are_refused(night, tmp_path, monkeypatch, sql):
    folder = tmp_path / "here"
    # DuckDB spills to .tmp beside the program unless told otherwise, and lets queries write to that folder.
    (folder / ".tmp").mkdir(parents=True)
    monkeypatch.chdir(folder)
    tables = pa.table({"secret": [1]})
    with pytest.raises(ConfigError, match="query"):
        run_query(str(night[0]), sql)
    assert [path.name for path in folder.rglob("*")] == [".tmp"]
    assert tables.num_rows == 1


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no Parquet at all")])
def test_a_missing_or_damaged_part_is_one_line(night, capsys, damage):
    output, manifest = night
    damage(output / manifest.files[1].path)
    assert cli.main(["query", "--output", str(output), "SELECT sum(reward_safety) FROM scores"]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert manifest.files[1].path in error
    assert "assay verify" in error


@pytest.mark.parametrize(("error", "code"), [(FileNotFoundError("no x"), 4), (PermissionError("not x"), 2)])
def test_absent_and_forbidden_files_are_one_line(night, capsys, monkeypatch, error, code):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("jobs.cli_nights.verify_night", refuse)
    assert cli.main(["verify", "--output", str(night[0]), "--date", str(NIGHT)]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_night_of_another_major_schema_is_not_read(tmp_path, log):
    publish_night(tmp_path, log, schema_version="2.0")
    with pytest.raises(ConfigError, match=r"the night 2026-11-20 has schema 2\.0, and this code reads 1\."):
        run_query(str(tmp_path / "out"), "SELECT 1 FROM scores")


def test_minor_schema_versions_are_read_and_only_older_ones_written_again():
    check_readable("1.99", "x")
    check_rewritable("1.0", "x")
    with pytest.raises(ConfigError, match="columns would be lost"):
        check_rewritable("1.99", "x")
    with pytest.raises(ConfigError, match="no schema version"):
        check_readable("one", "x")


def test_query_without_a_night(tmp_path):
    with pytest.raises(ConfigError, match="no manifest of any night"):
        run_query(str(tmp_path), "SELECT 1")


def test_text_tables_are_safe_to_print(night):
    table = run_query(str(night[0]), "SELECT 'a' || chr(27) || '[31m' || chr(10) AS x, repeat('y', 99) AS long")
    assert "\x1b" not in as_text(table)
    assert "\N{HORIZONTAL ELLIPSIS}" in as_text(table)
    assert len(as_text(table).splitlines()) == 3


def test_text_that_a_query_makes_of_prompts_is_safe_to_print(tmp_path, log, capsys):
    hostile = "a\x1b[31m\x9b\u202e\r\nb"
    staged = write_staged(tmp_path / "s.parquet", rows_of(log, prompt=hostile))
    output = tmp_path / "out"
    publish(output, log, [[staged]])
    base = ["query", "--output", str(output)]
    # As a value, as the name of a column, and in DuckDB's own words about it.
    cli.main([*base, "SELECT prompt FROM scores"])
    cli.main([*base, "PIVOT (SELECT prompt FROM scores) ON prompt USING count(*)"])
    cli.main([*base, "SELECT CAST(prompt AS INT) FROM scores"])
    cli.main([*base, "--format", "json", "SELECT prompt FROM scores LIMIT 1"])
    said = capsys.readouterr()
    assert not re.search("[\x1b\x9b\u202e\r]", said.out + said.err)
    assert json.loads(said.out.splitlines()[-1]) == [{"prompt": hostile}]


def test_columns_of_one_name(night, capsys):
    base = ["query", "--output", str(night[0]), "SELECT 1 AS a, 2 AS a"]
    assert cli.main(base) == 0
    assert capsys.readouterr().out.split() == ["a", "a", "-", "-", "1", "2"]
    assert cli.main([*base, "--format", "json"]) == 2
    assert "two columns are named 'a'" in capsys.readouterr().err


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


@pytest.fixture
def policy_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(
        f"id: p\ndescription: for tests\nrules:\n  safety:\n    checkpoint: {CHECKPOINT}\n"
        "    levels:\n      - {below: 0, verdict: review, severity: medium}\n"
    )
    return str(path)


def test_the_policy_of_the_night_leaves_nothing_to_rejudge(night, policy_file, capsys):
    output, _ = night
    assert cli.main(["rejudge", "--output", str(output), "--date", str(NIGHT), "--policy", policy_file]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert manifests.latest(str(output), NIGHT).version == 1


def _rejudged(output, published):
    with NightLock(str(output), NIGHT, "r", lambda line: None, lambda: None) as lock:
        return rejudge(str(output), published, policy(3.0, "q"), "20261121T000000Z-x", 1000, lock, lambda _: None)


def test_rejudged_files_have_the_schema_of_the_code_that_wrote_them(tmp_path, log, monkeypatch):
    _, manifest = publish_night(tmp_path, log)
    older = manifest.model_copy(update={"schema_version": "1.0"})
    monkeypatch.setattr("jobs.rejudge.SCHEMA_VERSION", "1.7")
    assert _rejudged(tmp_path / "out", older).schema_version == "1.7"


def test_a_newer_schema_is_not_rejudged(night):
    output, manifest = night
    with pytest.raises(ConfigError, match="columns would be lost"):
        _rejudged(output, manifest.model_copy(update={"schema_version": "1.99"}))


def test_a_kill_after_the_manifest_of_a_rejudgement_loses_nothing(night, monkeypatch):
    output, manifest = night
    write = manifests.write

    def killed_after(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.manifest.write", killed_after)
    with pytest.raises(KeyboardInterrupt):
        _rejudged(output, manifest)
    latest = manifests.latest(str(output), NIGHT)
    assert latest.version == 2
    assert storage.get(report.uri_of(str(output), latest))
