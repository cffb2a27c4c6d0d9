"""The folder that an evaluation leaves: report.md, report.json, report.parquet and the plots.

Nothing in it says when it was made: the same data, scorers and seed give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.people import People
from jobs.query import printable
from jobs.scored import Scored
from model import storage
from model.evaluation.measures import Measure
from model.evaluation.tables import flat_rows, markdown, table

_SCHEMA = pa.schema(
    [
        ("table", pa.string()),
        ("scorer", pa.string()),
        ("perspective", pa.string()),
        ("against", pa.string()),
        ("baseline", pa.string()),
        ("metric", pa.string()),
        ("by", pa.string()),
        ("group", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("count", pa.int64()),
        ("missing", pa.int64()),
        ("unit", pa.string()),
    ]
)


@dataclass(frozen=True)
class ScorerFacts:
    """Whose rewards they are, and for how many images there are none: error code -> count."""

    scorer: str
    perspective: str
    checkpoint: str | None
    images: int
    missing: int
    reasons: dict[str, int]

    @classmethod
    def of(cls, one: Scored) -> ScorerFacts:
        """The facts of one column."""
        reasons = dict(sorted(one.failures().items()))
        missing = sum(reasons.values())
        return cls(one.column.scorer, one.column.perspective, one.checkpoint, len(one.values), missing, reasons)


@dataclass(frozen=True)
class Report:
    """Everything that is written. ``compared``: differences between scorers."""

    title: str
    people: People
    scorers: Sequence[ScorerFacts]
    notes: Sequence[str]
    tables: Mapping[str, Sequence[Measure]]
    compared: Mapping[str, Sequence[Measure]] = field(default_factory=dict)


def write_report(out: Path, report: Report, pictures: Mapping[str, bytes]) -> None:
    """Write the folder; the Markdown last, since it names the rest."""
    rows = [
        {"table": title} | row
        for tables in (report.tables, report.compared)
        for title, measures in tables.items()
        for row in flat_rows(measures)
    ]
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
    for name, picture in pictures.items():
        storage.put(str(out / name), picture)
    storage.put(str(out / "report.parquet"), sink.getvalue())
    storage.put(str(out / "report.json"), _json(report, rows))
    storage.put(str(out / "report.md"), _markdown(report, sorted(pictures)).encode())


def _json(report: Report, rows: Sequence[Mapping[str, Any]]) -> bytes:
    content = {
        "data": {
            "source": report.people.source,
            "sha256": report.people.sha256,
            "kind": report.people.kind,
            "records": len(report.people.opinions),
        },
        "scorers": [asdict(one) for one in report.scorers],
        "notes": list(report.notes),
        "measures": rows,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _markdown(report: Report, pictures: Sequence[str]) -> str:
    people = report.people
    parts = [
        f"# {report.title}",
        f"{len(people.opinions)} {people.kind} of `{printable(people.source)}` (sha256 `{people.sha256[:16]}…`).",
        "\n".join(f"- {note}" for note in report.notes),
        "## Scorers",
        scorers_table(report.scorers),
    ]
    for title, measures in report.tables.items():
        parts += [f"## {title}", printable_lines(markdown(measures))]
    for title, measures in report.compared.items():
        if measures:
            parts += [f"## {title}: differences", printable_lines(markdown(measures))]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def scorers_table(scorers: Sequence[ScorerFacts]) -> str:
    """Markdown: each column with its checkpoint and what is missing."""
    header = ["scorer", "perspective", "checkpoint", "images", "missing", "why"]
    rows = [
        [
            one.scorer,
            one.perspective,
            one.checkpoint or "not known",
            str(one.images),
            str(one.missing),
            ", ".join(f"{count} {code}" for code, count in one.reasons.items()),
        ]
        for one in scorers
    ]
    return printable_lines(table(header, rows))


def printable_lines(text: str) -> str:
    """Names of groups come from the data, and may hold terminal escapes."""
    return "\n".join(printable(line) for line in text.split("\n"))
