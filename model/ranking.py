"""Best-of-N: images of one prompt in order of preference, with the probabilities behind it.

A scalar head ranks by reward, a general-preference head by tournament score. Knows nothing about models: it reads
score records. A ranking is no verdict; the best of N unsafe images is unsafe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.errors import ConfigError, ErrorCode, Stage
from model.meaning import (
    Head,
    PreferenceProbability,
    R,
    Reward,
    RewardVector,
    TournamentScore,
    pairwise,
    tournament_scores,
)
from model.perspectives import Perspective
from model.schema import Generation, RowError, ScoreRecord

if TYPE_CHECKING:
    from model.scorer import Scorer


@dataclass(frozen=True)
class RankedImage:
    """One image with its place.

    - rank: from 1; images that tie share the smaller number, and stand in the order in which they were given
    - index: its place among the images that were given, from 0
    - tournament_score: None where it is the only ranked image
    """

    rank: int
    index: int
    reward: Reward | RewardVector
    tournament_score: TournamentScore | None


@dataclass(frozen=True)
class UnrankedImage:
    """An image that could not be scored: neither last nor anywhere else in the order."""

    index: int
    error: RowError


@dataclass(frozen=True)
class Ranking:
    """Images of one prompt, best first. ``ranked`` and ``unranked`` hold each image that was given once.

    ``probabilities[i][j]``: P(``ranked[i]`` preferred to ``ranked[j]``).
    """

    head: Head
    ranked: tuple[RankedImage, ...]
    unranked: tuple[UnrankedImage, ...]
    probabilities: tuple[tuple[PreferenceProbability, ...], ...]

    @property
    def best(self) -> RankedImage | None:
        """The first ranked image, or None if none could be scored."""
        return self.ranked[0] if self.ranked else None


def rank_images(scorer: Scorer, prompt: str, images: Sequence[bytes], perspective: Perspective) -> Ranking:
    """Score encoded images of one prompt and rank them.

    - raises: ``ConfigError`` for a perspective that the scorer does not have; a bad image raises nothing, it is in
      ``unranked``
    """
    if perspective not in scorer.heads:
        have = ", ".join(scorer.heads)
        raise ConfigError(f"{perspective} cannot be ranked by {scorer.identity.name}, which has {have}")
    generations = [Generation(str(index), prompt, image) for index, image in enumerate(images)]
    return rank_records(scorer.score(generations, [perspective]), scorer.heads[perspective])


def rank_records(records: Sequence[ScoreRecord], head: Head) -> Ranking:
    """Rank records of one prompt by ``head``'s perspective; each index is the record's place in ``records``.

    Raises ``KeyError`` for a record that was not scored from that perspective.
    """
    unranked = [UnrankedImage(index, error) for index, one in enumerate(records) if (error := _error(one, head))]
    failed = {one.index for one in unranked}
    indices = [index for index in range(len(records)) if index not in failed]
    if head.is_general_preference:
        vectors = [RewardVector(tuple(records[i].reward_vectors[head.perspective]), head) for i in indices]
        return _ranking(head, indices, vectors, unranked)
    rewards = [Reward(records[i].rewards[head.perspective], head) for i in indices]
    return _ranking(head, indices, rewards, unranked)


def _ranking(head: Head, indices: Sequence[int], rewards: Sequence[R], unranked: Sequence[UnrankedImage]) -> Ranking:
    probabilities = pairwise(rewards)
    scores = tournament_scores(probabilities)
    # A scalar head's order is that of its rewards: probabilities of far rewards are all 1.0, and would tie.
    keys = [
        one.value if isinstance(one, Reward) else score.value if score else 0.0
        for one, score in zip(rewards, scores, strict=True)
    ]
    order = sorted(range(len(keys)), key=lambda i: -keys[i])  # stable: ties keep the order given
    ranked = tuple(
        RankedImage(1 + sum(key > keys[i] for key in keys), indices[i], rewards[i], scores[i]) for i in order
    )
    return Ranking(head, ranked, tuple(unranked), tuple(tuple(probabilities[i][j] for j in order) for i in order))


def _error(record: ScoreRecord, head: Head) -> RowError | None:
    if record.error is not None:
        return record.error
    is_vector = head.is_general_preference
    values = record.reward_vectors[head.perspective] if is_vector else (record.rewards[head.perspective],)
    if all(map(math.isfinite, values)):
        return None
    message = f"reward of {head.perspective} is not a finite number; score it in float32"
    return RowError(ErrorCode.NON_FINITE_REWARD, Stage.SCORE, message)
