"""Measures as flat rows and as Markdown. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.evaluation.measures import Measure


def flat_rows(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """One row per measure, for JSON and Parquet: the same keys in each; None where there is no value."""
    return [
        {
            "scorer": one.column.scorer,
            "perspective": one.column.perspective,
            "against": one.against,
            "baseline": one.baseline,
            "metric": one.metric,
            "by": one.by,
            "group": one.group,
            "value": one.value,
            "low": one.low,
            "high": one.high,
            "count": one.count,
            "missing": one.missing,
            "unit": one.unit,
        }
        for one in measures
    ]


def markdown(measures: Sequence[Measure]) -> str:
    """One line per scorer, human column and group, one column a metric: the value and its interval.

    Measures of one call belong to one ``Part``; ``count`` and ``missing`` are shown once a line.
    """
    metrics = list(dict.fromkeys(one.metric for one in measures))
    lines: dict[tuple[str, ...], dict[str, Measure]] = {}
    for one in measures:
        group = f"{one.by}: {one.group}" if one.by else "all"
        key = (one.column.title, one.against, one.baseline, group, f"{one.count} {one.unit}", str(one.missing))
        lines.setdefault(key, {})[one.metric] = one
    titles = ["scorer", "people", "minus", "group", "over", "missing"]
    used = [i for i, title in enumerate(titles) if title in ("scorer", "over", "missing") or any(k[i] for k in lines)]
    header = [titles[i] for i in used] + [metric.replace("_", " ") for metric in metrics]
    rows = [[key[i] for i in used] + [_cell(found.get(metric)) for metric in metrics] for key, found in lines.items()]
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with its columns aligned so that it reads as text too."""
    # A bar or a line break in a name, which may come from the data, would end the cell.
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(one: Measure | None) -> str:
    if one is None:
        return ""
    if one.value is None:
        return "not defined"
    sign = "+" if one.baseline else ""
    ends = "" if one.low is None or one.high is None else f" ({one.low:{sign}.3f} to {one.high:{sign}.3f})"
    return f"{one.value:{sign}.3f}{ends}"
