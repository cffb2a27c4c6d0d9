"""The storage module against a local folder, moto, and a real Ceph radosgw."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.fetch import FetchRules, fetch_all
from jobs.lock import NightLock
from jobs.logs import list_logs
from model import storage
from model.errors import ConfigError, ErrorCode, TransientError
from tests.job_helpers import NIGHT
from tests.s3_fault_proxy import FaultProxy

_BUCKETS = (f"storage-{number}" for number in itertools.count())


def new_bucket(server):
    name = next(_BUCKETS)
    boto3.Session().client("s3", endpoint_url=server.endpoint).create_bucket(Bucket=name)
    return name


@pytest.fixture
def bucket(any_s3):
    return new_bucket(any_s3)


@pytest.fixture(params=["local", "s3_server", pytest.param("ceph", marks=pytest.mark.ceph)])
def root(request, tmp_path, monkeypatch):
    if request.param == "local":
        return str(tmp_path / "root")
    server = request.getfixturevalue(request.param)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{new_bucket(server)}/root"


def test_put_get_head_list_delete(root):
    uri = storage.join(root, "a/b c.txt")
    storage.put(uri, b"one")
    storage.put(uri, b"two")
    assert storage.get(uri) == b"two"
    assert storage.head(uri).size_bytes == 3
    assert [entry.uri for entry in storage.list_objects(root)] == [uri]
    assert [entry.uri for entry in storage.list_objects(uri)] == [uri]
    assert next(storage.list_objects(root)).version == storage.head(uri).version
    storage.delete(uri)
    storage.delete(uri)
    assert storage.list_if_any(root) == []
    with pytest.raises(FileNotFoundError):
        storage.get(uri)
    with pytest.raises(FileNotFoundError):
        storage.head(uri)


def test_a_conditional_put_succeeds_once(root):
    uri = storage.join(root, "x.json")
    storage.put(uri, b"first", if_absent=True)
    with pytest.raises(FileExistsError):
        storage.put(uri, b"second", if_absent=True)
    assert storage.get(uri) == b"first"


def test_reads_are_bounded(root):
    uri = storage.join(root, "x")
    storage.put(uri, b"12345")
    assert storage.get(uri, max_bytes=5) == b"12345"
    with pytest.raises(ConfigError, match="max_bytes=4"):
        storage.get(uri, max_bytes=4)


def test_a_folder_is_no_prefix(root):
    storage.put(storage.join(root, "logs/a"), b"")
    storage.put(storage.join(root, "logs-old/a"), b"")
    assert [entry.uri for entry in storage.list_objects(storage.join(root, "logs"))] == [storage.join(root, "logs/a")]


def test_versions_change_with_content(root):
    uri = storage.join(root, "x")
    storage.put(uri, b"1")
    first = storage.head(uri).version
    storage.put(uri, b"2")
    assert storage.head(uri).version != first


def test_files_travel_whole_and_parquet_is_read_back(root, tmp_path):
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    table = pa.table({"x": list(range(100_000))})
    pq.write_table(table, source)
    uri = storage.join(root, "x.parquet")
    storage.put_file(uri, source)
    storage.get_file(uri, target)
    assert target.read_bytes() == source.read_bytes()
    filesystem, path = storage.arrow_filesystem(uri)
    assert pq.read_table(path, filesystem=filesystem) == table
    pq.write_table(table, f"{path}.copy", filesystem=filesystem)
    assert storage.head(f"{uri}.copy").size_bytes == source.stat().st_size


def test_absent_bucket_and_folder_are_named(any_s3, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such bucket: nowhere"):
        list(storage.list_objects("s3://nowhere/x"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(storage.list_objects(str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="no such bucket"):
        list_logs("s3://nowhere/logs", NIGHT)


@pytest.mark.ceph
def test_wrong_keys_are_refused_by_a_server_that_checks_them(ceph, monkeypatch):
    for name, value in ceph.env.items():
        monkeypatch.setenv(name, value)
    boto3.Session().client("s3", endpoint_url=ceph.endpoint).create_bucket(Bucket="locked")
    storage.put("s3://locked/a.png", b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    with pytest.raises(PermissionError, match="check the keys"):
        storage.get("s3://locked/a.png")
    with pytest.raises(ConfigError, match="S3 refused access"):
        list_logs("s3://locked/logs", NIGHT)
    rules = FetchRules(None, frozenset({"locked"}), 100, 2)
    (result,) = asyncio.run(fetch_all(["s3://locked/a.png"], rules))
    assert result.code == ErrorCode.IMAGE_FORBIDDEN


def test_an_absent_server_is_an_error_soon(monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(TransientError, match="did not answer"):
        list_logs("s3://b/logs", NIGHT)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("uri", "environment", "message"),
    [
        ("s3://Bad_Bucket!/x", {}, "Bad_Bucket!"),
        ("s3://b/x", {"AWS_PROFILE": "nope"}, "nope"),
        ("s3://b/x", {"AWS_ENDPOINT_URL": "no url"}, "AWS_ENDPOINT_URL='no url'"),
        ("s3://b/x", {"AWS_REGION": "no region!"}, "no region!"),
        ("s3://b/x", {"AWS_CONFIG_FILE": "broken"}, "broken"),
        ("s3://b/x", {"AWS_DEFAULTS_MODE": "fast"}, "fast"),
    ],
)
def test_unusable_settings_are_configuration_errors_in_one_line(monkeypatch, tmp_path, uri, environment, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").write_text("[default\nx")
    keys = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    for name, value in (keys | environment).items():
        monkeypatch.setenv(name, value)
    storage._boto3_client.cache_clear()
    try:
        for call in (storage.get, storage.head, lambda uri: list(storage.list_objects(uri, is_probe=True))):
            with pytest.raises(ConfigError, match=re.escape(message)) as caught:
                call(uri)
            assert "\n" not in str(caught.value)
    finally:
        storage._boto3_client.cache_clear()


def test_the_first_look_bears_a_third_of_the_requests_failing(s3_server, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = new_bucket(s3_server)
    storage.put(f"s3://{bucket}/a", b"")
    with FaultProxy(s3_server.endpoint, probability=0.3, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for _ in range(25):
            assert len(list(storage.list_objects(f"s3://{bucket}", is_probe=True))) == 1
        assert proxy.faults > 5


def test_left_overs_of_a_killed_put_are_listed_on_request(tmp_path):
    storage.put(str(tmp_path / "x"), b"1")
    (tmp_path / ".tmp-1-abc-x").write_bytes(b"1")
    assert [entry.uri for entry in storage.list_objects(str(tmp_path))] == [str(tmp_path / "x")]
    both = [str(tmp_path / ".tmp-1-abc-x"), str(tmp_path / "x")]
    assert [entry.uri for entry in storage.list_objects(str(tmp_path), with_temporary=True)] == both
    assert [entry.uri for entry in storage.list_if_any(str(tmp_path), with_temporary=True)] == both
    assert storage.list_if_any(str(tmp_path / "nowhere"), with_temporary=True) == []


def test_the_stores_of_aws_itself_need_no_endpoint(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert "bucket-of-aws" in repr(storage.image_store("bucket-of-aws"))
    assert storage.arrow_filesystem("s3://bucket-of-aws/a")[1] == "bucket-of-aws/a"


def test_images_are_read_and_each_failure_is_named(bucket):
    storage.put(f"s3://{bucket}/i/a.png", b"1" * 100)
    storage.put(f"s3://{bucket}/i/b.png", b"2" * 101)
    storage.put(f"s3://{bucket}/i/empty", b"")
    storage.put(f"s3://{bucket}/i/odd name %41 \N{CAT FACE}.png", b"odd")
    rules = FetchRules(f"s3://{bucket}/i", frozenset({bucket, "nowhere"}), 100, 4)
    uris = [
        "a.png",
        f"s3://{bucket}/i/b.png",
        "gone",
        "empty",
        "odd name %41 \N{CAT FACE}.png",
        "s3://nowhere/x",
        "a//b",
    ]
    results = asyncio.run(fetch_all(uris, rules))
    assert [results[0], results[3], results[4]] == [b"1" * 100, b"", b"odd"]
    codes = [results[index].code for index in (1, 2, 5, 6)]
    assert codes[:3] == [ErrorCode.IMAGE_TOO_MANY_BYTES, ErrorCode.IMAGE_NOT_FOUND, ErrorCode.IMAGE_NOT_FOUND]
    assert codes[3] == ErrorCode.BAD_IMAGE_URI


def test_a_slash_more_is_another_object(bucket):
    client = boto3.Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in ("a/b", "x"):
        storage.put(f"s3://{bucket}/{key}", b"wrong")
    for key in ("a//b", "/x"):
        client.put_object(Bucket=bucket, Key=key, Body=b"meant")
    rules = FetchRules(f"s3://{bucket}", frozenset({bucket}), 100, 4)
    uris = [f"s3://{bucket}/a//b", f"s3://{bucket}//x", "a//b", "/x", "./x", "x/"]
    results = asyncio.run(fetch_all(uris, rules))
    assert [result.code for result in results] == [ErrorCode.BAD_IMAGE_URI] * len(uris)


def test_no_read_is_lost_when_a_third_of_the_requests_fail(s3_server, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = new_bucket(s3_server)
    for number in range(60):
        storage.put(f"s3://{bucket}/{number}", str(number).encode())
    with FaultProxy(s3_server.endpoint, probability=0.3, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        rules = FetchRules(None, frozenset({bucket}), 100, 16)
        results = asyncio.run(fetch_all([f"s3://{bucket}/{number}" for number in range(60)], rules))
        assert results == [str(number).encode() for number in range(60)]
        assert proxy.faults > 5
        assert len(list(storage.list_objects(f"s3://{bucket}"))) == 60


def test_the_night_lock_holds_on_object_stores(bucket):
    output = f"s3://{bucket}/out"
    first = NightLock(output, NIGHT, "first", lambda line: None, lambda: None)
    with first, pytest.raises(ConfigError, match="run first"):
        NightLock(output, NIGHT, "second", lambda line: None, lambda: None).__enter__()
    with NightLock(output, NIGHT, "third", lambda line: None, lambda: None) as third:
        third.check()
