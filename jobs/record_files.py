"""Small tables of records as they are passed around: a JSON list, JSONL, or Parquet; local or on S3, gzip or not."""

from __future__ import annotations

import gzip
import hashlib
import json
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model import storage
from model.errors import ConfigError

_MAX_BYTES = 2 * 2**30
_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"

Record = dict[str, Any]


def read_records(uri: str) -> tuple[list[Record], str]:
    """All records of a file, in order, and the sha256 of its bytes. What it holds is seen from its content.

    Raises ``ConfigError`` for a file that is none of these, or is not there.
    """
    try:
        data = storage.get(uri, _MAX_BYTES)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{uri}: no such file") from error
    digest = hashlib.sha256(data).hexdigest()
    try:
        records = _parsed(data)
    except (ValueError, OSError, EOFError, pa.ArrowException) as error:
        raise ConfigError(f"{uri}: not a JSON list, JSONL or Parquet: {' '.join(str(error).split())[:200]}") from error
    if not records:
        raise ConfigError(f"{uri} holds no records")
    return records, digest


def _parsed(data: bytes) -> list[Record]:
    if data.startswith(_PARQUET_MAGIC):
        rows: list[Record] = pq.read_table(BytesIO(data)).to_pylist()
        return rows
    if data.startswith(_GZIP_MAGIC):
        data = gzip.decompress(data)
    text = data.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        records = json.loads(text)
    else:
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} is no JSON object")
    return list(records)
