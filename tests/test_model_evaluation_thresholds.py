"""The threshold's guarantee: by hand, and by simulation over 1,000 seeds, which a plug-in threshold fails."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from model.errors import ConfigError
from model.evaluation.thresholds import (
    Bound,
    Claim,
    choose_threshold,
    labels_needed,
    miss_rate_limit,
    misses_allowed,
)

SEEDS = 1000
CERTAIN = 0.999  # a correct threshold fails such a test once in a thousand choices of seeds; these seeds are fixed


def _thresholds(draw, count, claim):
    return np.asarray(
        [choose_threshold(draw(np.random.default_rng([count, s]), count), claim).below for s in range(SEEDS)]
    )


def _normal(rng, count):
    return rng.normal(size=count).astype(np.float32)


def _steps(rng, count):
    return rng.integers(0, 12, size=count).astype(np.float32)  # ties everywhere


def _normal_miss_rate(thresholds):
    return stats.norm.sf(thresholds)


def _steps_miss_rate(thresholds):
    return np.clip(12 - np.ceil(thresholds), 0, 12) / 12


@pytest.mark.parametrize(("alpha", "delta", "count"), [(0.05, 0.1, 200), (0.1, 0.05, 100), (0.02, 0.1, 114)])
def test_the_miss_rate_exceeds_alpha_no_more_often_than_delta(alpha, delta, count):
    claim = Claim(alpha, delta)
    exceeded = (_normal_miss_rate(_thresholds(_normal, count, claim)) > alpha).sum()
    assert exceeded <= stats.binom.ppf(CERTAIN, SEEDS, delta)
    # Rewards without ties leave no slack: it happens exactly as often as P(Binomial(n, alpha) <= k).
    exact = stats.binom.cdf(misses_allowed(count, claim), count, alpha)
    assert stats.binom.ppf(1 - CERTAIN, SEEDS, exact) <= exceeded <= stats.binom.ppf(CERTAIN, SEEDS, exact)


def test_ties_only_make_it_safer():
    claim = Claim(0.1, 0.1)
    exceeded = (_steps_miss_rate(_thresholds(_steps, 150, claim)) > 0.1).sum()
    assert exceeded <= stats.binom.ppf(CERTAIN, SEEDS, 0.1)


def test_a_plug_in_threshold_breaks_the_claim():
    # The lowest threshold whose miss rate on the labels themselves is at most alpha: k = alpha * n misses.
    alpha, delta, count = 0.05, 0.1, 200
    samples = np.stack([np.sort(_normal(np.random.default_rng([count, s]), count))[::-1] for s in range(SEEDS)])
    plug_in = np.nextafter(samples[:, int(alpha * count)], np.float32(np.inf))
    assert ((samples >= plug_in[:, None]).mean(axis=1) <= alpha).all()
    exceeded = (_normal_miss_rate(plug_in) > alpha).sum()
    assert exceeded > stats.binom.ppf(CERTAIN, SEEDS, delta)  # about half of the time
    assert exceeded > 0.4 * SEEDS


def test_expectation_holds_on_average_and_claims_no_more():
    claim = Claim(0.1, 0.1, Bound.EXPECTATION)
    rates = _normal_miss_rate(_thresholds(_normal, 60, claim))
    # k = floor(0.1 * 61) - 1 = 5; the mean is (5 + 1)/61 = 0.0984.
    assert misses_allowed(60, claim) == 5
    assert rates.mean() == pytest.approx(6 / 61, abs=4 * rates.std() / np.sqrt(SEEDS))
    assert (rates > 0.1).mean() > 0.3  # for one set of labels it is often more


def test_by_hand():
    # n = 59 is where 0.95^59 = 0.0485 <= 0.05 for the first time: no miss is allowed.
    claim = Claim(0.05, 0.05)
    assert (misses_allowed(58, claim), misses_allowed(59, claim)) == (-1, 0)
    assert labels_needed(claim) == 59
    rewards = np.arange(59, dtype=np.float32)
    found = choose_threshold(rewards, claim)
    assert found.below == np.nextafter(np.float32(58), np.float32(59))
    assert (found.misses, found.unsafe) == (0, 59)
    assert found.upper == pytest.approx(1 - 0.05 ** (1 / 59))  # Clopper-Pearson without a miss


def test_refused_with_the_number_of_labels_still_needed():
    with pytest.raises(ConfigError, match=r"30 labelled unsafe .* 29 more are needed \(59 in all\)"):
        choose_threshold(np.zeros(30, dtype=np.float32), Claim(0.05, 0.05))
    with pytest.raises(ConfigError, match=r"on average: 9 more are needed \(19 in all\)"):
        choose_threshold(np.zeros(10, dtype=np.float32), Claim(0.05, 0.05, Bound.EXPECTATION))
    with pytest.raises(ConfigError, match="alpha=0"):
        Claim(0.0, 0.1)


@settings(deadline=None)
@example(0.49999999999999994, 0.25, Bound.CONFIDENCE)
@example(0.1, 0.9**20, Bound.CONFIDENCE)
@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.sampled_from(Bound))
def test_labels_needed_is_where_it_starts_to_work(alpha, delta, bound):
    claim = Claim(alpha, delta, bound)
    needed = labels_needed(claim)
    assert misses_allowed(needed, claim) >= 0
    assert needed == 0 or misses_allowed(needed - 1, claim) < 0


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_the_largest_k_is_where_the_upper_limit_reaches_alpha(count, alpha, delta):
    k = misses_allowed(count, Claim(alpha, delta))
    if k >= 0:
        assert miss_rate_limit(k, count, delta) <= alpha + 1e-9
    assert miss_rate_limit(k + 1, count, delta) > alpha - 1e-9


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=30, max_size=80))
def test_no_more_misses_than_allowed_and_no_lower_threshold(rewards):
    claim, column = Claim(0.1, 0.1), np.asarray(rewards, dtype=np.float32)
    found = choose_threshold(column, claim)
    allowed = misses_allowed(len(rewards), claim)
    assert (column >= found.below).sum() == found.misses <= allowed
    one_lower = np.nextafter(np.float32(found.below), np.float32(-np.inf))
    assert (column >= one_lower).sum() > allowed
