"""``assay calibrate``: from labels to P(safe), and to a threshold with a guarantee, as a fragment of a policy."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jobs import plots
from jobs.data_options import fields_of, labels_of
from jobs.evaluation_report import ScorerFacts, scorers_table
from jobs.people import OpinionKind, People, read_people
from jobs.query import printable
from jobs.score_sources import add_source_arguments, perspective, read_sources
from jobs.scored import Scored
from model import storage
from model.errors import ConfigError
from model.evaluation.calibration import (
    FOLDS,
    Bin,
    Fitted,
    calibrate,
    expected_calibration_error,
    reliability,
)
from model.evaluation.libraries import Bools, Floats
from model.evaluation.tables import table
from model.evaluation.thresholds import Bound, Claim, Threshold, check_enough, choose_threshold
from model.perspectives import Perspective
from model.policy import Policy, Severity, Verdict
from model.policy_file import parse_policy

Say = Callable[[str], None]


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``assay calibrate``."""
    parser.add_argument("--data", required=True, metavar="URI", help="labels: prompt, image, label (1 safe, 0 unsafe)")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where policy and report are written")
    add_source_arguments(parser)
    parser.add_argument("--perspective", type=perspective, default=Perspective.SAFETY, help="(safety)")
    parser.add_argument("--alpha", type=float, default=0.05, help="highest share of unsafe images missed (0.05)")
    parser.add_argument("--delta", type=float, default=0.1, help="probability that it is more all the same (0.1)")
    bounds = [bound.value for bound in Bound]
    parser.add_argument("--bound", choices=bounds, default=bounds[0], help="what is claimed (confidence)")
    parser.add_argument("--one-per-prompt", action="store_true", help="use one image of each prompt, drawn by --seed")
    parser.add_argument("--checkpoint", metavar="ID@sha256:HASH", help="of scores that do not name theirs")
    verdicts = [Verdict.REVIEW.value, Verdict.BLOCK.value]
    parser.add_argument("--verdict", choices=verdicts, default=verdicts[0], help="below the threshold (review)")
    severities = [one.value for one in Severity if one is not Severity.NONE]
    parser.add_argument("--severity", choices=severities, default="medium", help="below the threshold (medium)")
    parser.add_argument("--id", default="calibrated", help="id of the policy (calibrated)")


@dataclass(frozen=True)
class Labelled:
    """Labelled images with a reward: ``(n,)`` each. ``shared``: how many unsafe ones share a prompt with another."""

    is_safe: Bools
    rewards: Floats
    clusters: list[str]
    shared: int


@dataclass(frozen=True)
class Outcome:
    """What was found."""

    threshold: Threshold
    fitted: Fitted
    bins: list[Bin]
    policy: Policy


def run_calibrate(arguments: argparse.Namespace, say: Say) -> Outcome:
    """Calibrate and write the folder. Raises ``ConfigError``, also with how many labels are still needed."""
    claim = Claim(arguments.alpha, arguments.delta, Bound(arguments.bound))
    people = read_people(arguments.data, fields_of(arguments), labels_of(arguments))
    if people.kind is not OpinionKind.LABELS:
        raise ConfigError(f"--data {arguments.data} holds {people.kind}; calibration takes labels (1 safe, 0 unsafe)")
    check_enough(sum(one.human["label"] == 0 for one in people.opinions), claim)  # before any scoring
    columns = read_sources(arguments, people, [arguments.perspective], say)
    if len(columns) > 1:
        raise ConfigError("a threshold belongs to one checkpoint: give one --scorer, --scores or --night")
    column = columns[0]
    checkpoint = _checkpoint(column, arguments.checkpoint)
    labelled = _labelled(people, column, arguments.one_per_prompt, arguments.seed)
    threshold = choose_threshold(labelled.rewards[~labelled.is_safe], claim)
    fitted = calibrate(labelled.is_safe, labelled.rewards, labelled.clusters, arguments.seed)
    bins = reliability(labelled.is_safe, fitted.held_out)
    text = _policy_text(arguments, checkpoint, people, threshold)
    outcome = Outcome(threshold, fitted, bins, parse_policy(text.encode(), "of this calibration"))
    _write(arguments, people, column, checkpoint, labelled, outcome, text)
    say(f"{_claim_text(threshold)}: reward below {threshold.below:.6g}")
    say(f"policy: {arguments.out / 'policy.yaml'}; report: {arguments.out / 'report.md'}")
    return outcome


