"""``assay check-data`` over real image files: everything planted is found, and clean data is clean."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import check_data
from jobs.cli import main
from model import storage
from model.scenes import draw
from tests.job_helpers import s3_that_answers
from tests.test_s3_servers import client


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    return [draw(seed, size=(128, 96)).image for seed in range(12)]


@pytest.fixture
def folder(tmp_path: Path, scenes: list[Image.Image]) -> Path:
    """Images 0.png to 11.png, all different."""
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(scenes):
        (images / f"{number}.png").write_bytes(encoded(image))
    return tmp_path


def write(path: Path, records: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pair(prompt: str | list[str], chosen: int | str, rejected: int | str) -> dict[str, Any]:
    """In the published shape."""
    return {
        "prompt_id": f"id of {prompt}",
        "prompt": prompt,
        "chosen_path": f"{chosen}.png" if isinstance(chosen, int) else chosen,
        "c_rate": 1,
        "reject_path": f"{rejected}.png" if isinstance(rejected, int) else rejected,
        "r_rate": 1,
    }


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["check-data", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out, _ = check(capsys, *arguments, "--format", "json")
    report = json.loads(out)
    return code, {f"{one['where']}: {one['name']}": one for one in report["findings"]}


def test_clean_data_is_said_to_be_clean_in_few_words(capsys, folder):
    data = write(folder / "train.json", [pair("p", 0, 1), pair("q", 2, 3)])
    code, out, err = check(capsys, "--data", data, "--image-root", str(folder / "images"))
    counts, *_ = out.split("\n\n")
    assert (code, err) == (0, "")
    assert counts.startswith(f"data: {data}\n  2 pairs, 2 prompts (characters: median 1, longest 1)\n  4 images, 0 of")
    assert out.endswith("\n\nno problems\n")
    test = write(folder / "test.jsonl", [pair("r", 4, 5)])
    code, out, _ = check(capsys, "--data", data, "--test", test, "--image-root", str(folder / "images"))
    assert code == 0
    assert out.endswith("\n\nno problems\n")


def test_everything_planted_in_pairs_is_found(capsys, folder, scenes):
    images = folder / "images"
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    (images / "near.jpg").write_bytes(encoded(scenes[1], "JPEG", quality=80))
    (images / "cut.png").write_bytes((images / "2.png").read_bytes()[:-400])
    (images / "page.png").write_bytes(b"<html>gone</html>")
    train = [
        pair("p", 0, 1),
        pair("p", "copy.png", 1),  # the same pair under another name
        pair("p", 1, "copy.png"),  # and the other way round
        pair("q", 3, 4),
        pair("q", 4, 5),
        pair("q", 5, 3),  # a circle
        pair("", 6, "copy.png"),
        pair("same", 7, 7),
        pair(["own", "captions"], 7, 7),  # a hard negative is none of that
        pair("r", "cut.png", "page.png"),
        pair("r", "missing.png", 8),
    ]
    test = [pair("p", "near.jpg", 9), pair("q", 4, 3), pair("new", 10, 11)]
    data = write(folder / "train.jsonl", train)
    held_out = write(folder / "test.json", test)
    code, found = findings(capsys, "--data", data, "--test", held_out, "--image-root", str(images))
    assert code == 1
    unreadable = json.loads(check(capsys, "--data", data, "--image-root", str(images), "--format", "json")[1])
    codes = [one["text"] for one in unreadable["findings"] if one["name"] == "unreadable_image"]
    assert sorted(text.rpartition(" ")[2].strip("()") for text in codes) == [
        "image_not_an_image",
        "image_not_found",
        "image_truncated",
    ]
    counts = {name: (one["level"], one["count"]) for name, one in found.items() if "unreadable" not in name}
    assert counts == {
        "train: repeated_record": ("problem", 1),
        "train: contradictory_pairs": ("problem", 1),
        "train: cycle": ("problem", 1),
        "train: identical_sides": ("problem", 1),
        "train: same_image": ("note", 1),
        "train: empty_prompt": ("note", 1),
        "train and test: leaked_image": ("problem", 2),  # 3 and 4
        "train and test: leaked_pair": ("problem", 1),
        "train and test: leaked_near_image": ("problem", 1),
        "train and test: leaked_prompt": ("note", 2),
    }
    assert found["train and test: leaked_near_image"]["examples"] == [f"{images}/1.png ~ {images}/near.jpg"]
    code, out, _ = check(capsys, "--data", data, "--test", held_out, "--image-root", str(images), "--examples", "1")
    assert code == 1
    assert out.endswith("\n\nkinds of problem: 10, kinds of note: 3\n")
    assert "\nproblems\n  train and test: images in both (the same bytes): 2\n" in out
    assert f"    - {images}/4.png\n    - and 1 more\n" in out


def test_labelled_images_with_further_fields(capsys, folder):
    images = folder / "images"
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    rows = [
        {"path": f"{index}.png", "label": index % 2, "prompt": "", "safety_label": ["Unsafe", "Safe"][index % 2],
         "source": "web"}
        for index in range(6)
    ]  # fmt: skip
    data = write(folder / "d.parquet", [*rows, rows[0] | {"path": "copy.png", "label": 1}])
    code, out, _ = check(capsys, "--data", data, "--image-root", str(images))
    assert code == 1
    assert "  label 0: 3 (42.9%), label 1: 4 (57.1%)\n" in out
    assert "  by safety_label\n    Safe: label 1: 3 (100.0%)\n    Unsafe: label 0: 3 (75.0%), label 1: 1 (25.0%)" in out
    assert (
        f"  images with both labels: 1\n      decide on one, or remove them\n    - {images}/0.png (1: 0, 7: 1)" in out
    )
    code, found = findings(capsys, "--data", write(folder / "c.json", rows), "--image-root", str(images))
    assert (code, set(found)) == (0, {"data: empty_prompt"})
    code, found = findings(capsys, "--data", write(folder / "o.json", rows[::2]), "--image-root", str(images))
    assert (code, found["data: class_balance"]["level"]) == (1, "problem")


def test_rankings_and_mapped_fields(capsys, folder):
    record = {"id": "a-1", "caption": "p", "generations": ["0.png", "1.png", "2.png"], "ranking": [1, 2, 2]}
    data = write(folder / "d.json", [record])
    options = ["--data", data, "--map", "prompt=caption", "--image-root", str(folder / "images")]
    code, out, _ = check(capsys, *options)
    assert code == 0
    assert "\n  2 pairs, 1 prompts" in out
    labelled = write(folder / "l.json", [{"image": f"{i}.png", "prompt": "x", "label": "ab"[i]} for i in range(2)])
    options = ["--data", labelled, "--image-root", str(folder / "images"), "--label", "a=1", "--label", "b=0"]
    assert check(capsys, *options)[0] == 0


def test_a_test_set_in_another_folder(capsys, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name, source in (("0.png", "6.png"), ("1.png", "1.png")):
        (other / name).write_bytes((folder / "images" / source).read_bytes())
    data, test = write(folder / "d.json", [pair("p", 0, 1)]), write(folder / "t.json", [pair("q", 0, 1)])
    roots = ["--image-root", str(folder / "images"), "--test-image-root", str(other)]
    code, found = findings(capsys, "--data", data, "--test", test, *roots)
    assert code == 1
    assert found["train and test: leaked_image"]["examples"] == [f"{folder}/images/1.png = {other}/1.png"]


def test_bad_input_is_said_before_any_image_is_read(capsys, folder):
    good = write(folder / "good.json", [pair("p", 0, 1)])
    bad = write(folder / "bad.json", [pair("p", 0, 1), {"prompt": "\u202e", "path": 3, "label": 1}, {"a": 1}])
    root = ["--image-root", str(folder / "images")]
    for arguments, message in (
        (["--data", good], "names the image '0.png'; say where it is with --image-root"),
        (["--data", good, "--image-root", str(folder / "none")], "is no folder"),
        (["--data", str(folder / "none.json"), *root], "no such file"),
        (["--data", good, "--test", str(folder / "none.json"), *root], "no such file"),
        (["--data", good, "--map", "chosen", *root], "has no '='"),
        (["--data", good, "--map", "colour=x", *root], "'colour' is not a field"),
        (["--data", good, "--label", "safe=2", *root], "--label 'safe=2': write --label safe=1"),
    ):
        code, out, err = check(capsys, *arguments)
        assert (code, out) == (2, "")
        assert message in err
    code, out, err = check(capsys, "--data", bad, *root)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1  # mixed kinds: the first fault that decides everything


def test_malformed_records_are_listed_one_a_line(capsys, folder):
    bad = write(folder / "bad.json", [pair("p", 0, 1), {"prompt": "x"}, pair("p", "\x1b[2J", "../x")])
    code, out, err = check(capsys, "--data", bad, "--image-root", str(folder / "images"))
    assert (code, out) == (2, "")
    head, second, third = err.splitlines()
    assert head == f"error: {bad}: 2 of 3 records are malformed"
    assert second.startswith(f"{bad}, record 2: neither chosen and rejected")
    assert third == f"{bad}, record 3: rejected '../x' leads upwards; write a path below --image-root without '..'"


def test_images_outside_of_the_root_and_of_the_buckets_are_not_read(capsys, folder):
    (folder / "outside.png").write_bytes((folder / "images" / "0.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(folder / "outside.png")
    records = [pair("p", f"{folder}/outside.png", "link.png"), pair("q", "s3://someone-else/a.png", 1)]
    data = write(folder / "d.json", records)
    code, out, _ = check(capsys, "--data", data, "--image-root", str(folder / "images"))
    assert code == 1
    assert "a path must stay below --image-root" in out
    assert "images that cannot be read (bad_image_uri): 2" in out
    assert "images that cannot be read (bucket_not_allowed): 1" in out


def test_on_s3(capsys, folder, any_s3, tmp_path):
    bucket = f"check-{tmp_path.name.replace('_', '-').lower()}"[:60].rstrip("-")
    client(any_s3).create_bucket(Bucket=bucket)
    for number in range(4):
        storage.put_file(f"s3://{bucket}/images/{number}.png", folder / "images" / f"{number}.png")
    storage.put(f"s3://{bucket}/images/large.png", bytes(33 * 2**20))
    records = [pair("p", 0, 1), pair("q", f"s3://{bucket}/images/2.png", 3), pair("r", "large.png", "gone.png")]
    for name in ("d.jsonl", "d.parquet"):
        write(folder / name, records[:2])
        storage.put_file(f"s3://{bucket}/{name}", folder / name)
        assert check(capsys, "--data", f"s3://{bucket}/{name}", "--image-root", f"s3://{bucket}/images")[0] == 0
    data = write(folder / "d.json", records)
    code, out, _ = check(capsys, "--data", data, "--image-root", f"s3://{bucket}/images")
    assert code == 1
    assert "images that cannot be read (image_too_many_bytes): 1" in out
    assert "images that cannot be read (image_not_found): 1" in out
    assert check(capsys, "--data", "s3://no-such-bucket-here/d.json")[0] == 2


def test_a_storage_that_refuses_or_is_away_is_no_finding(capsys, folder, monkeypatch):
    data = write(folder / "d.json", [pair("p", "s3://away/a.png", "s3://away/b.png")])
    for status, code, expected in ((409, "OperationAborted", 4), (403, "AccessDenied", 1)):
        with s3_that_answers(status, code) as env:
            for name, value in env.items():
                monkeypatch.setenv(name, value)
            assert check(capsys, "--data", data, "--allow-bucket", "away")[0] == expected


def test_progress_is_told_on_stderr(capsys, folder, monkeypatch):
    monkeypatch.setattr(check_data, "_PROGRESS_EVERY", 5)
    data = write(folder / "d.json", [pair(f"p{index}", index, index + 6) for index in range(6)])
    code, out, err = check(capsys, "--data", data, "--image-root", str(folder / "images"), "--format", "json")
    assert code == 0
    assert json.loads(out)["data"][0]["images"] == 12
    assert err == "data: 8 of 12 images read\ndata: 12 of 12 images read\n"
