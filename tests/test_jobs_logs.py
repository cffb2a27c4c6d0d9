"""Finding and reading log files."""

from __future__ import annotations

import gzip
import json
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jobs.logs import (
    Fault,
    LogFile,
    UnreadableLogError,
    UnreadableValue,
    column_names,
    format_of,
    list_logs,
    read_rows,
)
from jobs.scan import Scan, ScannedLog, Slice, _repeated, _scan_one, shards
from jobs.source import read_tables
from model.errors import ConfigError
from tests.job_helpers import NIGHT, NOON, generation, log_file, s3_that_answers, write_jsonl, write_parquet
from tests.test_jobs_rows import reader

MAX_LINE = 10_000


def test_partitioned_nights_are_told_apart_and_markers_left_out(tmp_path):
    write_parquet(tmp_path / "dt=2026-11-20/b.parquet", [generation(1)])
    write_jsonl(tmp_path / "dt=2026-11-20/a.jsonl", [generation(2)])
    write_parquet(tmp_path / "dt=2026-11-21/c.parquet", [generation(3)])
    (tmp_path / "dt=2026-11-20/_SUCCESS").touch()
    (tmp_path / "dt=2026-11-20/_meta.jsonl").touch()
    logs, is_partitioned = list_logs(str(tmp_path), NIGHT)
    assert is_partitioned
    assert [log.uri.rsplit("/", 2)[1:] for log in logs] == [
        ["dt=2026-11-20", "a.jsonl"],
        ["dt=2026-11-20", "b.parquet"],
    ]


def test_wrong_inputs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        list_logs(str(tmp_path / "nowhere"), NIGHT)
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ConfigError, match="1 other objects"):
        list_logs(str(tmp_path), NIGHT)
    write_parquet(tmp_path / "dt=2026-11-19/a.parquet", [generation(1)])
    with pytest.raises(ConfigError, match=r"no logs for dt=2026-11-20 .* dt=2026-11-19 to dt=2026-11-19"):
        list_logs(str(tmp_path), NIGHT)
    with pytest.raises(ConfigError, match="unsupported URI scheme 'ftp'"):
        list_logs("ftp://x/y", NIGHT)


def test_only_folders_below_the_root_are_partitions(tmp_path):
    write_parquet(tmp_path / "dt=old-export/plain/a.parquet", [generation(1)])
    logs, is_partitioned = list_logs(str(tmp_path / "dt=old-export/plain"), NIGHT)
    assert (len(logs), is_partitioned) == (1, False)


@pytest.mark.parametrize(
    "below", ["dt=2026-11-20", "dt=2026-11-20/", "dt=2026-11-20/more", "dt=2026-11-20/more/a.parquet"]
)
def test_a_root_in_a_partition_is_that_night(tmp_path, below):
    log = write_parquet(tmp_path / "dt=2026-11-20/more/a.parquet", [generation(1)])
    assert list_logs(f"{tmp_path}/{below}", NIGHT) == ([log], True)
    with pytest.raises(ConfigError, match=r"lies in dt=2026-11-20, which is not the night 2026-11-21"):
        list_logs(f"{tmp_path}/{below}", NIGHT + timedelta(days=1))


def test_one_file_without_partition_is_a_root_too(tmp_path):
    log = write_parquet(tmp_path / "a.parquet", [generation(1)])
    assert list_logs(log.uri, NIGHT) == ([log], False)


def test_logs_inside_and_outside_of_partitions_are_refused(tmp_path):
    inside = write_parquet(tmp_path / "dt=2026-11-19/a.parquet", [generation(1)])
    outside = write_parquet(tmp_path / "late.parquet", [generation(2)])
    with pytest.raises(ConfigError, match="mixes logs") as caught:
        list_logs(str(tmp_path), NIGHT)
    assert inside.uri in str(caught.value)
    assert outside.uri in str(caught.value)


