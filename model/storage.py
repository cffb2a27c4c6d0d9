"""Reads and writes of ``s3://`` objects and local files: the only module here that knows a storage client.

boto3 for the control plane (listing, conditional puts, precise error codes), obstore for images (a tenth of
boto3's CPU per object), pyarrow for Parquet. All three are imported when called. Endpoint, region and keys
come from the environment and boto3's usual chain; nothing here takes or logs a secret.

Errors: ``FileNotFoundError``, ``PermissionError``, ``FileExistsError`` (conditional put), ``ConfigError``
(unusable URI, profile, region or endpoint) and ``TransientError`` (still failing after the retries). Anything
else is unknown and propagates.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import ConfigError, TransientError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

MAX_CONTROL_BYTES = 256 * 2**20  # manifests, reports, policies: far below this, and never unbounded
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 30
_ATTEMPTS = 8  # with standard back-off and jitter; 8 lost no read at a 30 % fault rate
_PROBE_ATTEMPTS = 2  # of a connection that may lead nowhere: two time-outs and a back-off stay below 15 s
_TEMPORARY = ".tmp-"
_SET_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_FORBIDDEN = {
    "401", "403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken",
    "InvalidToken", "AllAccessDisabled", "RequestTimeTooSkewed",
}  # fmt: skip
_EXISTS = {"412", "PreconditionFailed", "ConditionalRequestConflict"}
_BUSY = {"500", "502", "503", "504", "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling"}


@dataclass(frozen=True)
class StoredObject:
    """One listed object. ``version`` is the ETag (S3) or size and modification time (local file)."""

    uri: str
    size_bytes: int
    version: str
    modified_at_s: float


def split_s3(uri: str) -> tuple[str, str]:
    """``s3://bucket/key`` -> ``(bucket, key)``; the key may be empty. Raises ``ConfigError``."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise ConfigError(f"not an S3 URI: {uri!r}; expected s3://bucket/key")
    return bucket, key


def is_s3(uri: str) -> bool:
    """True for ``s3://…``, False for a local path or ``file://…``; ``ConfigError`` for another scheme."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return False
    if scheme != "s3":
        raise ConfigError(f"unsupported URI scheme {scheme!r} in {uri!r}; use s3://bucket/key or a local path")
    return True


def local_path(uri: str) -> Path:
    """Path of a local URI."""
    return Path(uri.removeprefix("file://")).expanduser()


def join(root: str, *parts: str) -> str:
    """Joins with single slashes, for both kinds of URI."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts if part)])


def get(uri: str, max_bytes: int = MAX_CONTROL_BYTES) -> bytes:
    """The whole object. Raises ``ConfigError`` when it is larger than ``max_bytes``."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        with _translated(uri):
            body = _client().get_object(Bucket=bucket, Key=key)["Body"]
            data: bytes = body.read(max_bytes + 1)
    else:
        with local_path(uri).open("rb") as file:
            data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ConfigError(f"{uri} is larger than max_bytes={max_bytes}")
    return data


def put(uri: str, data: bytes, *, if_absent: bool = False) -> None:
    """Writes the object whole or not at all; ``if_absent`` raises ``FileExistsError`` when it is there already."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with _translated(uri):
            _client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}-{path.name}")
    temporary.write_bytes(data)
    try:
        if if_absent:
            os.link(temporary, path)  # atomic, and fails when the name is taken
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def put_file(uri: str, source: Path) -> None:
    """Uploads a local file (in parts where large); readers see all of it or nothing."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        with _translated(uri):
            _client().upload_file(str(source), bucket, key)
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}-{path.name}")
    shutil.copyfile(source, temporary)
    temporary.replace(path)


def get_file(uri: str, target: Path) -> None:
    """Downloads an object to a local file, in parts where large."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        with _translated(uri):
            _client().download_file(bucket, key, str(target))
        return
    shutil.copyfile(local_path(uri), target)


def list_objects(prefix: str, *, is_probe: bool = False, with_temporary: bool = False) -> Iterator[StoredObject]:
    """Everything below ``prefix`` (taken as a folder), by name; a file's own URI gives that file.

    ``is_probe``: for the first look at a path that may be wrong; a server that cannot be reached is an error
    soon, one that answers with errors is still asked as often as ever. ``with_temporary``: also the local files
    that a killed ``put`` left half written. An absent S3 prefix gives nothing; an absent bucket or local folder
    raises ``FileNotFoundError``.
    """
    if is_s3(prefix):
        if is_probe:
            _check_reachable(prefix)
        yield from _list_s3(prefix)
        return
    root = local_path(prefix)
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        if with_temporary or not path.name.startswith(_TEMPORARY):
            try:
                found = _stat(path)
            except FileNotFoundError:
                continue  # gone since it was listed: another process renamed or removed it
            yield found


