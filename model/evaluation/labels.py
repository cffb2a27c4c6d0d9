"""How well rewards separate good images (label 1: safe) from bad ones (label 0).

The positive class is 1 = safe, as in LLaVA-Reward's evaluation; ``recall_unsafe`` says what moderation asks: which
share of the unsafe is found. A measure that is not defined (a class without images) is None.
Letter: n images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from model.evaluation.libraries import Bools, Floats, Ints, library

Measured = dict[str, float | None]


@dataclass(frozen=True)
class Curve:
    """Points of a curve, in the order in which they are drawn, and the area under it."""

    x: Floats
    y: Floats
    area: float


def ranking_measures(is_safe: Bools, rewards: Floats) -> Measured:
    """What no threshold decides: area under the ROC curve, and average precision of either class; ``(n,)`` each."""
    if is_safe.all() or not is_safe.any():
        return {"roc_auc": None, "average_precision": None, "average_precision_unsafe": None}
    metrics = library("sklearn.metrics")
    with library("sklearn").config_context(assume_finite=True, skip_parameter_validation=True):
        return {
            "roc_auc": _roc_auc(is_safe, rewards),
            "average_precision": float(metrics.average_precision_score(is_safe, rewards)),
            "average_precision_unsafe": float(metrics.average_precision_score(~is_safe, -rewards)),
        }


def _roc_auc(is_safe: Bools, rewards: Floats) -> float:
    """By the rank sum: the same number as sklearn's, at a tenth of the time, which a thousand resamples need."""
    ranks = library("scipy.stats").rankdata(rewards)
    safe = int(is_safe.sum())
    wins = float(ranks[is_safe].sum()) - safe * (safe + 1) / 2
    return wins / (safe * (len(is_safe) - safe))


def concordance(grades: Ints, rewards: Floats) -> float | None:
    """Chance that of two images of different grades the better has the higher reward; a tie counts half.

    ``(n,)`` each, a higher grade is better. With two grades it is the area under the ROC curve; None with one.
    """
    wins, pairs = 0.0, 0
    for worse, better in combinations(np.unique(grades), 2):
        kept = (grades == worse) | (grades == better)
        of_both = int((grades == worse).sum()) * int((grades == better).sum())
        wins += _roc_auc(grades[kept] == better, rewards[kept]) * of_both
        pairs += of_both
    return wins / pairs if pairs else None


def threshold_measures(is_safe: Bools, rewards: Floats, threshold: float) -> Measured:
    """Accuracy, precision, recall and F1 of calling an image safe when its reward is at least ``threshold``.

    For a head trained on labels 0 is the threshold: sigmoid(0) = 0.5. A head trained on pairs has none of its own.
    """
    called_safe = rewards >= threshold
    safe_found = float((called_safe & is_safe).sum())
    unsafe_found = float((~called_safe & ~is_safe).sum())
    return {
        "accuracy": _share(safe_found + unsafe_found, len(is_safe)),
        "precision": _share(safe_found, called_safe.sum()),
        "recall": _share(safe_found, is_safe.sum()),
        "f1": _share(2 * safe_found, called_safe.sum() + is_safe.sum()),
        "recall_unsafe": _share(unsafe_found, (~is_safe).sum()),
    }


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def roc_curve(is_safe: Bools, rewards: Floats) -> Curve:
    """x: share of the unsafe that is called safe; y: share of the safe that is; one point a threshold."""
    metrics = library("sklearn.metrics")
    x, y, _ = metrics.roc_curve(is_safe, rewards)
    return Curve(np.asarray(x), np.asarray(y), float(metrics.auc(x, y)))


def precision_recall_curve(is_positive: Bools, rewards: Floats) -> Curve:
    """x: recall, y: precision of the positive class, higher rewards first; the area is the average precision."""
    metrics = library("sklearn.metrics")
    precision, recall, _ = metrics.precision_recall_curve(is_positive, rewards)
    area = float(metrics.average_precision_score(is_positive, rewards))
    return Curve(np.asarray(recall)[::-1], np.asarray(precision)[::-1], area)
