"""What ``POST /v1/rank`` takes and gives: images of one prompt in, their order with probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from deployments.wire import ItemError, ModelFacts, Strict, model_facts
from model.meaning import Head, HeadTraining, RewardVector
from model.perspectives import Perspective
from model.ranking import RankedImage, Ranking


class RankRequest(Strict):
    prompt: str = Field(description="The text that was given to the image generator; may be empty.")
    images: list[str] = Field(min_length=1, description="Image files as base64 or data URLs, all made from the prompt.")
    perspective: Perspective = Field(Perspective.OVERALL, description="From which the images are compared.")


class RankedResult(Strict):
    """One image with its place. Exactly one of ``reward`` and ``reward_vector`` is filled."""

    rank: int = Field(description="From 1; images that tie share the smaller number.")
    index: int = Field(description="Place in the request, from 0.")
    reward: float | None = Field(description="Unbounded, higher is better.")
    reward_vector: list[float] | None = Field(description="Of a checkpoint without a scalar reward.")
    tournament_score: float | None = Field(
        description="Mean probability of being preferred to each of the other ranked images; null without others."
    )


class UnrankedResult(Strict):
    """An image that could not be scored: neither last nor anywhere else in the order."""

    index: int
    error: ItemError


class RankResponse(Strict):
    perspective: Perspective
    ranked: list[RankedResult] = Field(description="Best first.")
    unranked: list[UnrankedResult]
    preference_probabilities: list[list[float]] = Field(
        description="[i][j]: P(ranked[i] preferred to ranked[j]); 0.5 on the diagonal."
    )
    tau: float = Field(description="Temperature of the probabilities, from the checkpoint.")
    model: ModelFacts
    code_version: str


def head_facts(heads: Mapping[Perspective, Head]) -> dict[str, dict[str, Any]]:
    """Heads in plain values, as they stand under ``heads`` in ``Replica.identity``."""
    return {
        str(perspective): {
            "tau": head.tau,
            "is_general_preference": head.is_general_preference,
            "training": None if head.training is None else str(head.training),
        }
        for perspective, head in heads.items()
    }


def head_of(identity: Mapping[str, Any], perspective: Perspective) -> Head:
    """The head behind a perspective that the identity has."""
    facts = identity["heads"][perspective]
    training = None if facts["training"] is None else HeadTraining(facts["training"])
    checkpoint = identity["checkpoints"][perspective]
    return Head(perspective, checkpoint, facts["tau"], facts["is_general_preference"], training)


def to_rank_response(
    ranking: Ranking, indices: Sequence[int], unreadable: Mapping[int, ItemError], identity: Mapping[str, Any]
) -> RankResponse:
    """``indices``: place in the request of each image of the ranking; ``unreadable``: of those that never got there."""
    errors = dict(unreadable)
    for one in ranking.unranked:
        errors[indices[one.index]] = ItemError(code=one.error.code, stage=one.error.stage, message=one.error.message)
    return RankResponse(
        perspective=ranking.head.perspective,
        ranked=[_ranked(one, indices[one.index]) for one in ranking.ranked],
        unranked=[UnrankedResult(index=index, error=errors[index]) for index in sorted(errors)],
        preference_probabilities=[[p.value for p in row] for row in ranking.probabilities],
        tau=ranking.head.tau,
        model=model_facts(identity),
        code_version=identity["code_version"],
    )


def _ranked(one: RankedImage, index: int) -> RankedResult:
    return RankedResult(
        rank=one.rank,
        index=index,
        reward=None if isinstance(one.reward, RewardVector) else one.reward.value,
        reward_vector=list(one.reward.values) if isinstance(one.reward, RewardVector) else None,
        tournament_score=None if one.tournament_score is None else one.tournament_score.value,
    )
