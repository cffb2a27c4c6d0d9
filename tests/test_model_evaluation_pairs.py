"""Agreement on pairs and within prompts, by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.evaluation.pairs import filter_at_k, pair_accuracies, pairs_of, recall_at_k

MARGINS = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


def _accuracies(margins, units=None):
    units = range(len(margins)) if units is None else units
    return pair_accuracies(np.asarray(margins, dtype=float), np.asarray(units, dtype=int))


def test_accuracies_by_hand():
    # Prompt 0: right, wrong, tie; prompt 7: right. With ties 2/4, without 2/3, per prompt (1/3 + 1/1)/2 = 2/3.
    found = _accuracies([0.5, -0.1, 0.0, 2.0], [0, 0, 0, 7])
    assert found["accuracy_with_ties"] == 0.5
    assert found["accuracy_without_ties"] == pytest.approx(2 / 3)
    assert found["accuracy_per_prompt"] == pytest.approx(2 / 3)


def test_per_prompt_is_not_per_pair():
    # Prompt 0 has three right pairs, prompt 1 one wrong one: 3/4 of pairs, but (1 + 0)/2 of prompts.
    found = _accuracies([1, 1, 1, -1], [0, 0, 0, 1])
    assert (found["accuracy_with_ties"], found["accuracy_per_prompt"]) == (0.75, 0.5)


def test_what_is_not_defined_is_none():
    assert _accuracies([0.0, 0.0])["accuracy_without_ties"] is None
    assert _accuracies([0.0, 0.0])["accuracy_with_ties"] == 0.0
    assert set(_accuracies([]).values()) == {None}


@settings(deadline=None)
@given(MARGINS, st.floats(1e-3, 1e3))
def test_only_signs_count(margins, scale):
    assert _accuracies(margins) == _accuracies([margin * scale for margin in margins])


@settings(deadline=None)
@given(MARGINS)
def test_a_reversed_scorer_is_wrong_where_this_one_is_right(margins):
    forward, backward = _accuracies(margins), _accuracies([-margin for margin in margins])
    ties = margins.count(0) / len(margins)
    assert forward["accuracy_with_ties"] + backward["accuracy_with_ties"] == pytest.approx(1 - ties)
    assert forward["accuracy_with_ties"] <= (forward["accuracy_without_ties"] or 0.0) + 1e-12


@settings(deadline=None)
@given(MARGINS, st.randoms())
def test_order_does_not_count(margins, random):
    rows = list(enumerate(margins))
    random.shuffle(rows)
    shuffled = _accuracies([margin for _, margin in rows], [unit // 3 for unit, _ in rows])
    assert shuffled == pytest.approx(_accuracies(margins, [unit // 3 for unit in range(len(margins))]))


def test_pairs_of_ratings():
    # 3 and 3 tie; 5 beats both.
    assert pairs_of(np.asarray([3.0, 5.0, 3.0])) == [(1, 0), (1, 2)]


def test_recall_and_filter_by_hand():
    ratings = np.asarray([1.0, 4.0, 2.0, 3.0])  # image 1 is the best, image 0 the worst
    rewards = np.asarray([0.9, 0.8, 0.1, 0.0])
    assert recall_at_k(ratings, rewards, 1) is False  # image 0 comes first
    assert recall_at_k(ratings, rewards, 2) is True
    assert filter_at_k(ratings, rewards, 3) is False  # image 0 is the scorer's best, so not among its last three
    assert filter_at_k(ratings, -rewards, 1) is True


def test_recall_leaves_out_what_asks_nothing():
    assert recall_at_k(np.asarray([1.0, 2.0]), np.asarray([1.0, 2.0]), 2) is None  # both are in the top two
    assert recall_at_k(np.asarray([2.0, 2.0, 2.0]), np.asarray([1.0, 2.0, 3.0]), 1) is None


def test_a_constant_scorer_finds_nothing():
    ratings = np.asarray([1.0, 2.0, 3.0, 4.0])
    assert recall_at_k(ratings, np.zeros(4), 3) is False
    assert filter_at_k(ratings, np.zeros(4), 3) is False


def test_any_of_several_best_images_counts():
    # Images 0 and 2 are rated best; 2 comes first.
    assert recall_at_k(np.asarray([5.0, 1.0, 5.0]), np.asarray([0.0, 1.0, 2.0]), 1) is True


@pytest.mark.parametrize(("k", "missed"), [(1, 21), (2, 15), (4, 6)])
def test_a_guess_finds_what_chance_gives(k, missed):
    # Two best of eight, in each of 28 pairs of places: k = 1 misses C(7, 2), k = 2 C(6, 2), k = 4 C(4, 2) of them.
    rewards, hits = np.arange(8.0), []
    for places in combinations(range(8), 2):
        ratings = np.isin(np.arange(8), places).astype(float)
        hits.append((recall_at_k(ratings, rewards, k), filter_at_k(-ratings, rewards, k)))
    assert [sum(column) for column in zip(*hits, strict=True)] == [28 - missed] * 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=8))
def test_recall_never_falls_with_k(images):
    ratings, rewards = (np.asarray(column, dtype=float) for column in zip(*images, strict=True))
    hits = [recall_at_k(ratings, rewards, k) for k in range(1, len(images))]
    known = [hit for hit in hits if hit is not None]
    assert known == sorted(known)
