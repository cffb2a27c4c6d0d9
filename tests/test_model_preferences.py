"""Reading preference data: every shape, every format, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model import preferences, record_files, storage
from model.errors import ConfigError
from model.preferences import LabelledImage, PreferencePair, image_uris, read_preferences
from tests.test_s3_servers import client

PAIR = {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"}
IMAGE = {"prompt": "a cat", "image": "a.png", "label": 1}


def write(path: Path, records: list[Any]) -> str:
    """The records in the format that the name says."""
    name = path.name
    if name.endswith(".parquet"):
        names = {name: None for record in records for name in record}
        pq.write_table(pa.Table.from_pylist([names | record for record in records]), path)
        return str(path)
    is_list = name.removesuffix(".gz").endswith(".json")
    text = json.dumps(records) if is_list else "".join(json.dumps(record) + "\n" for record in records)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def refusal(uri: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_preferences(uri, **options)
    return str(caught.value)


FORMATS = ["d.json", "d.json.gz", "d.jsonl", "d.ndjson", "d.jsonl.gz", "d.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name):
    full = {"pair_id": 7, "chosen_rate": 4, "rejected_rate": 2.5, "generator": "sd", "seed": 3}
    data = read_preferences(write(tmp_path / name, [PAIR | full, PAIR | {"chosen": "c.png"}]))
    assert data.kind == "paired"
    assert data.records == (
        PreferencePair("7", "a cat", "a cat", "a.png", "b.png", 4.0, 2.5, {"generator": "sd", "seed": "3"}),
        PreferencePair("2", "a cat", "a cat", "c.png", "b.png"),
    )
    assert data.source.endswith(name)
    reference = read_preferences(write(tmp_path / "reference.json", [PAIR | full, PAIR | {"chosen": "c.png"}]))
    assert data.sha256 == reference.sha256
    assert read_preferences(write(tmp_path / "x.json", [PAIR])).sha256 != data.sha256


def test_the_published_paired_shape(tmp_path):
    records = [
        {"prompt_id": "p1", "prompt": "a cat", "chosen_path": "x/a.jpg", "c_rate": 5, "reject_path": "b", "r_rate": 1},
        {"prompt_id": "p2", "prompt": ["a cat", "a dog"], "chosen_path": "a", "c_rate": None, "reject_path": "a",
         "r_rate": None},
    ]  # fmt: skip
    one, other = read_preferences(write(tmp_path / "d.json", records)).records
    assert one == PreferencePair("1", "a cat", "a cat", "x/a.jpg", "b", 5.0, 1.0, {"prompt_id": "p1"})
    assert other == PreferencePair("2", "a cat", "a dog", "a", "a", None, None, {"prompt_id": "p2"})


def test_the_published_unpaired_shape_with_and_without_further_fields(tmp_path):
    bare = {"path": "a.jpg", "label": 0, "prompt": ""}
    free = {"safety_label": "Unsafe", "category": "Violence", "source": "Lexica", "boxes": [1, 2], "score": None}
    data = read_preferences(write(tmp_path / "d.json", [bare, bare | free, bare | {"id": "x", "label": 1}]))
    assert data.kind == "unpaired"
    group = {"safety_label": "Unsafe", "category": "Violence", "source": "Lexica"}
    assert data.records == (
        LabelledImage("1", "", "a.jpg", 0),
        LabelledImage("2", "", "a.jpg", 0, group),
        LabelledImage("x", "", "a.jpg", 1),
    )


@pytest.mark.parametrize("name", ["d.json", "d.parquet"])
def test_rankings_become_every_pair_with_different_ranks(tmp_path, name):
    records = [
        {"id": "q", "prompt": "p", "generations": ["a", "b", "c", "d"], "ranking": [2, 1, 2, 3]},
        {"id": "r", "prompt": "p", "generations": ["e", "f"], "ranking": [1, 1]},
    ]
    data = read_preferences(write(tmp_path / name, records), image_root="/i")
    # Ranks 2 1 2 3: six pairs of four images less the tie of a and c.
    assert [(r.pair_id, r.chosen, r.rejected) for r in data.records] == [
        ("q:1>0", "/i/b", "/i/a"),
        ("q:0>3", "/i/a", "/i/d"),
        ("q:1>2", "/i/b", "/i/c"),
        ("q:1>3", "/i/b", "/i/d"),
        ("q:2>3", "/i/c", "/i/d"),
    ]
    assert (data.kind, data.ties) == ("paired", 1)
    only_ties = write(tmp_path / f"t-{name}", records[1:])
    assert "1 rankings without two different ranks" in refusal(only_ties)


def test_hard_negatives_in_parquet_have_a_column(tmp_path):
    records = [PAIR | {"rejected_prompt": "a dog"}, PAIR | {"rejected_prompt": None}]
    found = read_preferences(write(tmp_path / "d.parquet", records)).records
    assert [one.rejected_prompt for one in found] == ["a dog", "a cat"]


def test_fields_are_mapped_and_their_usual_names_are_then_free(tmp_path):
    record = {"caption": "a cat", "file": "a.png", "path": "elsewhere", "is_safe": 1}
    uri = write(tmp_path / "d.jsonl", [record])
    found = read_preferences(uri, fields={"prompt": "caption", "image": "file", "label": "is_safe"}).records
    assert found == (LabelledImage("1", "a cat", "a.png", 1, {"path": "elsewhere"}),)
    assert "'colour' is not a field of preference data; use one of pair_id" in refusal(uri, fields={"colour": "x"})
    assert "image= names no key" in refusal(uri, fields={"image": ""})
    assert "label=lable, but no record has the key 'lable'" in refusal(uri, fields={"label": "lable"})


@pytest.mark.parametrize(
    ("written", "labels", "label"),
    [
        (1.0, None, 1),
        (0, None, 0),
        ("safe", {"safe": 1, "unsafe": 0}, 1),
        (True, {"true": 0, "false": 1}, 0),
        (1, {"1": 0, "0": 1}, 0),
        (2.0, {"2": 1}, 1),
    ],
)
def test_labels(tmp_path, written, labels, label):
    (found,) = read_preferences(write(tmp_path / "d.json", [IMAGE | {"label": written}]), labels=labels).records
    assert found.label == label
    assert type(found.label) is int


@pytest.mark.parametrize("written", [True, "safe", "1", 2, 0.5, float("nan"), [1]])
def test_labels_that_nobody_has_explained(tmp_path, written):
    message = refusal(write(tmp_path / "d.json", [IMAGE | {"label": written}]))
    assert "record 1: label is " in message
    assert "--label" in message


def test_labels_outside_of_the_given_ones(tmp_path):
    uri = write(tmp_path / "d.json", [IMAGE])
    assert "label 1 is not among the given labels (safe=1); add it" in refusal(uri, labels={"safe": 1})
    assert "label safe=2; a label means 0 or 1" in refusal(uri, labels={"safe": 2})


def test_image_roots(tmp_path, monkeypatch):
    names = ["x/a.png", "s3://bucket/b.png", "/c.png", "file:///d.png"]
    records = [IMAGE | {"image": name} for name in names]
    uri = write(tmp_path / "d.json", records)

    def images(root):
        return [uri for record in read_preferences(uri_of, image_root=root).records for uri in image_uris(record)]

    uri_of = uri
    assert images(None) == names
    assert images("s3://root/deep/") == ["s3://root/deep/x/a.png", *names[1:]]
    monkeypatch.chdir(tmp_path)
    assert images("here") == [f"{tmp_path}/here/x/a.png", *names[1:]]
    assert read_preferences(uri, image_root="s3://root").sha256 == read_preferences(uri).sha256
    assert "not an S3 URI" in refusal(uri, image_root="s3:///x")


MALFORMED = [
    (PAIR | {"rejected": None}, "'chosen' is there and no 'rejected'; add it, or map rejected to a key that it has"),
    ({"prompt": "x", "img": "a", "y": 1}, "neither chosen and rejected, nor image and label, nor generations and"),
    ({}, "it has: none"),
    (PAIR | IMAGE, "fits more than one shape (paired and unpaired)"),
    (PAIR | {"chosen_path": "z"}, "chosen stands under chosen and chosen_path; remove one, or map chosen=chosen"),
    ({key: PAIR[key] for key in ("chosen", "rejected")}, "no prompt; an empty one must be an empty string"),
    (PAIR | {"prompt": 3}, "prompt is 3, not text"),
    (PAIR | {"prompt": "\ud800"}, "prompt holds half of a surrogate pair"),
    (PAIR | {"prompt": ["one"]}, "prompt is a list of 1; write [of chosen, of rejected]"),
    (PAIR | {"prompt": ["one", None]}, "no prompt[1]"),
    (PAIR | {"prompt": ["a", "b"], "rejected_prompt": "c"}, "prompt is a list, and there is a rejected_prompt too"),
    (PAIR | {"rejected_prompt": 4}, "rejected_prompt is 4, not text"),
    (PAIR | {"chosen": ""}, "chosen is '', which names no image"),
    (PAIR | {"chosen": "a\0b"}, "which names no image"),
    (PAIR | {"chosen": "s3://"}, "which names no image"),
    (PAIR | {"chosen": 5}, "chosen is 5, not text"),
    (PAIR | {"chosen": "x/../../secret"}, "leads upwards"),
    (PAIR | {"chosen": "s3://b/../c"}, "leads upwards"),
    (PAIR | {"chosen": "https://host/a.png"}, "images are read from s3:// or a path"),
    (PAIR | {"chosen_rate": "good"}, "chosen_rate is 'good'; write a finite number"),
    (PAIR | {"chosen_rate": True}, "chosen_rate is True"),
    (PAIR | {"r_rate": float("inf")}, "rejected_rate is inf"),
    (PAIR | {"rejected_rate": 10**400}, "rejected_rate is 1000"),
    (PAIR | {"pair_id": ""}, "pair_id is ''; write text or a whole number"),
    (PAIR | {"id": 1.5}, "pair_id is 1.5"),
    (PAIR | {"pair_id": "\udfff"}, "pair_id holds half of a surrogate pair"),
    ({"prompt": "x", "generations": ["a", "b"], "ranking": [1]}, "generations and ranking must be lists of one length"),
    ({"prompt": "x", "generations": "ab", "ranking": [1, 2]}, "generations and ranking must be lists of one length"),
    ({"prompt": "x", "generations": ["a"], "ranking": [1]}, "1 generations; a ranking needs 2 to 1000"),
    ({"prompt": "x", "generations": ["a", None], "ranking": [1, 2]}, "no generations[1]"),
    ({"prompt": "x", "generations": ["a", "b"], "ranking": [1, 2.5]}, "ranking[1] is 2.5; write a whole number"),
    ({"prompt": "x", "generations": ["a", "b"], "ranking": [1, True]}, "ranking[1] is True"),
    ({"prompt": "x", "generations": ["a", "b"]}, "'generations' is there and no 'ranking'"),
    (["a"], "a JSON list, not an object"),
    (None, "a JSON null, not an object"),
]


@pytest.mark.parametrize(("record", "message"), MALFORMED)
def test_malformed_records(tmp_path, record, message):
    uri = write(tmp_path / "d.jsonl", [PAIR, record])
    found = refusal(uri)
    assert found.startswith(f"{uri}: 1 of 2 records are malformed\n{uri}, record 2: ")
    assert message in found


def test_every_malformed_record_counts_and_the_first_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "MAX_LISTED", 3)
    lines = [json.dumps(PAIR), "", "{", '{"label": 0, "label": 1}', "[", '"x"', '{"a": {"b": 1, "b": 2}}']
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    head, third, fourth, fifth, more = refusal(str(path)).split("\n")
    assert head == f"{path}: 5 of 6 records are malformed"
    assert third.startswith(f"{path}, record 3: not JSON: ")
    assert fourth == f"{path}, record 4: the key 'label' stands there twice; keep one"
    assert fifth.startswith(f"{path}, record 5: not JSON: ")
    assert more == "and 2 more"


def test_pairs_mixed_with_labelled_images(tmp_path):
    uri = write(tmp_path / "d.jsonl", [PAIR, PAIR, IMAGE])
    message = refusal(uri)
    assert message == f"{uri} mixes pairs (record 1) with labelled images (record 3); write them to two files"
    records = [IMAGE, {"prompt": "x", "generations": ["a", "b"], "ranking": [1, 2]}]
    message = refusal(write(tmp_path / "d.parquet", records))
    assert "mixes pairs (record 2) with labelled images (record 1)" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b"", "is not JSON"),
        ("d.json", b"[]", "holds no record"),
        ("d.jsonl", b"\n\n", "holds no record"),
        ("d.json", json.dumps(PAIR).encode(), "holds a JSON object; expected a list of records"),
        ("d.json", b'{"a": 1}\n{"a": 2}\n', "JSON lines belong into a file that ends in .jsonl"),
        ("d.json", b"[" * 200_000, "is not JSON"),
        ("d.json", b'[{"prompt": "\xff"}]', "is not JSON: 'utf-8' codec can't decode"),
        ("d.json.gz", b"no gzip", "is damaged or no gzip file"),
        ("d.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], "is damaged or no gzip file"),
        ("d.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("d.csv", b"a,b", "a file of records ends in .json, .jsonl"),
        ("d.parquet.gz", b"", "a file of records ends in .json, .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert message in refusal(str(path))
    assert name in refusal(str(path))


def test_absent_files_and_folders(tmp_path):
    (tmp_path / "d.json").mkdir()
    assert f"no such file: {tmp_path}/nothing.json" in refusal(f"{tmp_path}/nothing.json")
    assert "is no file" in refusal(f"{tmp_path}/d.json")
    assert "unsupported URI scheme 'https'" in refusal("https://host/d.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert len(read_preferences(str(path)).records) == 1


def test_odd_parquet_files(tmp_path):
    one = pa.array(["x"])
    twice = pa.Table.from_arrays([one, one, one], names=["prompt", "chosen", "chosen"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "has two columns 'chosen'" in refusal(str(tmp_path / "twice.parquet"))
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")])
    pq.write_table(pa.table({"prompt": latin, "chosen": one, "rejected": one}), tmp_path / "latin.parquet")
    assert "in records 1 to 1024: text that is not UTF-8" in refusal(str(tmp_path / "latin.parquet"))
    # Images in the table are not read, and neither are times and structs.
    table = pa.table({"prompt": one, "image": pa.array([b"png"]), "label": pa.array([1], pa.int8())})
    pq.write_table(table, tmp_path / "bytes.parquet")
    assert "'label' is there and no 'image'" in refusal(str(tmp_path / "bytes.parquet"))
    category = pa.array(["Hate"]).dictionary_encode()
    pq.write_table(
        table.set_column(1, "image", one).append_column("category", category), tmp_path / "dictionary.parquet"
    )
    (found,) = read_preferences(str(tmp_path / "dictionary.parquet")).records
    assert found.group == {"category": "Hate"}


@pytest.mark.parametrize("name", ["d.json", "d.jsonl.gz", "d.parquet"])
def test_sizes_are_bounded(tmp_path, monkeypatch, name):
    uri = write(tmp_path / name, [PAIR | {"prompt": "long " * 1000}] * 50)
    assert len(read_preferences(uri).records) == 50
    monkeypatch.setattr(preferences, "MAX_RECORDS", 49)
    assert "holds more than 49 records" in refusal(uri)
    monkeypatch.setattr(preferences, "MAX_RECORDS", 50)
    # 250 KB of prompts; packed, and in the dictionary of Parquet, they take less than the limit.
    monkeypatch.setattr(record_files, "MAX_FILE_BYTES", 100_000)
    expected = "is larger than max_bytes=100000" if name == "d.json" else "unpacks to more than max_file_bytes=100000"
    assert expected in refusal(uri)


def test_from_s3(any_s3, tmp_path):
    bucket = f"preferences-{tmp_path.name.replace('_', '-').lower()}"[:60].rstrip("-")
    client(any_s3).create_bucket(Bucket=bucket)
    for name in FORMATS:
        write(tmp_path / name, [PAIR])
        storage.put_file(f"s3://{bucket}/deep/{name}", tmp_path / name)
        data = read_preferences(f"s3://{bucket}/deep/{name}", image_root=f"s3://{bucket}/images")
        assert image_uris(data.records[0]) == (f"s3://{bucket}/images/a.png", f"s3://{bucket}/images/b.png")
    assert "no such file" in refusal(f"s3://{bucket}/nothing.json")
    assert "no such file" in refusal("s3://no-such-bucket-here/d.json")
