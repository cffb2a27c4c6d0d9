"""Measures for labels, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from model.evaluation.labels import (
    concordance,
    precision_recall_curve,
    ranking_measures,
    roc_curve,
    threshold_measures,
)

ROWS = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40)


def _columns(rows):
    labels, rewards = zip(*rows, strict=True)
    return np.asarray(labels), np.asarray(rewards, dtype=float)


def test_by_hand():
    # Safe at 2, 1, -1; unsafe at 0, -2. From 0 on called safe: 2, 1, 0.
    is_safe, rewards = _columns([(True, 2), (True, 1), (True, -1), (False, 0), (False, -2)])
    found = threshold_measures(is_safe, rewards, 0.0)
    assert found["accuracy"] == 3 / 5
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["recall_unsafe"] == 1 / 2  # a reward that equals the threshold is not below it
    # Of 3*2 pairs (safe, unsafe) 2>0, 2>-2, 1>0, 1>-2, -1>-2 are right.
    assert ranking_measures(is_safe, rewards)["roc_auc"] == pytest.approx(5 / 6)


@settings(deadline=None)
@given(ROWS)
def test_agrees_with_sklearn(rows):
    is_safe, rewards = _columns(rows)
    found, called = threshold_measures(is_safe, rewards, 1.0), rewards >= 1.0
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(is_safe, called))
    if is_safe.any():
        assert found["recall"] == pytest.approx(metrics.recall_score(is_safe, called))
    if is_safe.any() or called.any():
        assert found["f1"] == pytest.approx(metrics.f1_score(is_safe, called))
    if is_safe.any() and not is_safe.all():
        ranking = ranking_measures(is_safe, rewards)
        assert ranking["roc_auc"] == pytest.approx(metrics.roc_auc_score(is_safe, rewards))
        assert ranking["average_precision"] == pytest.approx(metrics.average_precision_score(is_safe, rewards))


@settings(deadline=None)
@given(ROWS)
def test_a_class_without_images_leaves_measures_undefined(rows):
    rewards = _columns(rows)[1]
    only_safe = np.ones(len(rewards), dtype=bool)
    assert set(ranking_measures(only_safe, rewards).values()) == {None}
    assert threshold_measures(only_safe, rewards, 0.0)["recall_unsafe"] is None


def test_concordance_over_grades_by_hand():
    grades, rewards = np.array([0, 3, 3, 7]), np.array([1.0, 1.0, 0.0, 2.0])
    # Five pairs of different grades: 0 and 3 tie (a half), 0 and the other 3 are wrong, 7 is above all three.
    assert concordance(grades, rewards) == pytest.approx((0.5 + 0 + 1 + 1 + 1) / 5)
    assert concordance(grades[:3], np.full(3, 4.0)) == 0.5
    assert concordance(np.array([3, 3]), np.array([0.0, 1.0])) is None
    assert concordance(np.array([], dtype=np.int64), np.array([])) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(-3, 3)), min_size=2, max_size=30))
def test_concordance_is_that_of_all_pairs(rows):
    pairs = [(a, b) for a in rows for b in rows if a[0] < b[0]]
    grades, rewards = zip(*rows, strict=True)
    found = concordance(np.asarray(grades), np.asarray(rewards, dtype=float))
    wins = sum(1.0 if a[1] < b[1] else 0.5 if a[1] == b[1] else 0.0 for a, b in pairs)
    assert found == (pytest.approx(wins / len(pairs)) if pairs else None)


@settings(deadline=None)
@given(ROWS)
def test_concordance_of_two_grades_is_the_area_under_roc(rows):
    is_safe, rewards = _columns(rows)
    assert concordance(is_safe.astype(np.int64), rewards) == ranking_measures(is_safe, rewards)["roc_auc"]


def test_curves():
    is_safe, rewards = _columns([(True, 3), (False, 2), (True, 1), (False, 0)])
    roc = roc_curve(is_safe, rewards)
    assert (roc.x[0], roc.y[0], roc.x[-1], roc.y[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert roc.area == pytest.approx(3 / 4)  # 3>2, 3>0, 1>0 of four pairs
    curve = precision_recall_curve(is_safe, rewards)
    # Precision at the first and the second safe image: 1/1 and 2/3; their mean is the area.
    assert curve.area == pytest.approx((1 + 2 / 3) / 2)
    assert list(curve.x) == sorted(curve.x)
