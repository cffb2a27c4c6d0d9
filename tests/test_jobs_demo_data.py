"""The demo night: complete, repeatable, and its hard rows as hard as they say."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections import Counter
from datetime import UTC, date, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.config import FIELDS
from jobs.demo_data import DemoNight, write_demo_night
from jobs.hard_rows import hard_images, png_bomb
from jobs.logs import list_logs, read_rows
from jobs.rows import RowReader
from model.errors import ErrorCode, InputError
from model.images import decode_image
from model.scenes import draw

NIGHT = date(2026, 11, 20)
MAX_IMAGE_BYTES = 1_000_000
ROWS = 60


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> DemoNight:
    return _write(tmp_path_factory.mktemp("night"))


def _write(folder: Path, **options: Any) -> DemoNight:
    logs, images = str(folder / "logs"), str(folder / "images")
    return write_demo_night(logs, images, NIGHT, ROWS, seed=3, max_image_bytes=MAX_IMAGE_BYTES, **options)


def _files(root: str) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}


def _rows(log: Path) -> list[dict[str, Any] | None]:
    """Raw rows of a log, None for a line that is no row."""
    if log.suffix == ".parquet":
        table = pq.read_table(log)
        # Python has no such dates: their numbers will do.
        for name in ("created_at", "valid_until") if "far-times" in log.name else ():
            numbers = table[name].cast(pa.int32() if name == "valid_until" else pa.int64())
            table = table.set_column(table.schema.get_field_index(name), name, numbers)
        return table.to_pylist()
    data = gzip.decompress(log.read_bytes()) if log.suffix == ".gz" else log.read_bytes()
    rows = []
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        rows.append(value if isinstance(value, dict) else None)
    return rows


def _all_rows(night: DemoNight) -> dict[str, list[dict[str, Any] | None]]:
    logs = sorted((Path(night.logs_uri) / f"dt={NIGHT}").iterdir())
    return {str(log): _rows(log) for log in logs if "unreadable" not in log.name}


def test_every_form_of_log_is_there(night: DemoNight) -> None:
    logs = _all_rows(night)
    assert [Path(log).name for log in logs] == [
        "part-000.parquet",
        "part-001.jsonl",
        "part-002.jsonl.gz",
        "part-003-inline.parquet",
        "part-004-text-times.parquet",
        "part-006-far-times.parquet",
    ]
    rows = [row for rows in logs.values() for row in rows]
    assert night.row_count == len(rows) + 1  # one dead letter for the unreadable file
    assert len(night.hard_rows) == len(rows) + 1 - ROWS
    schema = pq.read_schema(next(iter(logs)))
    assert schema.field("created_at").type == pa.timestamp("us", "UTC")
    assert schema.field("image").type == pa.binary()
    assert set(schema.names) >= {"seed", "steps", "cfg", "user_name", "generator", "generator_version"}


def test_plain_rows_can_all_be_scored(night: DemoNight) -> None:
    hard = {(row.source_file, row.source_row) for row in night.hard_rows}
    plain = [row for log, rows in _all_rows(night).items() for n, row in enumerate(rows) if (log, n) not in hard]
    assert len({row["generation_id"] for row in plain if row}) == len(plain) == ROWS
    formats, sizes, inline = Counter[str | None](), set(), 0
    for row in plain:
        assert row is not None
        created_at = row["created_at"]
        created_at = datetime.fromisoformat(created_at) if isinstance(created_at, str) else created_at
        assert created_at.astimezone(UTC).date() == NIGHT
        assert row["prompt"]
        data, is_inline = _image_of(row)
        inline += is_inline
        picture, facts = decode_image(data)
        formats[facts.format] += 1
        sizes.add(picture.size)
    assert set(formats) == {"JPEG", "PNG", "WEBP"}
    assert len(sizes) == 4
    assert ROWS * 0.1 <= inline < ROWS * 0.3


def _image_of(row: dict[str, Any]) -> tuple[bytes, bool]:
    assert (row.get("image") is None) != (row.get("image_uri") is None)
    if row.get("image") is None:
        return Path(row["image_uri"]).read_bytes(), False
    return row["image"] if isinstance(row["image"], bytes) else base64.b64decode(row["image"], validate=True), True


def test_hard_rows_are_found_where_they_say(night: DemoNight) -> None:
    logs = _all_rows(night)
    kinds = [row.kind for row in night.hard_rows]
    assert len(set(kinds)) == len(kinds) >= 41
    for hard in night.hard_rows:
        if hard.kind == "unreadable_log":
            assert hard.source_row == -1
            with pytest.raises(pa.ArrowInvalid):
                pq.read_table(hard.source_file)
            continue
        row = logs[hard.source_file][hard.source_row]
        assert (row or {}).get("generation_id") == hard.generation_id
        is_readable = row is not None and hard.kind != "nested_too_deep"
        assert is_readable == (hard.expected_error_code is not ErrorCode.ROW_UNREADABLE)
    assert {row.expected_error_code for row in night.hard_rows} == {
        None,
        *(set(ErrorCode) - {"image_forbidden", "storage_unavailable", "non_finite_reward"}),
    }


def test_repeated_ids_come_after_the_row_that_keeps_it(night: DemoNight) -> None:
    logs = _all_rows(night)
    order = [(row or {}).get("generation_id") for rows in logs.values() for row in rows]
    position = {
        (log, n): i for i, (log, n) in enumerate((log, n) for log, rows in logs.items() for n in range(len(rows)))
    }
    repeated = [row for row in night.hard_rows if row.expected_error_code is ErrorCode.DUPLICATE_ID]
    assert len(repeated) == 2
    for row in repeated:
        assert order.index(row.generation_id) < position[row.source_file, row.source_row]


def test_hard_values_are_in_the_log(night: DemoNight) -> None:
    logs = _all_rows(night)
    rows = {row.kind: logs[row.source_file][row.source_row] or {} for row in night.hard_rows if row.source_row >= 0}
    assert rows["null_prompt"]["prompt"] is None
    assert rows["empty_prompt"]["prompt"] == ""
    assert len(rows["very_long_prompt"]["prompt"]) == 50_000
    assert "\x00" in rows["nul_and_emoji_in_prompt"]["prompt"]
    assert "\ud800" in rows["lone_surrogate_in_prompt"]["prompt"]
    assert rows["timestamp_as_text"]["created_at"].startswith("2026-11-20T")
    assert not Path(rows["missing_object"]["image_uri"]).exists()
    assert Path(rows["too_many_bytes"]["image_uri"]).stat().st_size == MAX_IMAGE_BYTES + 1
    assert rows["image_is_no_base64"]["image"] == "é"
    assert rows["far_date_in_an_extra_column"]["valid_until"] == 2**30
    assert rows["far_timestamp"]["created_at"] == 2**62
    assert len(Path(rows["very_long_name"]["image_uri"]).name) > 1_024
    assert rows["no_image"]["image"] is None
    assert rows["no_image"]["image_uri"] is None


def test_the_job_reads_the_codes_that_hard_fields_promise(night: DemoNight) -> None:
    logs, is_partitioned = list_logs(night.logs_uri, NIGHT)
    reader = RowReader({name: name for name in FIELDS}, NIGHT, is_partitioned, MAX_IMAGE_BYTES)
    read = {}
    for log in logs:
        if "unreadable" not in log.uri:
            for position, raw in read_rows(log, 2**26):
                read[log.uri, position] = reader.row(log, position, raw, is_repeated=False)["error_code"]
    assert len(read) == night.row_count - 1
    early = {
        "missing_id", "bad_timestamp", "missing_prompt", "bad_prompt", "missing_image", "row_unreadable"
    }  # fmt: skip
    for hard in night.hard_rows:
        code = read.get((hard.source_file, hard.source_row))
        if hard.expected_error_code in early or hard.kind == "image_is_no_base64":
            assert code == hard.expected_error_code, hard.kind
        else:
            assert code is None, hard.kind


def test_the_same_arguments_write_the_same_bytes(night: DemoNight, tmp_path: Path) -> None:
    again = _write(tmp_path)
    first, second = _files(night.images_uri), _files(again.images_uri)
    assert {name: hashlib.sha256(data).hexdigest() for name, data in first.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in second.items()
    }
    assert [(row.kind, row.source_row) for row in again.hard_rows] == [
        (row.kind, row.source_row) for row in night.hard_rows
    ]


def test_without_hard_rows_and_with_a_forbidden_object(tmp_path: Path) -> None:
    plain = _write(tmp_path / "plain", with_hard_rows=False)
    assert (plain.row_count, plain.hard_rows) == (ROWS, ())
    assert sum(map(len, _all_rows(plain).values())) == ROWS
    forbidden = _write(tmp_path / "forbidden", forbidden_uri="s3://bucket/secret.png")
    row = next(row for row in forbidden.hard_rows if row.kind == "forbidden_object")
    assert row.expected_error_code is ErrorCode.IMAGE_FORBIDDEN
    assert (_all_rows(forbidden)[row.source_file][row.source_row] or {})["image_uri"] == "s3://bucket/secret.png"
    with pytest.raises(ValueError, match="at least 20"):
        write_demo_night(str(tmp_path), str(tmp_path), NIGHT, rows=19)


HARD_IMAGES = list(hard_images(draw(5, size=(192, 128)).image, MAX_IMAGE_BYTES))


@pytest.mark.parametrize("image", HARD_IMAGES, ids=lambda image: image.kind)
def test_hard_images_end_as_expected(image: Any) -> None:
    # Whether an image is too narrow depends on the checkpoint's crops: here it is only known to decode.
    if image.expected_error_code in (None, ErrorCode.IMAGE_TOO_NARROW):
        picture, _ = decode_image(image.data, max_image_bytes=MAX_IMAGE_BYTES)
        assert picture.mode == "RGB"
        return
    with pytest.raises(InputError) as caught:
        decode_image(image.data, max_image_bytes=MAX_IMAGE_BYTES)
    assert caught.value.code is image.expected_error_code


def test_legal_hard_images_are_what_their_kind_says() -> None:
    opened = {image.kind: Image.open(BytesIO(image.data)) for image in HARD_IMAGES if image.expected_error_code is None}
    assert opened["one_pixel"].size == (1, 1)
    assert opened["cmyk_jpeg"].mode == "CMYK"
    assert opened["png_16_bit"].mode == "I;16"
    assert opened["png_16_bit"].getextrema()[1] > 255
    assert (opened["palette_with_transparency"].mode, opened["wrong_extension"].format) == ("P", "PNG")
    assert isinstance(opened["palette_with_transparency"].info["transparency"], bytes)
    # stored lying on its side, shown upright
    rotated = next(image for image in HARD_IMAGES if image.kind == "exif_rotated_jpeg")
    assert opened["exif_rotated_jpeg"].size == (128, 192)
    assert decode_image(rotated.data)[0].size == (192, 128)


def test_the_bomb_is_small_and_valid() -> None:
    assert len(png_bomb(20_000)) < 100_000
    with Image.open(BytesIO(png_bomb(64))) as small:
        small.load()
        assert (small.size, small.getextrema()) == ((64, 64), (0, 0))
