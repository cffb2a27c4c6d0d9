"""From columns of numbers to measures with intervals: per scorer, per group, and as differences between scorers.

A ``Part`` holds the rows that one kind of question is asked about, and one column a scorer. Every number of a report
is one ``Measure``: a flat row that tables, JSON and Parquet share. Knows nothing about files or models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from model.errors import ConfigError
from model.evaluation.bootstrap import Clusters, Interval, Resampling, intervals
from model.evaluation.correlation import COEFFICIENTS, correlation, fisher_mean
from model.evaluation.libraries import Floats, Ints

ALL = ""  # ``by`` and ``group`` of a measure over all rows
FISHER = "mean (Fisher z)"
OVER = "over groups"
# metric, by, group
Key = tuple[str, str, str]
Values = dict[Key, float | None]
# rows and units (see bootstrap.py) -> metric -> value
Plain = Callable[[Ints, Ints], Mapping[str, float | None]]
Grouped = Callable[[Ints, Ints], Values]


@dataclass(frozen=True, order=True)
class Column:
    """What was measured: a scorer's perspective. ``perspective`` is empty where the scores do not say."""

    scorer: str
    perspective: str = ""

    @property
    def title(self) -> str:
        return f"{self.scorer} {self.perspective}".strip()


@dataclass(frozen=True)
class Measure:
    """One number. ``low`` and ``high``: its interval, None where there is none.

    - against: which human column, where there are several; baseline: the scorer that a difference is taken from
    - count: rows that it is over, of ``unit``; missing: rows that it would also be over, had they been scored
    """

    column: Column
    metric: str
    by: str
    group: str
    value: float | None
    low: float | None
    high: float | None
    count: int
    missing: int
    unit: str
    against: str = ""
    baseline: str = ""


@dataclass(frozen=True)
class Part:
    """Rows that one kind of question is asked about. All sequences are ``(n,)``.

    - unit: what a row is, such as ``pairs``; clusters: the name of what each row is drawn with, its prompt
    - columns: per scorer its values, None where it has none; groups: field -> value of each row (None: in no group)
    - question: values -> statistic over rows; ``make_question`` and ``correlations`` below give such
    """

    unit: str
    clusters: Sequence[str]
    columns: Mapping[Column, Sequence[float | None]]
    question: Callable[[Floats, Ints], Grouped]
    groups: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    against: str = ""


def by_group(plain: Plain, groups: Mapping[str, Sequence[str | None]], count: int) -> Grouped:
    """The same statistic over all rows and over each group of each field; always the same keys."""
    members = _members(groups, count)

    def statistic(rows: Ints, units: Ints) -> Values:
        values: Values = {(metric, ALL, ALL): value for metric, value in plain(rows, units).items()}
        for (name, group), is_member in members.items():
            kept = is_member[rows]
            found = plain(rows[kept], units[kept])
            values |= {(metric, name, group): value for metric, value in found.items()}
        return values

    return statistic


def _members(groups: Mapping[str, Sequence[str | None]], count: int) -> dict[tuple[str, str], np.ndarray]:
    found: dict[tuple[str, str], np.ndarray] = {}
    for name, values in groups.items():
        if len(values) != count:
            raise ConfigError(f"groups by {name} are given for {len(values)} rows of {count}")
        for group in sorted({value for value in values if value is not None}):
            found[name, group] = np.asarray([value == group for value in values])
    return found


def correlations(
    human: Floats, values: Floats, groups: Mapping[str, Sequence[str | None]], over: Collection[str] = ()
) -> Grouped:
    """Every coefficient over all rows and per group, their Fisher mean over groups, and that of the group means.

    ``human`` and ``values`` are ``(n,)``. The last (``OVER``), for the fields in ``over``, asks whether groups, such
    as generators, are ranked as people rank them: each group is one point, the mean of its values against the mean of
    its ratings.
    """

    def plain(rows: Ints, units: Ints) -> dict[str, float | None]:
        return {name: correlation(name, human[rows], values[rows]).coefficient for name in COEFFICIENTS}

    grouped = by_group(plain, groups, len(values))
    members = _members(groups, len(values))

    def statistic(rows: Ints, units: Ints) -> Values:
        found = grouped(rows, units)
        for name in groups:
            chosen = [is_member[rows] for (field_name, _), is_member in members.items() if field_name == name]
            means = [(human[rows[kept]].mean(), values[rows[kept]].mean()) for kept in chosen if kept.any()]
            points = np.asarray(means, dtype=np.float64).reshape(-1, 2)
            for metric in COEFFICIENTS:
                of_groups = [value for (m, by, _), value in found.items() if m == metric and by == name]
                found[metric, name, FISHER] = fisher_mean(of_groups)
                if name in over:
                    found[metric, name, OVER] = correlation(metric, points[:, 0], points[:, 1]).coefficient
        return found

    return statistic


def measure(part: Part, resampling: Resampling) -> list[Measure]:
    """All measures of all columns, each over the rows which that column has a value for."""
    found: list[Measure] = []
    for column, values in part.columns.items():
        kept = np.flatnonzero([value is not None for value in values])
        if len(kept):
            statistic = _restricted(part, column, kept)
            found += _measures(part, column, statistic, kept, resampling)
    return found


def differences(part: Part, baseline: Column, resampling: Resampling) -> list[Measure]:
    """Every other column minus ``baseline``, over the rows that both have; both are drawn together."""
    found: list[Measure] = []
    for column in part.columns:
        pairs = zip(part.columns[baseline], part.columns[column], strict=True)
        kept = np.flatnonzero([one is not None and other is not None for one, other in pairs])
        if column == baseline or not len(kept):
            continue
        mine, theirs = _restricted(part, column, kept), _restricted(part, baseline, kept)
        found += _measures(part, column, _difference(mine, theirs), kept, resampling, baseline.title)
    return found


def _difference(mine: Grouped, theirs: Grouped) -> Grouped:
    def statistic(rows: Ints, units: Ints) -> Values:
        other = theirs(rows, units)
        return {
            key: None if value is None or (base := other[key]) is None else value - base
            for key, value in mine(rows, units).items()
        }

    return statistic


def _restricted(part: Part, column: Column, kept: Ints) -> Grouped:
    """The question over the kept rows, numbered anew from 0."""
    values = np.asarray([part.columns[column][row] for row in kept], dtype=np.float64)
    return part.question(values, kept)


def _measures(
    part: Part, column: Column, statistic: Grouped, kept: Ints, resampling: Resampling, baseline: str = ""
) -> list[Measure]:
    clusters = Clusters([part.clusters[row] for row in kept])
    values = statistic(np.arange(len(kept)), clusters.units)
    ends: Mapping[Key, Interval | None] = intervals(statistic, clusters, resampling)
    measures = []
    for (metric, by, group), value in values.items():
        interval = None if value is None else ends[metric, by, group]
        count, missing, unit = _counts(part, kept, by, group)
        measures.append(
            Measure(
                column,
                metric,
                by,
                group,
                value,
                interval.low if interval else None,
                interval.high if interval else None,
                count,
                missing,
                unit,
                part.against,
                baseline,
            )
        )
    return measures


def _counts(part: Part, kept: Ints, by: str, group: str) -> tuple[int, int, str]:
    if by == ALL:
        return len(kept), len(part.clusters) - len(kept), part.unit
    names = part.groups[by]
    if group in (FISHER, OVER):
        there = {names[row] for row in kept} - {None}
        return len(there), len(set(names) - {None} - there), f"groups by {by}"
    present = sum(names[row] == group for row in kept)
    return present, sum(name == group for name in names) - present, part.unit
