"""From a JSON, JSONL or Parquet file to its raw records: preference data, ratings, scores. Knows not what they mean.

A file is read whole, within ``MAX_FILE_BYTES``, from ``s3://`` or a local path. Records are numbered from 1, and in
JSONL by line, so that a message leads to the place.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from model import storage
from model.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Of the stored file, and again of what it unpacks to. 158,000 published pairs take about 60 MB of JSON; parsed,
# JSON takes some five times its size in memory.
MAX_FILE_BYTES = 512 * 2**20
_ROWS_PER_READ = 1024

Format = Literal["json", "jsonl", "parquet"]
_SUFFIXES: dict[str, Format] = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Fault:
    """What stands in the place of a record, and why it is none."""

    reason: str


def read_raw(uri: str) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Number and record of each entry of the file, in order.

    Raises ``ConfigError``: no such file, another format, too large, or not readable as a whole; ``PermissionError``
    and ``TransientError`` as ``model.storage`` does.
    """
    kind, is_packed = format_of(uri)
    data = _get(uri)
    if is_packed:
        data = _unpack(data, uri)
    if kind == "parquet":
        return _parquet(data, uri)
    return _jsonl(data) if kind == "jsonl" else _json(data, uri)


def all_records(uri: str, raw: Iterable[tuple[int, dict[str, Any] | Fault]]) -> list[dict[str, Any]]:
    """All records that ``read_raw`` gave for a file. Raises ``ConfigError`` for an entry that is none, or no entry."""
    records = []
    for number, record in raw:
        if isinstance(record, Fault):
            raise ConfigError(f"{uri}, record {number}: {record.reason}")
        records.append(record)
    if not records:
        raise ConfigError(f"{uri} holds no records")
    return records


def format_of(uri: str) -> tuple[Format, bool]:
    """Format by file name, and whether it is packed with gzip. Raises ``ConfigError``."""
    name = uri.rsplit("/", 1)[-1]
    plain = name.removesuffix(".gz")
    for suffix, kind in _SUFFIXES.items():
        if plain.endswith(suffix) and not (kind == "parquet" and plain != name):
            return kind, plain != name
    raise ConfigError(f"{uri}: a file of records ends in .json, .jsonl, .ndjson (each also with .gz) or .parquet")


def _get(uri: str) -> bytes:
    try:
        return storage.get(uri, MAX_FILE_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {uri}") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise ConfigError(f"{uri} is no file; name one file of records") from error


def _unpack(data: bytes, uri: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as file:
            unpacked = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{uri} is damaged or no gzip file ({error}); write it again") from error
    if len(unpacked) > MAX_FILE_BYTES:
        raise ConfigError(f"{uri} unpacks to more than max_file_bytes={MAX_FILE_BYTES}; split it")
    return unpacked


def _json(data: bytes, uri: str) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    try:
        value = _loads(data)
    except (ValueError, RecursionError) as error:
        hint = "; JSON lines belong into a file that ends in .jsonl" if "Extra data" in str(error) else ""
        raise ConfigError(f"{uri} is not JSON: {_short(error)}{hint}") from error
    if not isinstance(value, list):
        raise ConfigError(f"{uri} holds a JSON {_json_name(value)}; expected a list of records")
    for number, record in enumerate(value, 1):
        yield number, _checked(record)


def _jsonl(data: bytes) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    for number, line in enumerate(BytesIO(data), 1):
        if not line.strip():
            continue
        try:
            record = _checked(_loads(line))
        except (ValueError, RecursionError) as error:
            record = Fault(f"not JSON: {_short(error)}; write one object per line")
        yield number, record


def _loads(data: bytes) -> Any:
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
    """A key that stands twice would otherwise lose one of its values without a word, perhaps a label."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
    return Fault(f"the key {key[:80]!r} stands there twice; keep one")


def _checked(record: Any) -> dict[str, Any] | Fault:
    if isinstance(record, dict | Fault):
        return record
    return Fault(f'a JSON {_json_name(record)}, not an object; write {{"prompt": …}}')


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}
    return "object with a repeated key" if isinstance(value, Fault) else names.get(type(value), "number")


def _parquet(data: bytes, uri: str) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = size = 0
    try:
        with pq.ParquetFile(BytesIO(data)) as file:
            columns = _readable_columns(file, uri)
            for batch in file.iter_batches(_ROWS_PER_READ, columns=columns):
                size += batch.nbytes
                if size > MAX_FILE_BYTES:
                    raise ConfigError(f"{uri} unpacks to more than max_file_bytes={MAX_FILE_BYTES}; split it")
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except UnicodeDecodeError as error:
        place = f"records {number + 1} to {number + _ROWS_PER_READ}"
        raise ConfigError(f"{uri}, in {place}: text that is not UTF-8; write it again") from error
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{uri} cannot be read as Parquet: {_short(error)}") from error


def _readable_columns(file: pq.ParquetFile, uri: str) -> list[str]:
    """Columns of text, numbers and lists of them: bytes (images in the table) are left unread."""
    schema = file.schema_arrow
    if repeated := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise ConfigError(f"{uri} has two columns {repeated[0]!r}; rename one")
    return [field.name for field in schema if _is_plain(field.type)]


def _is_plain(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    texts_and_numbers = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating,
        types.is_boolean, types.is_null,
    )  # fmt: skip
    return any(is_such(kind) for is_such in texts_and_numbers)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
