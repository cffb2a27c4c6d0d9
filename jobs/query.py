"""SQL over published nights: DuckDB reads the files that the manifests name, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from jobs import manifest as manifests
from jobs.manifest import Manifest
from jobs.parquet import PUBLISHED_SCHEMA
from model import storage
from model.errors import ConfigError, Stage
from model.schema import STATUS_ERROR

# From the folders of the layout; not stored in the files themselves.
_PARTITIONS = pa.schema([pa.field("dt", pa.date32()), pa.field("run", pa.string())])


def scores(files: Sequence[str], schema: pa.Schema = PUBLISHED_SCHEMA, *, with_partitions: bool = True) -> ds.Dataset:
    """A pyarrow dataset over Parquet objects of one storage root; columns that an older file lacks are null.

    With partitions it also has ``dt`` and ``run``, taken from the paths.
    """
    filesystem, _ = storage.arrow_filesystem(files[0])
    paths = [storage.arrow_filesystem(uri)[1] for uri in files]
    if not with_partitions:
        return ds.dataset(paths, schema=schema, format="parquet", filesystem=filesystem)
    partitioning = ds.partitioning(_PARTITIONS, flavor="hive")
    full = pa.schema([*schema, *_PARTITIONS])
    return ds.dataset(paths, schema=full, format="parquet", filesystem=filesystem, partitioning=partitioning)


def published_files(output: str, night: date | None) -> list[str]:
    """URIs of all files of the newest version of each night, or of one night. Raises ``ConfigError`` when none."""
    nights = manifests.versions_by_night(output)
    if night is not None:
        nights = {night: nights[night]} if night in nights else {}
    if not nights:
        what = f"the night {night}" if night else "any night"
        raise ConfigError(f"no manifest of {what} under {output}/manifests; run jobs/score_logs.py first")
    published = [manifests.read(output, day, versions[-1]) for day, versions in nights.items()]
    return [storage.join(output, file.path) for manifest in published for file in manifest.files]


def run_query(output: str, sql: str, night: date | None = None) -> pa.Table:
    """Result of ``sql`` over the view ``scores``. Raises ``ConfigError`` for a query that DuckDB refuses."""
    # The query reads what the manifests name; it may not reach files, the network or extensions on its own.
    connection = duckdb.connect(config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"})
    try:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("scores", scores(published_files(output, night)))
        connection.execute("SET enable_external_access = false")
        return connection.sql(sql).to_arrow_table()
    except duckdb.Error as error:
        raise ConfigError(f"query failed: {' '.join(str(error).split())}") from error
    finally:
        connection.close()


def dead_letters(output: str, manifest: Manifest) -> dict[str, frozenset[int]]:
    """Per log file the numbers of the failed rows that another attempt could change.

    What is wrong with the log itself (stage read) stays wrong: a mended log is another version, and a new run.
    """
    files = [storage.join(output, file.path) for file in manifest.files]
    is_failed = (ds.field("status") == STATUS_ERROR) & (ds.field("error_stage") != Stage.READ.value)
    table = scores(files).to_table(columns=["source_file", "source_row"], filter=is_failed)
    found: dict[str, set[int]] = {}
    for row in table.to_pylist():
        found.setdefault(row["source_file"], set()).add(row["source_row"])
    return {uri: frozenset(numbers) for uri, numbers in found.items()}


def as_text(table: pa.Table, max_rows: int = 100, max_width: int = 60) -> str:
    """The table as aligned text; long cells are cut, and so is the number of rows, with a note."""
    rows = [[_cell(value, max_width) for value in row.values()] for row in table.slice(0, max_rows).to_pylist()]
    lines = [list(table.column_names), *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(table.num_columns)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    if table.num_rows > max_rows:
        text.append(f"({table.num_rows - max_rows} more rows)")
    return "\n".join(text)


def _cell(value: Any, max_width: int) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    # Prompts may hold line breaks and terminal escapes; a table of results is no place for either.
    text = "".join(character if character.isprintable() else "\N{MIDDLE DOT}" for character in text)
    return text if len(text) <= max_width else text[: max_width - 1] + "\N{HORIZONTAL ELLIPSIS}"