def test_times_that_python_cannot_hold_cost_their_own_value_only(tmp_path):
    table = pa.table(
        {
            "generation_id": ["a", "b", "c"],
            "created_at": pa.array([2**62, 0, 1], pa.timestamp("us", "UTC")),
            "until": pa.array([2**30, 0, None], pa.date32()),
            "took": pa.array([0, 2**62, None], pa.duration("s")),
            "zoned": pa.array([0, 0, None], pa.timestamp("us", "No/Where")),
            "text": pa.array([b"ok", b"\xff", None], pa.binary()).view(pa.string()),
        }
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in read_rows(log_file(tmp_path / "a.parquet"), MAX_LINE)]
    odd = [sorted(name for name, value in row.items() if isinstance(value, UnreadableValue)) for row in rows]
    assert odd == [["created_at", "until", "zoned"], ["text", "took", "zoned"], []]
    assert [row["generation_id"] for row in rows] == ["a", "b", "c"]
    assert (rows[1]["until"], rows[0]["took"], rows[0]["text"]) == (date(1970, 1, 1), timedelta(0), "ok")


def test_maps_are_objects_and_nanoseconds_are_kept(tmp_path):
    nano = pa.time64("ns")
    table = pa.table(
        {
            "m": pa.array([[("k", 1), ("l", 2)], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64())),
            "t": pa.array([1, None], nano),
            "nested": pa.array([[{"at": 3_600_000_000_001}], None], pa.list_(pa.struct([("at", nano)]))),
            "stamp": pa.array([1, 2], pa.timestamp("ns", "UTC")),
        }
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    log = log_file(tmp_path / "a.parquet")
    rows = [
        json.loads(reader().row(log, position, raw, is_repeated=False)["extras"])
        for position, raw in read_rows(log, MAX_LINE)
    ]
    assert [row["m"] for row in rows] == [{"k": 1, "l": 2}, [["k", 1], ["k", 2]]]
    assert [row["t"] for row in rows] == ["00:00:00.000000001", None]
    assert rows[0]["nested"] == [{"at": "01:00:00.000000001"}]
    assert rows[0]["stamp"] == "1970-01-01T00:00:00.000000001+00:00"


@pytest.mark.parametrize("field", ["extra", "generation_id", "created_at", "image"])
def test_a_row_nested_too_deep_is_a_dead_letter(tmp_path, field):
    deep = f'{{"prompt": "a", "image_uri": "a.png", "{field}": {"[" * 600}{"]" * 600}}}'
    log = write_jsonl(tmp_path / "a.jsonl", [generation(0), deep, generation(2, extra=[[[]]])])
    for is_partitioned in (True, False):
        assert len(_scan_one(log, reader(is_partitioned), MAX_LINE).positions) == 3
    read = [
        row
        for table in read_tables(Slice(ScannedLog(log, 3, 0, 3), 0, 3), reader(), MAX_LINE)
        for row in table.to_pylist()
    ]
    assert [row["error_code"] for row in read] == [None, "row_unreadable", None]
    assert "nested deeper than 200" in read[1]["error_message"]


def _inline_log(path, groups, rows, image_bytes):
    """Row groups of noise, in pages of about one image each."""
    noise = np.random.default_rng(0)
    schema = pa.schema([("generation_id", pa.string()), ("image", pa.binary())])
    with pa.parquet.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, data_page_size=image_bytes, write_batch_size=1
    ) as writer:
        for group in range(groups):
            ids = [f"g{group * rows + row}" for row in range(rows)]
            writer.write_table(pa.table([ids, [noise.bytes(image_bytes) for _ in ids]], schema=schema))
    return log_file(path)


def test_a_row_group_is_not_loaded_whole(tmp_path):
    log = _inline_log(tmp_path / "a.parquet", groups=1, rows=256, image_bytes=2**19)  # 128 MiB
    before, most = pa.total_allocated_bytes(), 0
    for position, row in read_rows(log, MAX_LINE):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(row["image"]) == 2**19, position
    # one read of at most 64 MiB, the next one's beginnings, buffers
    assert most < 100 * 2**20


