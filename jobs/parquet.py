"""The published columns of ``model/schema.py`` as Arrow schemas."""

from __future__ import annotations

import json
import re

import pyarrow as pa

from model.errors import ConfigError
from model.schema import COLUMNS, JUDGEMENT_COLUMNS, SCHEMA_VERSION

_TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float": pa.float32(),
    "list<float>": pa.list_(pa.float32()),
    "list<string>": pa.list_(pa.string()),
    "timestamp[us, UTC]": pa.timestamp("us", "UTC"),
}


def _schema(with_judgement: bool) -> pa.Schema:
    fields = [
        pa.field(
            column.name,
            _TYPES[column.type],
            nullable=column.nullable,
            metadata={"meaning": column.meaning, "unit": column.unit},
        )
        for column in COLUMNS
        if with_judgement or column.name not in JUDGEMENT_COLUMNS
    ]
    return pa.schema(fields, metadata={"assay.schema_version": SCHEMA_VERSION})


# What the job stages: everything but the judgement, which is given at publication.
FACTS_SCHEMA = _schema(with_judgement=False)
# What is published.
PUBLISHED_SCHEMA = _schema(with_judgement=True)


def schema_with(facts: dict[str, str]) -> pa.Schema:
    """``PUBLISHED_SCHEMA`` with more facts (all text) in the file's metadata."""
    metadata = {"assay.schema_version": SCHEMA_VERSION, "assay.facts": json.dumps(facts, sort_keys=True)}
    return PUBLISHED_SCHEMA.with_metadata(metadata)


def check_readable(schema_version: str, what: str) -> None:
    """Raises ``ConfigError`` for another major version; minor ones differ by nullable columns, which are tolerated."""
    if version_of(schema_version)[0] != version_of(SCHEMA_VERSION)[0]:
        raise ConfigError(
            f"{what} has schema {schema_version}, and this code reads {SCHEMA_VERSION}; use the Assay that published it"
        )


def check_rewritable(schema_version: str, what: str) -> None:
    """Raises ``ConfigError`` also for a newer minor version: its new columns would be lost."""
    check_readable(schema_version, what)
    if version_of(schema_version) > version_of(SCHEMA_VERSION):
        raise ConfigError(
            f"{what} has schema {schema_version}, and this code writes {SCHEMA_VERSION}: columns would be lost; "
            "use the Assay that published it"
        )


def version_of(schema_version: str) -> tuple[int, int]:
    """Major and minor number. Raises ``ConfigError`` for anything else."""
    match = re.fullmatch(r"(\d+)\.(\d+)", schema_version)
    if match is None:
        raise ConfigError(f"{schema_version!r} is no schema version; expected something like {SCHEMA_VERSION}")
    return int(match[1]), int(match[2])
