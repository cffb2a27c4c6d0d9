"""T2I-Eval's published files: reference scores with several annotators, and its results, as flat records.

Source: T2I-Eval, the layout of ``scores.json`` and of the collected results; ids are compared as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CATEGORIES = ("appearance", "intrinsic", "relationship", "overall")
# The teacher model, three annotators, and their average.
RATERS = ("openai_score", "manual_score_1", "manual_score_2", "manual_score_3", "manual_score_avg")

Record = dict[str, Any]


def is_reference(records: Sequence[Record]) -> bool:
    """Whether these are reference scores: every record has the four categories under ``overall``."""
    return all(isinstance(one.get("overall"), dict) and set(CATEGORIES) <= set(one["overall"]) for one in records)


def flat_reference(records: Sequence[Record]) -> list[Record]:
    """One record per sample and category: ``id`` (sample/category), ``category``, and one field a rater."""
    flat = []
    for one in records:
        for category in CATEGORIES:
            scores = one["overall"][category]
            numbers = [scores["score"], *scores["manual_score"]]
            flat.append(
                {"id": f"{one['id']}/{category}", "category": category} | dict(zip(RATERS, numbers, strict=True))
            )
    return flat


def is_results(records: Sequence[Record]) -> bool:
    """Whether these are collected results: a score per category and no reward."""
    return all({f"{category}_score" for category in CATEGORIES} <= set(one) for one in records)


def flat_results(records: Sequence[Record]) -> list[Record]:
    """One record per sample and category: ``id`` as in ``flat_reference``, and ``reward``."""
    return [
        {"id": f"{one['id']}/{category}", "reward": one[f"{category}_score"]}
        for one in records
        for category in CATEGORIES
    ]