def test_a_row_group_above_the_limit_costs_its_own_rows(tmp_path, monkeypatch):
    rows = [generation(i, image=b"x" * (10 if i < 5 else 100_000)) for i in range(10)]
    table = pa.Table.from_pylist(rows)
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5, compression="none", use_dictionary=False)
    log = log_file(tmp_path / "a.parquet")
    monkeypatch.setattr("jobs.logs.MAX_ROW_GROUP_BYTES", 100_000)
    read = [row for _, row in read_rows(log, MAX_LINE)]
    assert [isinstance(row, Fault) for row in read] == [False] * 5 + [True] * 5
    assert "above the limit of 100000" in read[5].reason
    assert all(isinstance(row, dict) for _, row in read_rows(log, MAX_LINE, {"generation_id"}))


def test_row_groups_outside_of_the_slice_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([generation(i) for i in range(40)]), path, row_group_size=10)
    groups = []
    original = pa.parquet.ParquetFile.iter_batches

    def spy(self, *args, row_groups, **options):
        groups.extend(row_groups)
        return original(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pa.parquet.ParquetFile, "iter_batches", spy)
    log = log_file(path)
    rows = list(read_rows(log, MAX_LINE, first_row=15, end_row=21))
    assert [(position, row["generation_id"]) for position, row in rows] == [(n, f"g{n}") for n in range(15, 21)]
    assert groups == [1, 2]
    list(read_tables(Slice(ScannedLog(log, 40, 0, 40), 30, 40), reader(), MAX_LINE))
    assert groups == [1, 2, 3]


def test_jsonl_lines_outside_of_the_slice_are_not_parsed(tmp_path, monkeypatch):
    log = write_jsonl(tmp_path / "a.jsonl", [generation(i) for i in range(40)])
    parsed = []
    original = json.loads
    monkeypatch.setattr("jobs.logs.json.loads", lambda line: parsed.append(line) or original(line))
    assert [position for position, _ in read_rows(log, MAX_LINE, first_row=15, end_row=21)] == list(range(15, 21))
    assert len(parsed) == 6


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_a_log_that_may_not_be_read_is_an_error_of_the_run(monkeypatch, name):
    with s3_that_answers(403, "AccessDenied") as env:
        for variable, value in env.items():
            monkeypatch.setenv(variable, value)
        log = LogFile(f"s3://b/{name}", "v", 1, format_of(name))
        with pytest.raises(PermissionError, match=f"s3://b/{name}") as caught:
            list(read_rows(log, MAX_LINE))
    assert "\n" not in str(caught.value)


def test_parquet_rows_and_columns(tmp_path):
    log = write_parquet(tmp_path / "a.parquet", [generation(i) for i in range(700)])
    rows = list(read_rows(log, MAX_LINE, {"generation_id"}))
    assert [position for position, _ in rows] == list(range(700))
    assert rows[699][1] == {"generation_id": "g699"}
    assert column_names(log, MAX_LINE) == {"generation_id", "created_at", "prompt", "image_uri"}


def test_jsonl_faults_cost_only_their_line(tmp_path):
    log = write_jsonl(
        tmp_path / "a.jsonl", [generation(0), "{not json", "[1]", "", '{"x": "' + "y" * MAX_LINE + '"}', generation(4)]
    )
    rows = list(read_rows(log, MAX_LINE))
    assert [position for position, _ in rows] == [0, 1, 2, 3, 4]
    assert [isinstance(row, Fault) for _, row in rows] == [False, True, True, True, False]
    assert "max_line_bytes" in rows[3][1].reason
    assert rows[4][1]["generation_id"] == "g4"


def test_gzip_and_a_cut_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(b'{"generation_id": "g"}\n' * 1000)
    path.write_bytes(data)
    assert len(list(read_rows(log_file(path), MAX_LINE))) == 1000
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableLogError):
        list(read_rows(log_file(path), MAX_LINE))


