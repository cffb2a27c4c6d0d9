"""What rewards mean: by hand, and as properties over any rewards."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ConfigError, ErrorCode, Stage
from model.meaning import (
    Head,
    HeadTraining,
    PreferenceProbability,
    Reward,
    RewardVector,
    SafeProbability,
    TournamentScore,
    p_safe,
    pairwise,
    preference,
    tournament_scores,
)
from model.perspectives import Perspective
from model.ranking import rank_records
from model.schema import RowError, ScoreRecord

CHECKPOINT = "c@sha256:" + "0" * 64
BT = Head(Perspective.OVERALL, CHECKPOINT, 0.1, training=HeadTraining.BT)
GPM = Head(Perspective.OVERALL, CHECKPOINT, 0.5, is_general_preference=True)
CLS = Head(Perspective.SAFETY, CHECKPOINT, 0.1, training=HeadTraining.CLS)

float32 = st.floats(-1e4, 1e4, width=32)
rewards = st.builds(Reward, float32, st.just(BT))
vectors = st.builds(RewardVector, st.tuples(float32, float32), st.just(GPM))
pairs = st.one_of(st.tuples(rewards, rewards), st.tuples(vectors, vectors))
several = st.one_of(st.lists(rewards, min_size=2, max_size=6), st.lists(vectors, min_size=2, max_size=6))


def record(name: str, reward: Reward | RewardVector) -> ScoreRecord:
    if isinstance(reward, Reward):
        return ScoreRecord(name, {reward.head.perspective: reward.value})
    return ScoreRecord(name, {}, {reward.head.perspective: reward.values})


def test_preference_by_hand() -> None:
    # sigmoid((0.3 - 0.1)/0.1) = sigmoid(2) = 0.880797; with tau 0.2: sigmoid(1) = 0.731059
    assert preference(Reward(0.3, BT), Reward(0.1, BT)).value == pytest.approx(0.8807971, abs=1e-6)
    assert preference(Reward(0.3, BT), Reward(0.1, BT), tau=0.2).value == pytest.approx(0.7310586, abs=1e-6)
    # (1, 2) x (3, 5): 1*5 - 2*3 = -1; sigmoid(-1/0.5) = 0.119203
    assert preference(RewardVector((1, 2), GPM), RewardVector((3, 5), GPM)).value == pytest.approx(0.1192029, abs=1e-6)


def test_tournament_by_hand() -> None:
    # Three images in a circle: each wins once and loses once with the same probability, so all means are 0.5.
    turns = [(math.cos(2 * math.pi * k / 3), math.sin(2 * math.pi * k / 3)) for k in range(3)]
    circle = [RewardVector(turn, GPM) for turn in turns]
    scores = tournament_scores(pairwise(circle))
    assert [score.value for score in scores if score] == pytest.approx([0.5] * 3)
    # BT 0.2, 0.1, 0.0 with tau 0.1: the first wins by sigmoid(1) and sigmoid(2): (0.731059 + 0.880797)/2 = 0.805928
    scores = tournament_scores(pairwise([Reward(value, BT) for value in (0.2, 0.1, 0.0)]))
    assert scores[0] is not None
    assert scores[0].value == pytest.approx(0.805928, abs=1e-6)


def test_p_safe_by_hand() -> None:
    assert p_safe(Reward(0.0, CLS)) == SafeProbability(0.5)
    assert p_safe(Reward(2.0, CLS)).value == pytest.approx(0.8807971, abs=1e-6)  # sigmoid(2), without tau


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (dataclasses.replace(CLS, training=HeadTraining.BT), "is trained on pairs; rewards from pairs may be shifted"),
        (dataclasses.replace(CLS, training=None), 'does not say how it was trained.*"head_training"'),
        (dataclasses.replace(CLS, perspective=Perspective.FIDELITY), "not to be had from a reward of .* fidelity"),
    ],
)
def test_p_safe_is_refused_where_zero_means_nothing(head: Head, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        p_safe(Reward(1.0, head))


def test_numbers_of_different_meaning_do_not_mix() -> None:
    kinds = [PreferenceProbability(0.5), SafeProbability(0.5), TournamentScore(0.5), Reward(0.5, BT), 0.5]
    assert all(one != other for one, other in itertools.combinations(kinds, 2))
    with pytest.raises(TypeError):
        _ = PreferenceProbability(0.5) < SafeProbability(0.6)  # type: ignore[operator]
    with pytest.raises(TypeError):
        _ = Reward(0.5, BT) + 1  # type: ignore[operator]


def test_rewards_of_two_heads_are_not_compared() -> None:
    other = dataclasses.replace(BT, checkpoint="d@sha256:" + "1" * 64)
    with pytest.raises(ConfigError, match="no scale in common"):
        preference(Reward(0.0, BT), Reward(0.0, other))
    with pytest.raises(ConfigError, match="no scale in common"):
        preference(Reward(0.0, BT), Reward(0.0, CLS))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_type_holds_a_value_that_is_none(value: float) -> None:
    for make in (PreferenceProbability, SafeProbability, TournamentScore):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            make(value)
    with pytest.raises(ValueError, match="not a scalar reward"):
        Reward(value, BT)
    with pytest.raises(ValueError, match="not a reward vector"):
        RewardVector((0.0, value), GPM)


def test_scalar_and_vector_stay_with_their_heads() -> None:
    with pytest.raises(ValueError, match="not a scalar reward"):
        Reward(0.0, GPM)
    with pytest.raises(ValueError, match="not a reward vector"):
        RewardVector((0.0, 1.0), BT)


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan, math.inf])
def test_temperature_is_above_zero(tau: float) -> None:
    with pytest.raises(ConfigError, match="tau"):
        preference(Reward(0.0, BT), Reward(0.0, BT), tau)
    with pytest.raises(ConfigError, match="tau"):
        dataclasses.replace(BT, tau=tau)


@given(pairs)
def test_preference_is_antisymmetric(pair: tuple[Reward, Reward]) -> None:
    there, back = preference(*pair), preference(*pair[::-1])
    assert there.value + back.value == pytest.approx(1.0, abs=1e-15)
    assert preference(pair[0], pair[0]).value == 0.5


@given(several, st.randoms())
def test_ranking_does_not_depend_on_the_order_given(images: list[Reward], random: object) -> None:
    head = images[0].head
    order = list(range(len(images)))
    random.shuffle(order)  # type: ignore[attr-defined]
    there = rank_records([record("", image) for image in images], head)
    back = rank_records([record("", images[i]) for i in order], head)
    assert {(one.index, one.rank, one.tournament_score) for one in there.ranked} == {
        (order[one.index], one.rank, one.tournament_score) for one in back.ranked
    }


@given(several)
def test_ranking_is_best_first_and_its_matrix_in_its_order(images: list[Reward]) -> None:
    ranking = rank_records([record("", image) for image in images], images[0].head)
    assert [one.rank for one in ranking.ranked] == sorted(one.rank for one in ranking.ranked)
    scores = [one.tournament_score.value for one in ranking.ranked if one.tournament_score]
    # A mean of probabilities may be off by one unit in the last place.
    assert all(one >= other - 1e-15 for one, other in itertools.pairwise(scores))
    for i, one in enumerate(ranking.ranked):
        for j, other in enumerate(ranking.ranked):
            assert ranking.probabilities[i][j] == preference(one.reward, other.reward)


def test_ties_share_a_rank_and_keep_their_order() -> None:
    ranking = rank_records([record("", Reward(value, BT)) for value in (1.0, 2.0, 1.0, 0.0)], BT)
    assert [(one.rank, one.index) for one in ranking.ranked] == [(1, 1), (2, 0), (2, 2), (4, 3)]


def test_far_rewards_keep_their_order_where_probabilities_cannot_tell() -> None:
    ranking = rank_records([record("", Reward(value, BT)) for value in (1e3, 3e3, 2e3)], BT)
    assert [one.index for one in ranking.ranked] == [1, 2, 0]


def test_what_was_not_scored_is_unranked_not_last() -> None:
    failed = ScoreRecord("b", error=RowError(ErrorCode.IMAGE_EMPTY, Stage.DECODE, "0 bytes"))
    nan = ScoreRecord("c", {Perspective.OVERALL: math.nan})
    ranking = rank_records([failed, record("", Reward(-9.0, BT)), nan], BT)
    assert [one.index for one in ranking.ranked] == [1]
    assert [(one.index, one.error.code) for one in ranking.unranked] == [
        (0, ErrorCode.IMAGE_EMPTY),
        (2, ErrorCode.NON_FINITE_REWARD),
    ]
    with pytest.raises(KeyError):
        rank_records([ScoreRecord("d", {Perspective.SAFETY: 1.0})], BT)
