"""Intervals: against scipy's bootstrap, by cluster, paired, and where something is not defined."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from model.errors import ConfigError
from model.evaluation.bootstrap import Clusters, Resampling, intervals


def _mean_of(values):
    return lambda rows, units: {"mean": float(values[rows].mean())}


def _names(count):
    return [f"p{i}" for i in range(count)]


def test_single_rows_give_the_intervals_of_scipy():
    values = np.random.default_rng(1).exponential(size=80)
    ours = intervals(_mean_of(values), Clusters(_names(80)), Resampling(resamples=4000))["mean"]
    rng = np.random.default_rng(2)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=rng).confidence_interval
    # The standard error of a 2.5 % quantile of 4,000 draws is about 0.06 standard deviations of the mean; four of them.
    margin = 4 * 0.06 * values.std() / np.sqrt(80)
    assert ours.low == pytest.approx(theirs.low, abs=margin)
    assert ours.high == pytest.approx(theirs.high, abs=margin)


def test_a_seed_gives_the_same_interval_and_another_one_another():
    values = np.random.default_rng(1).normal(size=30)
    first, again, other = (
        intervals(_mean_of(values), Clusters(_names(30)), Resampling(200, seed))["mean"] for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_names_of_clusters_do_not_decide_what_is_drawn():
    values = np.random.default_rng(1).normal(size=30)
    names = [f"p{i // 3}" for i in range(30)]
    renamed = [f"{99 - i // 3}" for i in range(30)]  # sorted the other way round
    assert intervals(_mean_of(values), Clusters(names), Resampling(50)) == intervals(
        _mean_of(values), Clusters(renamed), Resampling(50)
    )


def test_rows_of_a_prompt_do_not_make_an_interval_narrower():
    values = np.random.default_rng(1).normal(size=20)
    repeated = np.repeat(values, 25)  # 25 pairs of each prompt, all alike: they say no more than 20 pairs
    clustered = intervals(_mean_of(repeated), Clusters(np.repeat(_names(20), 25).tolist()), Resampling(2000))["mean"]
    single = intervals(_mean_of(values), Clusters(_names(20)), Resampling(2000))["mean"]
    naive = intervals(_mean_of(repeated), Clusters(_names(500)), Resampling(2000))["mean"]
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.1)
    assert naive.high - naive.low < 0.3 * (single.high - single.low)  # about a fifth


def test_a_draw_is_whole_clusters_numbered_by_draw():
    clusters = Clusters(["a", "b", "a", "c", "b", "a"])
    sizes = {0: 3, 1: 2, 3: 1}  # by first row
    for seed in range(20):
        rows, units = clusters.draw(np.random.default_rng(seed))
        assert sorted(set(units)) == [0, 1, 2]
        for unit in range(3):
            drawn = rows[units == unit]
            assert len(drawn) == sizes[min(drawn)]
            assert len(set(drawn)) == len(drawn)


def test_no_interval_where_too_many_draws_are_undefined():
    values = np.asarray([1.0] + [0.0] * 9)

    def ratio(rows, units):
        ones = values[rows].sum()
        return {"defined": float(len(rows)), "ratio": float(len(rows) / ones) if ones else None}

    found = intervals(ratio, Clusters(_names(10)), Resampling(500))
    assert found["ratio"] is None  # the one is left out of (9/10)^10 = 35 % of the draws
    assert found["defined"] is not None


def test_no_interval_from_one_cluster_or_without_resamples():
    values = np.asarray([1.0, 2.0])
    assert intervals(_mean_of(values), Clusters(["p", "p"]), Resampling())["mean"] is None
    assert intervals(_mean_of(values), Clusters(["p", "q"]), Resampling(0))["mean"] is None
    with pytest.raises(ConfigError, match="level=1"):
        Resampling(level=1)


def test_intervals_hold_what_they_promise():
    # 300 sets of 40 prompts with 3 rows each; the 90 % interval of the mean should hold 0 in about 88 to 90 %.
    rng, held = np.random.default_rng(0), 0
    clusters = Clusters([f"p{i // 3}" for i in range(120)])
    for seed in range(300):
        values = np.repeat(rng.normal(size=40), 3) + 0.3 * rng.normal(size=120)
        found = intervals(_mean_of(values), clusters, Resampling(200, seed, 0.9))["mean"]
        held += found.low <= 0 <= found.high
    assert stats.binom.ppf(0.001, 300, 0.87) <= held <= stats.binom.ppf(0.999, 300, 0.90)
