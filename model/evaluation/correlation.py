"""How closely two columns of numbers follow each other: Spearman, Kendall's tau-b, Pearson. Coefficients are scipy's.

A coefficient that is not defined (too few values, or one that never varies) is None, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.errors import ConfigError
from model.evaluation.libraries import Floats, library

COEFFICIENTS = ("spearman", "kendall", "pearson")
FILLS = ("none", "mean")
_MIN_VALUES = 3  # of two values any coefficient is -1, 0 or 1


@dataclass(frozen=True)
class Correlation:
    """``coefficient`` in [-1, 1]; ``pvalue`` of the two-sided test that it is 0. Both None where not defined."""

    coefficient: float | None
    pvalue: float | None
    count: int


def correlation(name: str, x: Floats, y: Floats) -> Correlation:
    """One coefficient of two columns ``(n,)`` without gaps; ``name`` is one of ``COEFFICIENTS``.

    Kendall is tau-b, which counts ties. Raises ``ConfigError`` for another name.
    """
    if name not in COEFFICIENTS:
        raise ConfigError(f"coefficient {name!r} is none of {', '.join(COEFFICIENTS)}")
    if len(x) < _MIN_VALUES or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(None, None, len(x))
    stats = library("scipy.stats")
    function = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}[name]
    found = function(x, y)
    # Numbers so close together that their spread is lost to rounding.
    if not math.isfinite(found.statistic):
        return Correlation(None, None, len(x))
    return Correlation(float(found.statistic), float(found.pvalue), len(x))


def fisher_mean(coefficients: Sequence[float | None]) -> float | None:
    """tanh of the mean of atanh: each group counts the same.

    None without groups, where a group's coefficient is not defined, or is 1 or -1: its atanh is infinite, and would
    be the mean whatever the others say.
    """
    if not coefficients or any(value is None or abs(value) >= 1 for value in coefficients):
        return None
    return math.tanh(math.fsum(math.atanh(value) for value in coefficients if value is not None) / len(coefficients))


def fill_missing(values: Sequence[object], how: str) -> list[float]:
    """Replaces all that is no number (null, text, a boolean) by the mean of the numbers, or by zero.

    Source: T2I-Eval, whose published correlations replace a missing score by the mean of its own column. Raises
    ``ConfigError`` where there is no number to take the mean of.
    """
    found = [finite_number(value) for value in values]
    numbers = [value for value in found if value is not None]
    if how == "zero":
        filling = 0.0
    elif numbers:
        filling = sum(numbers) / len(numbers)
    else:
        raise ConfigError("a column without any number cannot be filled with its mean")
    return [filling if value is None else value for value in found]


def finite_number(value: object) -> float | None:
    """None for anything that is no finite number, such as null or ``N/A``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
