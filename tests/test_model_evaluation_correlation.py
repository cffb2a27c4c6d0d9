"""Correlations, and what they are where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from model.errors import ConfigError
from model.evaluation.correlation import COEFFICIENTS, correlation, fill_missing, fisher_mean

COLUMNS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=40)
HUMAN = np.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def _tau_b(x, y):
    """By its definition, over all pairs."""
    concordant = discordant = x_ties = y_ties = pairs = 0
    for i in range(len(x)):
        for j in range(i):
            pairs += 1
            sign = np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
            concordant += sign > 0
            discordant += sign < 0
            x_ties += x[i] == x[j]
            y_ties += y[i] == y[j]
    return (concordant - discordant) / math.sqrt((pairs - x_ties) * (pairs - y_ties))


@settings(deadline=None)
@given(COLUMNS)
def test_kendall_is_tau_b(rows):
    x, y = (np.asarray(column, dtype=float) for column in zip(*rows, strict=True))
    found = correlation("kendall", x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found.coefficient is None
    else:
        assert found.coefficient == pytest.approx(_tau_b(x, y), abs=1e-12)
        assert found.coefficient == pytest.approx(stats.kendalltau(x, y, variant="b").statistic)


@settings(deadline=None)
@given(COLUMNS)
def test_rank_coefficients_know_only_order(rows):
    x, y = (np.asarray(column, dtype=float) for column in zip(*rows, strict=True))
    for name in ("spearman", "kendall"):
        plain, bent = correlation(name, x, y).coefficient, correlation(name, x, np.exp(y)).coefficient
        assert (plain is None) == (bent is None)
        assert plain == pytest.approx(bent) if plain is not None else True


def test_generators_of_a_published_table():
    # ImageReward's table of generators: human ranks 1 … 6 against mean rewards and CLIP scores of user prompts.
    reward = np.asarray([0.2614, 0.2458, 0.2114, 0.1344, -0.2470, -1.2376])
    clip = np.asarray([0.2726, 0.2683, 0.2684, 0.2763, 0.2606, 0.2044])
    assert correlation("spearman", -HUMAN, reward).coefficient == pytest.approx(1.0)
    # Places by CLIP 2, 4, 3, 1, 5, 6; differences 1, 2, 0, -3, 0, 0; 1 - 6*14/(6*35) = 0.6.
    assert correlation("spearman", -HUMAN, clip).coefficient == pytest.approx(0.6)


def test_undefined_is_none_and_not_zero():
    for name in COEFFICIENTS:
        assert correlation(name, HUMAN, np.full(6, 2.0)).coefficient is None
        assert correlation(name, HUMAN[:2], HUMAN[:2]).coefficient is None
    with pytest.raises(ConfigError, match="tau"):
        correlation("tau", HUMAN, HUMAN)


def test_fisher_mean_by_hand():
    # (1 + r)/(1 - r) is 3 and 9; their geometric mean m = sqrt(27) = 5.196152; (m - 1)/(m + 1) = 0.677219.
    assert fisher_mean([0.5, 0.8]) == pytest.approx(0.677219, abs=1e-6)
    assert fisher_mean([0.3]) == pytest.approx(0.3)
    assert fisher_mean([]) is None
    assert fisher_mean([0.5, None]) is None
    assert fisher_mean([0.5, 1.0]) is None


def test_filling_needs_a_number():
    assert fill_missing([True, "3", float("nan"), 4, None], "mean") == [4.0] * 5  # none of the others is a number
    with pytest.raises(ConfigError, match="without any number"):
        fill_missing([None, "N/A"], "mean")
