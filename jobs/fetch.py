"""From an image URI to bytes: resolves, checks where it may point, and reads with bounds. Knows no Ray."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import storage
from model.errors import ConfigError, ErrorCode, InputError, Stage, TransientError

_MAX_KEY_BYTES = 1024  # of UTF-8, for S3 and all that copy it; a longer one is answered 400
_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)")  # in obstore's messages


@dataclass(frozen=True)
class FetchRules:
    """Where image URIs may point. ``image_root``: start of relative ones; the only local folder that is read."""

    image_root: str | None
    buckets: frozenset[str]
    max_image_bytes: int
    concurrency: int


def allowed_buckets(input_uri: str, image_root: str | None, allow_bucket: Sequence[str]) -> frozenset[str]:
    """``--allow-bucket`` and the bucket of ``--image-root``; with neither, the bucket that holds the logs."""
    roots = {storage.split_s3(image_root)[0]} if image_root and storage.is_s3(image_root) else set()
    named = set(allow_bucket) | roots
    if not named and storage.is_s3(input_uri):
        named = {storage.split_s3(input_uri)[0]}
    return frozenset(named)


async def fetch_all(uris: Sequence[str], rules: FetchRules) -> list[bytes | InputError]:
    """The bytes of each image, or the error of its row, in order; ``rules.concurrency`` reads in flight."""
    gate = asyncio.Semaphore(rules.concurrency)

    async def one(uri: str) -> bytes | InputError:
        async with gate:
            try:
                return await _fetch(uri, rules)
            except InputError as error:
                return error
            except TransientError as error:
                return InputError(ErrorCode.STORAGE_UNAVAILABLE, Stage.FETCH, f"{uri[:300]}: {error}")

    return await asyncio.gather(*(one(uri) for uri in uris))


async def _fetch(uri: str, rules: FetchRules) -> bytes:
    resolved = resolve(uri, rules)
    if storage.is_s3(resolved):
        return await _read_s3(resolved, rules.max_image_bytes)
    return await asyncio.to_thread(_read_local, resolved, rules.max_image_bytes)


def resolve(uri: str, rules: FetchRules) -> str:
    """Absolute ``s3://`` URI or local path that the rules allow. Raises ``InputError`` (stage fetch)."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return _under_root(rest if separator else uri, uri, rules)
    if scheme != "s3":
        raise _refused(
            ErrorCode.URI_SCHEME_NOT_ALLOWED, uri, f"scheme {scheme[:20]!r} is not read; use s3:// or a path"
        )
    bucket, _, key = rest.partition("/")
    if not bucket or not key:
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, "expected s3://bucket/key")
    if bucket not in rules.buckets:
        allowed = ", ".join(sorted(rules.buckets)) or "none"
        raise _refused(
            ErrorCode.BUCKET_NOT_ALLOWED, uri, f"bucket {bucket!r} is not allowed ({allowed}); use --allow-bucket"
        )
    _check_key(key, uri)
    return uri


def _check_key(key: str, uri: str) -> None:
    """Refuses keys that the client would read as another object's: it drops slashes at the ends without a word."""
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, f"key longer than {_MAX_KEY_BYTES} bytes")
    if {"", ".", ".."} & set(key.split("/")):
        reason = "a key with an empty, '.' or '..' part, or a slash at an end, cannot be read; copy it to another key"
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, reason)


def _under_root(path: str, uri: str, rules: FetchRules) -> str:
    root = rules.image_root
    if root is None:
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, "a path needs --image-root")
    if ".." in path.split("/") or "\0" in path:
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, "a path must stay below --image-root")
    if storage.is_s3(root):
        full_uri = f"{root.rstrip('/')}/{path}"
        _check_key(storage.split_s3(full_uri)[1], uri)
        return full_uri
    # Links are followed before the comparison: a link inside the root must not lead out of it.
    base = storage.local_path(root).resolve()
    try:
        full = (base / path).resolve()
    except (OSError, RuntimeError) as error:  # a name too long, or links in a circle
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, f"not a usable path: {_short(error)}") from error
    if not full.is_relative_to(base):
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, "a path must stay below --image-root")
    return str(full)


async def _read_s3(uri: str, max_bytes: int) -> bytes:
    from obstore import exceptions, get_async

    bucket, key = storage.split_s3(uri)
    try:
        store = storage.image_store(bucket)
    except PermissionError as error:
        raise _refused(ErrorCode.IMAGE_FORBIDDEN, uri, str(error)) from error
    try:
        reply: Any = await get_async(store, key)
        if reply.meta["size"] > max_bytes:
            raise _too_large(uri, reply.meta["size"], max_bytes)
        return bytes(await reply.bytes_async())
    except FileNotFoundError as error:
        raise _refused(ErrorCode.IMAGE_NOT_FOUND, uri, "no such object") from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise _refused(ErrorCode.IMAGE_FORBIDDEN, uri, "access denied; check keys and bucket policy") from error
    except (exceptions.InvalidPathError, ValueError) as error:
        raise _refused(ErrorCode.BAD_IMAGE_URI, uri, f"not a usable key: {_short(error)}") from error
    except (
        exceptions.GenericError,
        exceptions.AlreadyExistsError,
        exceptions.PreconditionError,
        exceptions.NotModifiedError,
        exceptions.NotSupportedError,
    ) as error:
        # What is left after the client's own retries: server errors, resets, time-outs, and answers that make
        # no sense for a read (409, 412, 304, 501).
        status = _STATUS.search(str(error))
        raise TransientError(f"S3 answered {status[1].strip()}" if status else _short(error)) from error


def _read_local(path: str, max_bytes: int) -> bytes:
    try:
        if not Path(path).is_file():  # nor a folder, pipe or device
            raise _refused(ErrorCode.IMAGE_NOT_FOUND, path, "no such file")
        size = Path(path).stat().st_size
        if size > max_bytes:
            raise _too_large(path, size, max_bytes)
        with Path(path).open("rb") as file:
            return file.read(max_bytes)
    except PermissionError as error:
        raise _refused(ErrorCode.IMAGE_FORBIDDEN, path, "no permission to read it") from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise _refused(ErrorCode.BAD_IMAGE_URI, path, f"not a usable path: {error.strerror}") from error


def _refused(code: ErrorCode, uri: str, reason: str) -> InputError:
    return InputError(code, Stage.FETCH, f"image_uri {uri[:300]!r}: {reason}")


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]


def _too_large(uri: str, size: int, max_bytes: int) -> InputError:
    return _refused(ErrorCode.IMAGE_TOO_MANY_BYTES, uri, f"{size} bytes exceed max_image_bytes={max_bytes}")


def check_image_root(image_root: str | None) -> None:
    """Raises ``ConfigError`` when a local ``--image-root`` is no folder."""
    if image_root and not storage.is_s3(image_root) and not storage.local_path(image_root).is_dir():
        raise ConfigError(f"--image-root {image_root} is no folder")