def list_if_any(prefix: str, *, with_temporary: bool = False) -> list[StoredObject]:
    """Everything below ``prefix``; an absent local folder holds nothing, as an absent S3 prefix does."""
    if not is_s3(prefix) and not local_path(prefix).exists():
        return []
    return list(list_objects(prefix, with_temporary=with_temporary))


def head(uri: str) -> StoredObject:
    """Size and version of one object."""
    if not is_s3(uri):
        return _stat(local_path(uri))
    bucket, key = split_s3(uri)
    with _translated(uri):
        reply = _client().head_object(Bucket=bucket, Key=key)
    return StoredObject(uri, reply["ContentLength"], reply["ETag"].strip('"'), reply["LastModified"].timestamp())


def delete(uri: str) -> None:
    """Removes one object; absent is fine."""
    if is_s3(uri):
        bucket, key = split_s3(uri)
        with _translated(uri):
            _client().delete_object(Bucket=bucket, Key=key)
        return
    local_path(uri).unlink(missing_ok=True)


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """A pyarrow filesystem for ``uri``, and the path in it."""
    from pyarrow import fs

    if not is_s3(uri):
        return fs.LocalFileSystem(), str(local_path(uri).absolute())
    return _arrow_s3(_environment()), "/".join(split_s3(uri))


def image_store(bucket: str) -> Any:
    """An obstore S3 store for one bucket: ten attempts with exponential back-off and jitter, 60 s in all."""
    return _image_store(bucket, _environment())


@dataclass(frozen=True)
class _Environment:
    """What decides a client. Clients are cached by it, so that a changed environment gets new ones."""

    endpoint: str | None
    region: str
    key_id: str | None


def _environment() -> _Environment:
    env = os.environ
    return _Environment(
        env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"),
        env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1",
        env.get("AWS_ACCESS_KEY_ID"),
    )


def _client(attempts: int = _ATTEMPTS) -> Any:
    return _boto3_client(_environment(), attempts)


@lru_cache(maxsize=16)
def _boto3_client(environment: _Environment, attempts: int) -> Any:
    from botocore.config import Config

    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Ceph and older servers refuse the checksum headers that are sent by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return _session(environment).client("s3", endpoint_url=environment.endpoint, config=config)
    except ValueError as error:  # botocore has no exception of its own for an endpoint that is no URL
        raise ConfigError(f"AWS_ENDPOINT_URL={environment.endpoint!r} cannot be used: {_one_line(error)}") from error


def _session(environment: _Environment) -> Any:
    """A session of its own: boto3's default one keeps the credentials that it first found."""
    import boto3
    from botocore.exceptions import ProfileNotFound

    try:
        return boto3.Session(region_name=environment.region)
    except ProfileNotFound as error:
        raise ConfigError(f"AWS_PROFILE cannot be used: {error}") from error


@lru_cache(maxsize=4)
def _arrow_s3(environment: _Environment) -> FileSystem:
    from pyarrow import fs

    # Read by the AWS SDK inside pyarrow; without it Ceph answers writes with an error.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    return fs.S3FileSystem(
        endpoint_override=environment.endpoint,
        region=environment.region,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_READ_TIMEOUT_S,
        # Three attempts lost reads at a 30 % fault rate, ten lost none.
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=10),
    )


@lru_cache(maxsize=64)
def _image_store(bucket: str, environment: _Environment) -> Any:
    from datetime import timedelta

    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    try:
        credentials = Boto3CredentialProvider(_session(environment))
    except ValueError as error:
        raise PermissionError(f"no S3 credentials for bucket {bucket}; {_SET_KEYS}") from error
    # An IP or localhost endpoint is spoken to by path; https stays required unless the endpoint says http.
    is_plain = (environment.endpoint or "").startswith("http://")
    # obstore refuses ``endpoint=None``: for AWS itself there must be none.
    endpoint = {"endpoint": environment.endpoint} if environment.endpoint else {}
    return S3Store(
        bucket,
        region=environment.region,
        **endpoint,
        credential_provider=credentials,
        client_options={"allow_http": is_plain, "connect_timeout": "5s", "timeout": "30s"},
        retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=60)},
    )


