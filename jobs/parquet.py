"""The published columns of ``model/schema.py`` as Arrow schemas."""

from __future__ import annotations

import json

import pyarrow as pa

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
