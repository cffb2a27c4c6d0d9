"""How often a scorer prefers what people preferred: pairs, rankings, the best and the worst of several images.

A margin is (reward of the chosen) - (reward of the rejected), or a general-preference score: above 0 agrees with
people, exactly 0 is a tie, and only the sign counts. ``units`` number the prompt that each row belongs to.
Letters: n pairs, m images, p prompts.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from model.evaluation.libraries import Floats, Ints

Measured = dict[str, float | None]


def pair_accuracies(margins: Floats, units: Ints) -> Measured:
    """Share of pairs in which the scorer agrees with people, in [0, 1]; ``margins`` and ``units`` are ``(n,)``.

    - accuracy_with_ties: correct / all, a tie counts as wrong
    - accuracy_without_ties: correct / (all - ties)
    - accuracy_per_prompt: the first one within each prompt, then the mean over prompts
    - source: LLaVA-Reward's evaluation (the first two), ImageReward's (the first one, over all pairs)
    """
    correct = margins > 0
    decided = int((margins != 0).sum())
    return {
        "accuracy_with_ties": float(correct.mean()) if len(margins) else None,
        "accuracy_without_ties": float(correct.sum() / decided) if decided else None,
        "accuracy_per_prompt": _mean_of_units(correct.astype(np.float64), units),
    }


def _mean_of_units(values: Floats, units: Ints) -> float | None:
    counts = np.bincount(units)
    sums = np.bincount(units, weights=values)
    present = counts > 0
    return float((sums[present] / counts[present]).mean()) if present.any() else None


def pairs_of(ratings: Floats) -> list[tuple[int, int]]:
    """(better, worse) places of all pairs of one prompt's images that people rated differently; higher is better."""
    return [
        (i, j) if ratings[i] > ratings[j] else (j, i)
        for i, j in combinations(range(len(ratings)), 2)
        if ratings[i] != ratings[j]
    ]


def recall_at_k(ratings: Floats, rewards: Floats, k: int) -> bool | None:
    """Whether a best rated image of one prompt is among the scorer's top ``k``; ``ratings``, ``rewards`` ``(m,)``.

    Images that tie with it for a place go before it, so that a constant scorer finds nothing. None where the
    question is empty: not more than ``k`` images, or all rated the same.

    - source: ImageReward (Xu et al., arXiv 2304.05977), recall@1/2/4 over prompts with 8 images. Its code does not
      compute it. That any of several best ones counts follows from its numbers: CLIP's pairs are hardly better than
      guesses (54.8 %), and its recall of 27/49/78 % is a guess's where two of eight are best (25/46/79 %); the share
      of the best images found would be 12.5/25/50 %
    """
    if len(ratings) <= k or np.ptp(ratings) == 0:
        return None
    is_best = ratings == ratings.max()
    return bool((rewards[~is_best] >= rewards[is_best].max()).sum() < k)


def filter_at_k(ratings: Floats, rewards: Floats, k: int) -> bool | None:
    """Whether a worst rated image of one prompt is among the scorer's last ``k``.

    As ``recall_at_k`` from the other end; source: the same, filter@1/2/4.
    """
    return recall_at_k(-ratings, -rewards, k)