def _check_reachable(prefix: str) -> None:
    """Raises ``TransientError`` where no connection to the server comes about; what it answers is not judged here."""
    from botocore import exceptions

    bucket, key = split_s3(prefix)
    unreachable = (
        exceptions.EndpointConnectionError,
        exceptions.ConnectTimeoutError,
        exceptions.ProxyConnectionError,
        exceptions.SSLError,
    )
    with _translated(prefix):
        try:
            _client(_PROBE_ATTEMPTS).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
        except unreachable:
            raise
        except (exceptions.ClientError, exceptions.HTTPClientError):
            return  # the listing asks again, with all attempts


def _list_s3(prefix: str) -> Iterator[StoredObject]:
    bucket, key = split_s3(prefix)
    folder = key if not key or key.endswith("/") else f"{key}/"
    with _translated(prefix):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        for page in pages:
            for entry in page.get("Contents", []):
                # The prefix is a folder or one whole key: ``logs`` must not match ``logs-old/x``.
                if entry["Key"] == key or (entry["Key"].startswith(folder) and not entry["Key"].endswith("/")):
                    uri = f"s3://{bucket}/{entry['Key']}"
                    yield StoredObject(uri, entry["Size"], entry["ETag"].strip('"'), entry["LastModified"].timestamp())


def _stat(path: Path) -> StoredObject:
    facts = path.stat()
    return StoredObject(str(path), facts.st_size, f"{facts.st_size}-{facts.st_mtime_ns}", facts.st_mtime)


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """boto3's errors, in the terms of this module. The message names the object, never a key."""
    from boto3.exceptions import S3UploadFailedError
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _from_code(uri, error) from error
    except S3UploadFailedError as error:
        raise TransientError(f"upload of {uri} failed: {error}") from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise PermissionError(f"no S3 credentials for {uri}; {_SET_KEYS}") from error
    except _credential_errors() as error:
        raise PermissionError(f"no usable S3 credentials for {uri}: {_one_line(error)}") from error
    except _configuration_errors() as error:
        raise ConfigError(f"S3 cannot be used for {uri}: {_one_line(error)}") from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise TransientError(f"S3 did not answer for {uri}: {_one_line(error)}") from error


def _credential_errors() -> tuple[type[Exception], ...]:
    """Credentials are named but cannot be had, or are no longer good."""
    from botocore import exceptions

    return (
        exceptions.CredentialRetrievalError,
        exceptions.UnknownCredentialError,
        exceptions.RefreshWithMFAUnsupportedError,
        exceptions.SSOError,
        exceptions.TokenRetrievalError,
        exceptions.NoAuthTokenError,
    )


def _configuration_errors() -> tuple[type[Exception], ...]:
    """What botocore says of settings that no retry mends: a bucket's name, profile, region, or an AWS_* variable."""
    from botocore import exceptions

    return (
        exceptions.ParamValidationError,
        exceptions.ConfigNotFound,
        exceptions.ConfigParseError,
        exceptions.InfiniteLoopConfigError,
        exceptions.InvalidConfigError,
        exceptions.NoRegionError,
        exceptions.InvalidRegionError,
        exceptions.EndpointProviderError,
        exceptions.UnknownEndpointError,
        exceptions.EndpointVariantError,
        exceptions.InvalidEndpointConfigurationError,
        exceptions.InvalidDefaultsMode,
        exceptions.InvalidMaxRetryAttemptsError,
        exceptions.InvalidRetryConfigurationError,
        exceptions.InvalidRetryModeError,
        exceptions.InvalidS3AddressingStyleError,
        exceptions.InvalidS3UsEast1RegionalEndpointConfigError,
        exceptions.InvalidSTSRegionalEndpointsConfigError,
        exceptions.InvalidIMDSEndpointError,
        exceptions.InvalidIMDSEndpointModeError,
        exceptions.InvalidProxiesConfigError,
        exceptions.InvalidChecksumConfigError,
        exceptions.UnsupportedS3ConfigurationError,
        exceptions.UnsupportedS3AccesspointConfigurationError,
        exceptions.MissingDependencyException,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _from_code(uri: str, error: Any) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    if code == "NoSuchBucket":
        return FileNotFoundError(f"no such bucket: {split_s3(uri)[0]} (in {uri})")
    if {code, status} & _MISSING:
        return FileNotFoundError(f"no such object: {uri}")
    if {code, status} & _FORBIDDEN:
        return PermissionError(f"S3 refused access to {uri}: {code}; check the keys and the bucket policy")
    if {code, status} & _EXISTS:
        return FileExistsError(f"already exists: {uri}")
    if {code, status} & _BUSY:
        return TransientError(f"S3 failed for {uri} after {_ATTEMPTS} attempts: {code}")
    return error  # type: ignore[no-any-return]
