"""SQL over published nights: DuckDB reads the files that the manifests name, and no others."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import date
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from jobs import manifest as manifests
from jobs.manifest import Manifest
from jobs.parquet import PUBLISHED_SCHEMA, check_readable
from model import storage
from model.errors import ConfigError, InfrastructureError, Stage
from model.schema import STATUS_ERROR

# Python's variables would be tables, and a persistent secret a file in the home folder.
_CONFINED = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "allow_persistent_secrets": "false",
}
_MAX_MESSAGE = 2_000  # DuckDB quotes the value that it could not convert, and that may be any prompt
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
    for manifest in published:
        check_readable(manifest.schema_version, f"the night {manifest.date}")
    return [storage.join(output, file.path) for manifest in published for file in manifest.files]


def run_query(output: str, sql: str, night: date | None = None) -> pa.Table:
    """Result of ``sql`` over the view ``scores``. Raises ``ConfigError`` for a query that DuckDB refuses.

    The query reads what the manifests name. It cannot reach other files, the network or extensions, nor the
    variables of this program; it can write nothing but what DuckDB spills, to a folder that is gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="assay-query-") as spill:
        connection = duckdb.connect(config=_CONFINED | {"temp_directory": spill})
        try:
            connection.execute("SET TimeZone = 'UTC'")
            connection.register("scores", _published(output, night))
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            result = connection.sql(sql)
            if result is None:
                raise ConfigError("the query gives no table; write one SELECT over scores")
            return result.to_arrow_table()
        except duckdb.Error as error:
            raise _query_error(error) from error
        finally:
            connection.close()


def _published(output: str, night: date | None) -> ds.Dataset:
    try:
        return scores(published_files(output, night))
    except FileNotFoundError as error:
        raise InfrastructureError(
            f"{printable(str(error))} is named by a manifest and missing; assay verify says more"
        ) from error


def _query_error(error: duckdb.Error) -> ConfigError | InfrastructureError:
    text = printable(" ".join(str(error).split()))[:_MAX_MESSAGE]
    if "reading the stream registered as" in text:
        # What pyarrow met while it read the files; the query itself is in order.
        return InfrastructureError(f"a published file cannot be read; assay verify says more: {text}")
    return ConfigError(f"query failed: {text}")


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
    # Column by column: a query may give two columns one name. PIVOT makes names out of prompts.
    columns = [
        [_cell(name, max_width), *(_cell(value, max_width) for value in column.to_pylist())]
        for name, column in zip(table.column_names, table.slice(0, max_rows).columns, strict=True)
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if table.num_rows > max_rows:
        lines.append(f"({table.num_rows - max_rows} more rows)")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Prompts may hold line breaks, terminal escapes and marks that turn the writing direction; each becomes a dot."""
    return "".join(character if character.isprintable() else "\N{MIDDLE DOT}" for character in text)


def _cell(value: Any, max_width: int) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = printable("" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return text if len(text) <= max_width else text[: max_width - 1] + "\N{HORIZONTAL ELLIPSIS}"