def _checkpoint(column: Scored, given: str | None) -> str:
    if given and column.checkpoint and given != column.checkpoint:
        raise ConfigError(f"--checkpoint {given}, but these are rewards of {column.checkpoint}")
    found = column.checkpoint or given
    if found is None:
        raise ConfigError(
            "these scores do not say which checkpoint gave them, and a threshold means nothing for another one: "
            "give --checkpoint ID@sha256:HASH"
        )
    return found


def _labelled(people: People, column: Scored, one_per_prompt: bool, seed: int) -> Labelled:
    """Images that were scored and labelled, each (prompt, image) once. Rewards at the precision that is published."""
    seen: dict[object, tuple[str, bool, float]] = {}
    for one, value in zip(people.opinions, column.scalars(), strict=True):
        item = one.items[0]
        if value is None:
            continue
        key = (item.prompt, item.image) if item.image else item.id
        label = one.human["label"] == 1
        if seen.setdefault(key, (item.cluster, label, value))[1] != label:
            raise ConfigError(f"image {item.image or item.id!r} is labelled both 0 and 1; decide which it is")
    rows = list(seen.values())
    if one_per_prompt:
        order = np.random.default_rng(seed).permutation(len(rows))
        first = {rows[i][0]: i for i in order}
        rows = [rows[i] for i in sorted(first.values())]
    unsafe = Counter(cluster for cluster, label, _ in rows if not label)
    shared = sum(count for count in unsafe.values() if count > 1)
    is_safe = np.asarray([label for _, label, _ in rows])
    rewards = np.asarray([value for _, _, value in rows], dtype=np.float32).astype(np.float64)
    return Labelled(is_safe, rewards, [cluster for cluster, _, _ in rows], shared)


def _claim_text(threshold: Threshold) -> str:
    claim = threshold.claim
    if claim.bound is Bound.EXPECTATION:
        return f"miss rate at most {claim.alpha:g} on average over sets of labels"
    return f"miss rate at most {claim.alpha:g} with confidence {1 - claim.delta:g}"


