"""What one raw log row becomes, and which fault is named."""

from __future__ import annotations

import base64
import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from jobs.config import FIELDS
from jobs.logs import Fault, LogFile, UnreadableValue
from jobs.rows import ROW_SCHEMA, RowReader, parse_time
from model.errors import ErrorCode, InputError
from tests.job_helpers import NIGHT, NOON, generation

MAX_IMAGE_BYTES = 1_000
UNREADABLE = UnreadableValue("year 2942713 is out of range")
LOG = LogFile("s3://b/logs/a.parquet", "etag", 1, "parquet")


def reader(is_partitioned=True, **columns):
    return RowReader({name: columns.get(name, name) for name in FIELDS}, NIGHT, is_partitioned, MAX_IMAGE_BYTES)


def read(raw, is_partitioned=True, is_repeated=False, **columns):
    return reader(is_partitioned, **columns).row(LOG, 7, raw, is_repeated=is_repeated)


def test_a_sound_row_keeps_every_field_and_its_place():
    row = read(generation(1, generator="g", generator_version=3))
    assert (row["generation_id"], row["prompt"], row["image_uri"], row["created_at"]) == (
        "g1",
        "a red ball",
        "1.png",
        NOON,
    )
    assert (row["generator"], row["generator_version"], row["extras"]) == ("g", "3", None)
    assert (row["source_file"], row["source_version"], row["source_row"]) == (LOG.uri, "etag", 7)
    assert row["error_code"] is None
    assert list(row) == ROW_SCHEMA.names


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"generation_id": None}, ErrorCode.MISSING_ID),
        ({"generation_id": ""}, ErrorCode.MISSING_ID),
        ({"generation_id": float("nan")}, ErrorCode.MISSING_ID),
        ({"created_at": "yesterday"}, ErrorCode.BAD_TIMESTAMP),
        ({"created_at": True}, ErrorCode.BAD_TIMESTAMP),
        ({"created_at": 1e300}, ErrorCode.BAD_TIMESTAMP),
        ({"prompt": None}, ErrorCode.MISSING_PROMPT),
        ({"prompt": 5}, ErrorCode.BAD_PROMPT),
        ({"prompt": "x\ud800"}, ErrorCode.BAD_PROMPT),
        ({"image_uri": None}, ErrorCode.MISSING_IMAGE),
        ({"image_uri": ""}, ErrorCode.MISSING_IMAGE),
        ({"image_uri": ["a"]}, ErrorCode.BAD_IMAGE_URI),
        ({"image": "no base64!"}, ErrorCode.IMAGE_NOT_AN_IMAGE),
        ({"image": 12}, ErrorCode.IMAGE_NOT_AN_IMAGE),
        ({"image": "é"}, ErrorCode.IMAGE_NOT_AN_IMAGE),
        ({"image": b"x" * 1_001}, ErrorCode.IMAGE_TOO_MANY_BYTES),
        ({"image": base64.b64encode(b"x" * 1_001).decode()}, ErrorCode.IMAGE_TOO_MANY_BYTES),
        ({"image": {"bytes": b"x" * 1_001}}, ErrorCode.IMAGE_TOO_MANY_BYTES),
        ({"image": "!" * 10_000}, ErrorCode.IMAGE_TOO_MANY_BYTES),  # seen by its length, before it is decoded
        ({"generation_id": UNREADABLE}, ErrorCode.MISSING_ID),
        ({"created_at": UNREADABLE}, ErrorCode.BAD_TIMESTAMP),
        ({"prompt": UNREADABLE}, ErrorCode.BAD_PROMPT),
        ({"image": UNREADABLE}, ErrorCode.IMAGE_NOT_AN_IMAGE),
        ({"image_uri": UNREADABLE}, ErrorCode.BAD_IMAGE_URI),
    ],
)
def test_each_fault_has_its_code_and_a_message(changes, code):
    row = read(generation(1, **changes))
    assert (row["error_code"], row["error_stage"]) == (code, "read")
    assert row["error_message"]