def test_garbage_parquet_is_unreadable_and_becomes_one_dead_letter(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but nothing else")
    log = log_file(tmp_path / "a.parquet")
    found = _scan_one(log, reader(), MAX_LINE)
    assert found.unreadable
    (table,) = read_tables(Slice(ScannedLog(log, 1, unreadable=found.unreadable), -1, 0), reader(), MAX_LINE)
    (row,) = table.to_pylist()
    assert (row["error_code"], row["source_row"]) == ("log_unreadable", -1)
    assert "a.parquet" in row["error_message"]


def test_a_damaged_row_group_costs_only_its_own_rows(tmp_path):
    # Ids are readable, a later column is not: damage the pages of the last column.
    path = tmp_path / "a.parquet"
    rows = [generation(i, zz=f"{i}" * 50) for i in range(3000)]
    table = pa.Table.from_pylist(rows)
    pa.parquet.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    facts = pa.parquet.ParquetFile(path).metadata.row_group(1).column(4)
    data = bytearray(path.read_bytes())
    data[facts.data_page_offset : facts.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    log = log_file(path)
    found = _scan_one(log, reader(), MAX_LINE)
    assert len(found.positions) == 3000
    piece = Slice(ScannedLog(log, 3000, 0, 3000), 0, 3000)
    read = [row for table in read_tables(piece, reader(), MAX_LINE) for row in table.to_pylist()]
    assert sorted(row["source_row"] for row in read) == list(range(3000))
    broken = [row["source_row"] for row in read if row["error_code"] == "row_unreadable"]
    assert broken == list(range(1000, 2000))


def test_repeats_are_found_across_files_and_the_first_stays(tmp_path):
    first = write_parquet(tmp_path / "a.parquet", [generation(1), generation(2), generation(1)])
    second = write_jsonl(
        tmp_path / "b.jsonl", [generation(2), generation(3), generation(0, generation_id=None), "{", "{"]
    )
    passes = [_scan_one(log, reader(), MAX_LINE) for log in (first, second)]
    assert _repeated(passes) == [frozenset({2}), frozenset({0})]


def test_a_night_without_partition_is_cut_out_by_time(tmp_path):
    rows = [
        generation(0, created_at=NOON.replace(day=19)),
        generation(1),
        generation(2, created_at=NOON.replace(day=21)),
    ]
    log = write_parquet(tmp_path / "a.parquet", rows)
    found = _scan_one(log, reader(is_partitioned=False), MAX_LINE)
    assert found.positions.tolist() == [1]


def test_rows_of_other_nights_between_them_are_skipped(tmp_path):
    log = write_parquet(tmp_path / "a.parquet", [generation(i) for i in range(6)])
    file = ScannedLog(log, 3, 1, 6, scattered=np.array([1, 3, 5]))
    rows = [r for t in read_tables(Slice(file, 1, 4), reader(is_partitioned=False), MAX_LINE) for r in t.to_pylist()]
    assert [row["source_row"] for row in rows] == [1, 3]


def test_shards_cover_every_row_once():
    files = [ScannedLog(_log(name), rows, 0, rows) for name, rows in (("a", 5), ("b", 25), ("c", 3), ("d", 4))]
    files.append(ScannedLog(_log("e"), 1, unreadable="broken"))
    result = shards(Scan(tuple(files), True), rows_per_shard=10)
    sizes = [sum(piece.end_row - piece.first_row for piece in shard if piece.first_row >= 0) for shard in result]
    assert max(sizes) <= 10
    covered = sorted((p.file.log.uri, row) for shard in result for p in shard for row in range(p.first_row, p.end_row))
    expected = sorted((name, row) for name, rows in (("a", 5), ("b", 25), ("c", 3), ("d", 4)) for row in range(rows))
    assert [item for item in covered if item[1] >= 0] == expected
    assert sum(piece.file.unreadable is not None for shard in result for piece in shard) == 1


def test_slices_read_only_their_rows(tmp_path):
    log = write_parquet(tmp_path / "a.parquet", [generation(i) for i in range(10)])
    file = ScannedLog(log, 10, 0, 10, repeated=frozenset({4}))
    rows = [r for t in read_tables(Slice(file, 3, 6), reader(), MAX_LINE) for r in t.to_pylist()]
    assert [(row["source_row"], row["error_code"]) for row in rows] == [(3, None), (4, "duplicate_id"), (5, None)]
    only = [r for t in read_tables(Slice(file, 3, 9, frozenset({8})), reader(), MAX_LINE) for r in t.to_pylist()]
    assert [row["source_row"] for row in only] == [8]


def _log(name):
    return LogFile(name, "v", 1, "parquet")
