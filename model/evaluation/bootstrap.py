"""Percentile bootstrap of several statistics at once, by cluster.

Whole clusters (all rows of one prompt) are drawn with replacement: rows of one prompt are not independent, and
intervals over rows would be too narrow. Drawing the same rows for every statistic keeps differences paired.
``scipy.stats.bootstrap`` knows no clusters, and would draw anew for each statistic; with clusters of one row it
gives the same intervals, which the tests check.
Letters: n rows, c clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from model.errors import ConfigError
from model.evaluation.libraries import Ints

Key = TypeVar("Key")
# rows (with repetition) and the drawn cluster that each belongs to -> statistics
Statistic = Callable[[Ints, Ints], Mapping[Key, float | None]]
# An interval over the draws in which a statistic happens to be defined would be too narrow.
MAX_UNDEFINED_SHARE = 0.05


@dataclass(frozen=True)
class Resampling:
    """How to draw. ``level``: of the interval, such as 0.95. No resamples: no intervals."""

    resamples: int = 1000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 0 or not 0 < self.level < 1:
            raise ConfigError(f"resamples={self.resamples} must not be negative, and level={self.level} be within 0..1")


@dataclass(frozen=True)
class Interval:
    """Ends of a confidence interval of ``Resampling.level``."""

    low: float
    high: float


class Clusters:
    """Which rows belong together: rows ``0..n-1`` with one name each."""

    def __init__(self, names: Sequence[str]) -> None:
        _, first, self.units = np.unique(np.asarray(names, dtype=object), return_index=True, return_inverse=True)
        # Numbered by first appearance: what a seed draws must not depend on how prompts are spelt.
        order = np.argsort(np.argsort(first))
        self.units = order[self.units].astype(np.int64)
        self.count = len(first)
        self._sorted = np.argsort(self.units, kind="stable")
        self._starts = np.searchsorted(self.units[self._sorted], np.arange(self.count + 1))

    def draw(self, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Rows of ``count`` clusters drawn with replacement; a cluster drawn twice is two units."""
        drawn = rng.integers(self.count, size=self.count)
        lengths = self._starts[drawn + 1] - self._starts[drawn]
        units = np.repeat(np.arange(self.count), lengths)
        offsets = np.arange(len(units)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self._sorted[np.repeat(self._starts[drawn], lengths) + offsets], units


def intervals(statistic: Statistic[Key], clusters: Clusters, resampling: Resampling) -> dict[Key, Interval | None]:
    """A percentile interval per statistic.

    None with fewer than two clusters, or where more than ``MAX_UNDEFINED_SHARE`` of the draws left it undefined.
    """
    keys = list(statistic(np.arange(len(clusters.units)), clusters.units))
    if clusters.count < 2 or not resampling.resamples:
        return dict.fromkeys(keys)
    rng = np.random.default_rng(resampling.seed)
    drawn: dict[Key, list[float]] = {key: [] for key in keys}
    for _ in range(resampling.resamples):
        for key, value in statistic(*clusters.draw(rng)).items():
            if value is not None:
                drawn[key].append(value)
    return {key: _percentiles(values, resampling) for key, values in drawn.items()}


def _percentiles(values: Sequence[float], resampling: Resampling) -> Interval | None:
    if len(values) < (1 - MAX_UNDEFINED_SHARE) * resampling.resamples:
        return None
    tail = (1 - resampling.level) / 2
    low, high = np.quantile(np.asarray(values), [tail, 1 - tail])
    return Interval(float(low), float(high))
