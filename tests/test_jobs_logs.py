"""Finding and reading log files."""

from __future__ import annotations

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jobs.logs import Fault, UnreadableLogError, column_names, list_logs, read_rows
from jobs.scan import Scan, ScannedLog, Slice, _repeated, _scan_one, shards
from jobs.source import read_tables
from model.errors import ConfigError
from tests.job_helpers import NIGHT, NOON, generation, log_file, write_jsonl, write_parquet
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
    from jobs.logs import LogFile

    return LogFile(name, "v", 1, "parquet")
