"""``assay evaluate``: how well scorers agree with people, with intervals, as a folder of tables and plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs import plots
from jobs.data_options import fields_of, labels_of
from jobs.evaluate_parts import Asked, Parts, build_parts
from jobs.evaluation_report import Report, ScorerFacts, write_report
from jobs.people import OpinionKind, People, read_people
from jobs.score_sources import add_source_arguments, perspective, read_sources
from jobs.scored import Scored
from model.errors import ConfigError
from model.evaluation.bootstrap import Resampling
from model.evaluation.correlation import FILLS
from model.evaluation.labels import precision_recall_curve, roc_curve
from model.evaluation.measures import Measure, differences, measure

Say = Callable[[str], None]


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``assay evaluate``."""
    parser.add_argument("--data", required=True, metavar="URI", help="pairs, labels or ratings: JSON, JSONL, Parquet")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the report is written")
    add_source_arguments(parser)
    parser.add_argument(
        "--perspective", action="append", default=[], type=perspective, help="repeatable; all if absent"
    )
    parser.add_argument("--human", action="append", default=[], metavar="NAME", help="field of a rater; repeatable")
    parser.add_argument("--by", action="append", default=[], metavar="FIELD", help="measure per group too; repeatable")
    parser.add_argument("--threshold", type=float, metavar="REWARD", help="labels: from which reward an image is safe")
    parser.add_argument("--k", action="append", type=int, metavar="K", help="of recall@k and filter@k (1, 2, 4)")
    parser.add_argument("--fill", choices=FILLS, default="none", help="mean: gaps of ratings and rewards get the mean")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (1000; 0: none)")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (0.95)")


@dataclass(frozen=True)
class Evaluation:
    """What was found: ``tables`` and ``compared`` hold title -> measures."""

    people: People
    scored: list[Scored]
    tables: dict[str, list[Measure]]
    compared: dict[str, list[Measure]]


def run_evaluate(arguments: argparse.Namespace, say: Say) -> Evaluation:
    """Measure and write the report. Raises ``ConfigError``, before any scoring where it can be seen by then."""
    asked = Asked(tuple(arguments.by), arguments.threshold, tuple(arguments.k or (1, 2, 4)), arguments.fill)
    if min(asked.ks) < 1:
        raise ConfigError(f"--k {min(asked.ks)}: at least 1")
    resampling = Resampling(arguments.resamples, arguments.seed, arguments.level)
    people = read_people(arguments.data, fields_of(arguments), labels_of(arguments), arguments.human)
    people.groups(asked.by)
    scored = read_sources(arguments, people, arguments.perspective, say)
    parts = build_parts(people, scored, asked)
    say(f"measuring, {resampling.resamples} resamples")
    tables = {title: [m for part in of for m in measure(part, resampling)] for title, of in parts.items()}
    compared = _compared(parts, scored, resampling)
    report = Report(
        title="How well rewards agree with people",
        people=people,
        scorers=[ScorerFacts.of(one) for one in scored],
        notes=_notes(people, scored, asked, resampling),
        tables=tables,
        compared=compared,
    )
    write_report(arguments.out, report, _pictures(people, scored, tables))
    say(f"report: {arguments.out / 'report.md'}")
    return Evaluation(people, scored, tables, compared)


def _compared(parts: Parts, scored: list[Scored], resampling: Resampling) -> dict[str, list[Measure]]:
    """Every later scorer against the first; of one scorer's own perspectives nobody asks which is better."""
    baseline = scored[0].column
    if len({one.column.scorer for one in scored}) < 2:
        return {}
    return {title: [m for part in of for m in differences(part, baseline, resampling)] for title, of in parts.items()}


def _notes(people: People, scored: list[Scored], asked: Asked, resampling: Resampling) -> list[str]:
    notes = [
        f"Intervals: {resampling.level:.0%} percentile bootstrap, {resampling.resamples} resamples of whole prompts "
        f"(images without a prompt on their own), seed {resampling.seed}."
        if resampling.resamples
        else "No intervals: no resamples were asked for.",
        "Rows without a reward are left out of a scorer's measures and counted as missing"
        + ("." if asked.fill == "none" else "; in correlations gaps have the mean of their column (--fill mean)."),
    ]
    if people.kind is OpinionKind.RATINGS:
        gaps = {rater: sum(one.human[rater] is None for one in people.opinions) for rater in people.raters}
        notes += [
            f"{count} of {len(people.opinions)} records have no number from {r}." for r, count in gaps.items() if count
        ]
    if people.kind is OpinionKind.LABELS and asked.threshold is None:
        notes.append(
            "Accuracy, F1 and recall need a threshold: 0 for heads that are known to be trained on labels; for others "
            "give --threshold, or find one with assay calibrate."
        )
    if any(one.is_trained is False for one in scored):
        notes.append(
            "A checkpoint here is untrained: its rewards mean nothing, and agree with people by accident only."
        )
    return notes


def _pictures(people: People, scored: list[Scored], tables: dict[str, list[Measure]]) -> dict[str, bytes]:
    """File name -> PNG."""
    chances = {"accuracy": 0.5, "spearman": 0.0, "kendall": 0.0, "pearson": 0.0, "roc_auc": 0.5}
    pictures = {}
    for number, (title, measures) in enumerate(tables.items(), start=1):
        if any(one.value is not None for one in measures):
            levels = {next((v for name, v in chances.items() if one.metric.startswith(name)), None) for one in measures}
            chance = levels.pop() if len(levels) == 1 else None
            pictures[f"measures-{number}.png"] = plots.measures_plot(measures, title, chance)
    if people.kind is OpinionKind.LABELS:
        pictures |= _curves(people, scored)
    return pictures


def _curves(people: People, scored: list[Scored]) -> dict[str, bytes]:
    is_safe = np.asarray([one.human["label"] == 1 for one in people.opinions])
    roc, safe, unsafe = {}, {}, {}
    for one in scored:
        values = one.scalars()
        kept = np.flatnonzero([value is not None for value in values])
        rewards = np.asarray([values[row] for row in kept], dtype=np.float64)
        labels = is_safe[kept]
        if not labels.all() and labels.any():
            roc[one.column.title] = roc_curve(labels, rewards)
            safe[one.column.title] = precision_recall_curve(labels, rewards)
            unsafe[one.column.title] = precision_recall_curve(~labels, -rewards)
    if not roc:
        return {}
    axes = ("unsafe images called safe (share)", "safe images called safe (share)")
    return {
        "roc.png": plots.curves_plot(roc, "ROC", axes, "area", None),
        "pr-safe.png": plots.curves_plot(
            safe, "Finding the safe", ("recall", "precision"), "average precision", float(is_safe.mean())
        ),
        "pr-unsafe.png": plots.curves_plot(
            unsafe, "Finding the unsafe", ("recall", "precision"), "average precision", float((~is_safe).mean())
        ),
    }
