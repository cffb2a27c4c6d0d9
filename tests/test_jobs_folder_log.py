"""A log of any folder of images."""

from __future__ import annotations

import json
import os
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.folder_log import Prompts, log_from_folder
from model.errors import ConfigError

NIGHT = date(2026, 11, 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name in ("a.jpg", "b.PNG", "deep/c.webp", "notes.txt", "d.jpg/e.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def _write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def _rows(log_uri: str) -> list[dict[str, Any]]:
    return pq.read_table(log_uri).to_pylist()


def test_a_folder_without_prompts(folder: Path, tmp_path: Path) -> None:
    written = log_from_folder(folder, str(tmp_path / "logs"), NIGHT, generator="painter")
    assert written.log_uri == str(tmp_path / "logs" / "dt=2026-11-20" / "folder.parquet")
    assert (written.row_count, written.without_prompt) == (3, 3)
    rows = _rows(written.log_uri)
    assert [row["generation_id"] for row in rows] == ["a.jpg", "b.PNG", "deep/c.webp"]
    assert [Path(row["image_uri"]).read_bytes() for row in rows] == [b"a.jpg", b"b.PNG", b"deep/c.webp"]
    assert {(row["prompt"], row["generator"]) for row in rows} == {("", "painter")}
    assert rows[0]["created_at"] == datetime(2026, 11, 20, tzinfo=UTC)


def test_prompts_and_uploads(folder: Path, tmp_path: Path) -> None:
    lines = _write_lines(
        tmp_path / "samples.jsonl",
        {"image": "a.jpg", "prompt": "a cat", "rating": None},
        "",
        {"image": "pictures/deep/c.webp", "prompt": "a dög \U0001f415"},
        {"image": "a.jpg", "prompt": "a cat"},
        {"image": "a.jpg", "prompt": "a dog"},
        {"image": "b.PNG", "prompt": None},
    )
    images = str(tmp_path / "uploaded")
    written = log_from_folder(folder, str(tmp_path / "logs"), NIGHT, images_uri=images, prompts=Prompts(lines))
    found = [(row["generation_id"], row["prompt"], row["prompt_line"]) for row in _rows(written.log_uri)]
    # a.jpg is named with two different prompts, one of them twice: two rows
    assert found == [
        ("a.jpg", "a cat", 1),
        ("a.jpg#1", "a dog", 5),
        ("b.PNG", "", 6),
        ("deep/c.webp", "a dög \U0001f415", 3),
    ]
    assert written.without_prompt == 1
    for row in _rows(written.log_uri):
        assert row["image_uri"].startswith(f"{images}/")
        assert Path(row["image_uri"]).read_bytes().decode() == row["generation_id"].partition("#")[0]


def test_preference_pairs(folder: Path, tmp_path: Path) -> None:
    lines = _write_lines(
        tmp_path / "pairs.jsonl", {"pair_id": 0, "caption": "a cat", "chosen": "a.jpg", "rejected": "b.PNG"}
    )
    prompts = Prompts(lines, ("chosen", "rejected"), "caption")
    rows = _rows(log_from_folder(folder, str(tmp_path / "logs"), NIGHT, prompts=prompts).log_uri)
    assert [(row["generation_id"], row["prompt"]) for row in rows] == [
        ("a.jpg", "a cat"),
        ("b.PNG", "a cat"),
        ("deep/c.webp", ""),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"image": "a.jpg"'], "line 1: not JSON"),
        (["[1]"], "line 1: not a JSON object"),
        ([{"image": "a.jpg", "prompt": "x"}, {"image": "a.jpg"}], "line 2: no field 'prompt'; it has image"),
        ([{"image": "z.jpg", "prompt": "x"}], "names 'z.jpg', which is not in the folder"),
        ([{"image": "a.jpg", "prompt": 5}], "prompt is a int, not text"),
        ([{"image": "a.jpg", "prompt": "\ud800"}], "prompt holds a lone surrogate"),
    ],
)
def test_prompts_that_do_not_fit(folder: Path, tmp_path: Path, lines: list[Any], message: str) -> None:
    path = _write_lines(tmp_path / "p.jsonl", *lines)
    with pytest.raises(ConfigError, match=message):
        log_from_folder(folder, str(tmp_path / "logs"), NIGHT, prompts=Prompts(path))
    assert not (tmp_path / "logs").exists()


def test_folders_and_files_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    logs = str(tmp_path / "logs")
    with pytest.raises(ConfigError, match="no such folder"):
        log_from_folder(tmp_path / "none", logs, NIGHT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no file ending in \.bmp"):
        log_from_folder(tmp_path / "empty", logs, NIGHT)
    with pytest.raises(ConfigError, match="No such file"):
        log_from_folder(folder, logs, NIGHT, prompts=Prompts(tmp_path / "none.jsonl"))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"caf\\udce9\.jpg.*not UTF-8"):
        log_from_folder(folder, logs, NIGHT)
