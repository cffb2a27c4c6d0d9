"""Where image URIs may point, and what a failed read is called. Object stores: test_jobs_storage_s3."""

from __future__ import annotations

import asyncio

import pytest

from jobs.fetch import FetchRules, allowed_buckets, check_image_root, fetch_all, resolve
from model.errors import ConfigError, ErrorCode, InputError


def rules(root=None, buckets=("good",), limit=100):
    return FetchRules(root, frozenset(buckets), limit, concurrency=4)


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("ftp://host/a.png", ErrorCode.URI_SCHEME_NOT_ALLOWED),
        ("http://169.254.169.254/latest", ErrorCode.URI_SCHEME_NOT_ALLOWED),
        ("S3://good/a.png", ErrorCode.URI_SCHEME_NOT_ALLOWED),
        ("s3://evil/a.png", ErrorCode.BUCKET_NOT_ALLOWED),
        ("s3://good", ErrorCode.BAD_IMAGE_URI),
        ("s3:///a.png", ErrorCode.BAD_IMAGE_URI),
        ("a.png", ErrorCode.BAD_IMAGE_URI),
    ],
)
def test_refused_uris(uri, code):
    with pytest.raises(InputError) as caught:
        resolve(uri, rules())
    assert caught.value.code == code
    assert uri in caught.value.message


def test_relative_paths_stay_below_the_root(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret").write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    assert resolve("x/a.png", rules("s3://good/images")) == "s3://good/images/x/a.png"
    assert resolve("a.png", rules(str(root))) == str(root / "a.png")
    assert resolve(f"file://{root}/a.png", rules(str(root))) == str(root / "a.png")
    for uri in ("../secret", "x/../../secret", "/etc/passwd", "file:///etc/passwd", "link", "a\0b"):
        with pytest.raises(InputError) as caught:
            resolve(uri, rules(str(root)))
        assert caught.value.code == ErrorCode.BAD_IMAGE_URI
    for uri in ("../other/a.png", "..//..//a"):
        with pytest.raises(InputError):
            resolve(uri, rules("s3://good/images"))


def test_reads_keep_order_and_each_failure_is_its_own(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 100)
    (tmp_path / "b").write_bytes(b"2" * 101)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    results = asyncio.run(fetch_all(["a", "b", "gone", "empty", "folder"], rules(str(tmp_path))))
    assert results[0] == b"1" * 100
    assert results[3] == b""
    codes = [result.code for result in (results[1], results[2], results[4])]
    assert codes == [ErrorCode.IMAGE_TOO_MANY_BYTES, ErrorCode.IMAGE_NOT_FOUND, ErrorCode.IMAGE_NOT_FOUND]
    assert "101 bytes exceed max_image_bytes=100" in results[1].message


def test_buckets_that_may_be_read():
    assert allowed_buckets("s3://logs/x", None, ()) == {"logs"}
    assert allowed_buckets("s3://logs/x", "s3://images/y", ()) == {"images"}
    assert allowed_buckets("s3://logs/x", "s3://images/y", ("more",)) == {"images", "more"}
    assert allowed_buckets("/logs", None, ()) == frozenset()


def test_a_root_that_is_no_folder(tmp_path):
    check_image_root(str(tmp_path))
    with pytest.raises(ConfigError, match="nowhere"):
        check_image_root(str(tmp_path / "nowhere"))