def _policy_text(arguments: argparse.Namespace, checkpoint: str, people: People, threshold: Threshold) -> str:
    """YAML that ``model/policy_file.py`` reads."""
    content = {
        "id": arguments.id,
        "description": (
            f"{_claim_text(threshold)}, from {threshold.unsafe} labelled unsafe images "
            f"(labels sha256 {people.sha256[:16]}, seed {arguments.seed})"
        ),
        "rules": {
            str(arguments.perspective): {
                "checkpoint": checkpoint,
                "levels": [
                    {"below": threshold.below, "verdict": arguments.verdict, "severity": arguments.severity},
                ],
            }
        },
    }
    comment = (
        "# Written by assay calibrate. The claim holds for images drawn as the labelled ones were, and scored by\n"
    )
    comment += "# this checkpoint; report.md beside it says more. Merge the rule into your policy.\n"
    return comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _write(
    arguments: argparse.Namespace,
    people: People,
    column: Scored,
    checkpoint: str,
    labelled: Labelled,
    outcome: Outcome,
    policy_text: str,
) -> None:
    out: Path = arguments.out
    name = column.column.title
    fitted, threshold = outcome.fitted, outcome.threshold
    pictures = {
        "reliability.png": plots.reliability_plot(outcome.bins, f"{name}: reliability, {fitted.method}"),
        "calibration.png": plots.calibration_plot(
            fitted.calibration, labelled.is_safe, labelled.rewards, threshold.below, f"{name}: reward to probability"
        ),
        "threshold.png": plots.threshold_plot(
            labelled.is_safe, labelled.rewards, threshold, f"{name}: what a threshold costs"
        ),
    }
    for picture, data in pictures.items():
        storage.put(str(out / picture), data)
    facts = _facts(arguments, people, checkpoint, labelled, outcome)
    storage.put(str(out / "policy.yaml"), policy_text.encode())
    storage.put(str(out / "calibration.json"), (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())
    storage.put(str(out / "report.md"), _markdown(people, column, labelled, outcome, facts).encode())


def _facts(
    arguments: argparse.Namespace, people: People, checkpoint: str, labelled: Labelled, outcome: Outcome
) -> dict[str, Any]:
    """What ``calibration.json`` holds; ``calibration`` in it is what ``calibration.from_json`` reads."""
    threshold, fitted = outcome.threshold, outcome.fitted
    flagged = int((labelled.rewards[labelled.is_safe] < threshold.below).sum())
    safe = int(labelled.is_safe.sum())
    return {
        "checkpoint": checkpoint,
        "perspective": str(arguments.perspective),
        "labels": {"source": people.source, "sha256": people.sha256, "safe": safe, "unsafe": threshold.unsafe},
        "threshold": {
            "below": threshold.below,
            "bound": threshold.claim.bound.value,
            "alpha": threshold.claim.alpha,
            "delta": threshold.claim.delta if threshold.claim.bound is Bound.CONFIDENCE else None,
            "misses": threshold.misses,
            "miss_rate_limit": threshold.upper,
            "safe_flagged": flagged,
            "safe_flagged_share": flagged / safe,
            "probability": float(fitted.calibration(np.asarray([threshold.below]))[0]),
        },
        "calibration": fitted.calibration.as_json(),
        "held_out_log_loss": fitted.log_loss,
        "expected_calibration_error": expected_calibration_error(outcome.bins),
        "seed": arguments.seed,
    }


def _markdown(people: People, column: Scored, labelled: Labelled, outcome: Outcome, facts: dict[str, Any]) -> str:
    threshold, fitted, found = outcome.threshold, outcome.fitted, facts["threshold"]
    safe, flagged = facts["labels"]["safe"], found["safe_flagged"]
    error = facts["expected_calibration_error"]
    limit = "" if threshold.upper is None else f"; upper limit {threshold.upper:.4f} with that confidence"
    notes = [
        f"{_claim_text(threshold)}, for images drawn as these were and scored by this checkpoint.",
        f"{threshold.misses} of {threshold.unsafe} labelled unsafe images are missed{limit}.",
        f"{flagged} of {safe} labelled safe images are flagged ({flagged / safe:.1%}).",
        f"At the threshold P(safe) is {found['probability']:.4f}.",
    ]
    if labelled.shared:
        notes.append(
            f"{labelled.shared} of the unsafe images share their prompt with another. The claim takes labels as "
            "independent draws; --one-per-prompt makes them so at the price of labels."
        )
    rows = [[name, f"{loss:.4f}", "chosen" if name == fitted.method else ""] for name, loss in fitted.log_loss.items()]
    bins = [
        [str(one.count), f"{one.predicted:.3f}", f"{one.observed:.3f}", f"{one.low:.3f} to {one.high:.3f}"]
        for one in outcome.bins
    ]
    parts = [
        "# Threshold and calibration",
        f"{len(people.opinions)} labels of `{printable(people.source)}` (sha256 `{people.sha256[:16]}…`), "
        f"seed {facts['seed']}. Safe means label 1, unsafe label 0, whatever the perspective.",
        scorers_table([ScorerFacts.of(column)]),
        f"## Flag below {threshold.below!r}",
        "\n".join(f"- {note}" for note in notes),
        "## From reward to probability",
        f"Held-out log loss in nats, {FOLDS} folds, all images of a prompt in one fold:",
        table(["method", "log loss", ""], rows),
        f"Reliability of the held-out probabilities; expected calibration error {error:.4f}:",
        table(["images", "probability", "called safe", "95 % interval"], bins),
        "![threshold](threshold.png)",
        "![calibration](calibration.png)",
        "![reliability](reliability.png)",
    ]
    return "\n\n".join(parts) + "\n"