def test_empty_prompt_nul_and_emoji_are_legal():
    for prompt in ("", "a\0b", "\N{CAT FACE}"):
        row = read(generation(1, prompt=prompt))
        assert (row["error_code"], row["prompt"]) == (None, prompt)


def test_a_fault_keeps_what_was_legible():
    row = read(generation(1, prompt=None, seed=3))
    assert (row["generation_id"], row["image_uri"], row["extras"]) == ("g1", "1.png", '{"seed":3}')


def test_repeated_and_unreadable_rows():
    assert read(generation(1), is_repeated=True)["error_code"] == "duplicate_id"
    row = read(Fault("not JSON: x"))
    assert row["error_code"] == "row_unreadable"
    assert "row 7" in row["error_message"]


def test_other_columns_travel_as_one_json_object():
    extras = {
        "seed": 1,
        "cfg": 7.5,
        "when": NOON,
        "raw": b"\xff",
        "nan": float("nan"),
        "d": Decimal("1.10"),
        "n": [1, {"a": 2}],
    }
    row = read(generation(1, **extras))
    assert json.loads(row["extras"]) == {
        "seed": 1, "cfg": 7.5, "when": "2026-11-20T12:00:00+00:00", "raw": "/w==", "nan": "nan", "d": "1.10",
        "n": [1, {"a": 2}],
    }  # fmt: skip


def test_column_mapping_may_use_one_column_twice():
    raw = {"image_name": "a.png", "prompt": "p", "timestamp": NOON, "cfg": 7.0}
    row = read(raw, generation_id="image_name", image_uri="image_name", created_at="timestamp")
    assert (row["generation_id"], row["image_uri"], row["created_at"]) == ("a.png", "a.png", NOON)
    assert json.loads(row["extras"]) == {"cfg": 7.0}


def test_inline_images_as_bytes_base64_and_struct():
    for value in (b"\x89PNG", base64.b64encode(b"\x89PNG").decode(), {"bytes": b"\x89PNG", "path": None}):
        assert read(generation(1, image=value, image_uri=None))["image"] == b"\x89PNG"


def test_inline_images_up_to_the_limit_are_read():
    data = b"x" * MAX_IMAGE_BYTES  # 1,000 bytes are 1,336 characters, two of them padding: 1,336 * 3 / 4 - 2
    for value in (data, base64.b64encode(data).decode()):
        assert read(generation(1, image=value, image_uri=None))["image"] == data


def test_an_unreadable_extra_or_label_costs_only_itself():
    row = read(generation(1, generator=UNREADABLE, until=UNREADABLE, seed=1))
    assert (row["error_code"], row["generator"], row["extras"]) == (None, None, '{"until":null,"seed":1}')


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-11-20T12:00:00Z", NOON),
        ("2026-11-20 13:00:00+01:00", NOON),
        ("2026-11-20T12:00:00", NOON),
        (datetime(2026, 11, 20, 12), NOON),
        (datetime(2026, 11, 20, 14, tzinfo=timezone(timedelta(hours=2))), NOON),
        (date(2026, 11, 20), datetime(2026, 11, 20, tzinfo=UTC)),
        (1795176000, NOON),  # seconds; 20 777 days and a half after 1970-01-01
        (1795176000000, NOON),
        (None, None),
    ],
)
def test_times(value, expected):
    assert parse_time(value) == expected


def test_bad_times_name_the_value():
    with pytest.raises(InputError, match="yesterday"):
        parse_time("yesterday")


def test_without_partition_the_time_decides_and_an_unusable_one_stays():
    unpartitioned = reader(is_partitioned=False)
    assert unpartitioned.in_night(generation(1))
    assert not unpartitioned.in_night(generation(1, created_at=NOON + timedelta(days=1)))
    assert unpartitioned.in_night(generation(1, created_at="?"))
    assert unpartitioned.in_night(Fault("x"))
    assert read(generation(1, created_at=None), is_partitioned=False)["error_code"] == "bad_timestamp"
    assert read(generation(1, created_at=None), is_partitioned=True)["error_code"] is None
