"""What a number of a reward model means, as types that cannot be mixed up. Standard library only.

A ``Reward`` knows the head that gave it. So rewards of two checkpoints are not compared, a general-preference
vector is not read as a scalar, and P(safe) is not read off a head whose zero has no meaning.

Source: LLaVA-Reward (arXiv 2507.21391), released code: Bradley-Terry (BT), general preference (GPM) and
classification (CLS) heads; the formulas are in ``llava_reward/heads.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from model.errors import ConfigError
from model.llava_reward.heads import preference_probability, safe_probability
from model.perspectives import Perspective


class HeadTraining(StrEnum):
    """What a scalar head was trained on; its weights do not tell."""

    BT = "bt"  # preference pairs: only differences of rewards mean something
    CLS = "cls"  # labels: sigmoid(reward) is the probability of the good label


@dataclass(frozen=True)
class Head:
    """One perspective's head of one checkpoint.

    - checkpoint: ``id@sha256:hash``; tau: temperature of preferences, above 0
    - training: None where the checkpoint does not say; always None for a GPM head
    """

    perspective: Perspective
    checkpoint: str
    tau: float
    is_general_preference: bool = False
    training: HeadTraining | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"tau={self.tau} of {self.checkpoint} must be a number above 0")


@dataclass(frozen=True)
class Reward:
    """A scalar reward: unbounded, higher is better. Raises ``ValueError`` if not finite, or of a GPM head."""

    value: float
    head: Head

    def __post_init__(self) -> None:
        if self.head.is_general_preference or not math.isfinite(self.value):
            raise ValueError(f"{self.value} is not a scalar reward of {self.head.checkpoint}")


@dataclass(frozen=True)
class RewardVector:
    """What a GPM head gives: it means something only beside another. Raises ``ValueError`` likewise."""

    values: tuple[float, ...]
    head: Head

    def __post_init__(self) -> None:
        if not self.head.is_general_preference or not all(map(math.isfinite, self.values)):
            raise ValueError(f"{self.values} is not a reward vector of {self.head.checkpoint}")


@dataclass(frozen=True)
class _Probability:
    """In [0, 1]; 1.0 and 0.0 occur, where float64 cannot tell them from their neighbours."""

    value: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.value <= 1.0:  # false for NaN as well
            raise ValueError(f"{self.value} is no {type(self).__name__}: it must lie in [0, 1]")


@dataclass(frozen=True)
class PreferenceProbability(_Probability):
    """P(one image is preferred to another, for the same prompt)."""


@dataclass(frozen=True)
class SafeProbability(_Probability):
    """P(an image is safe)."""


@dataclass(frozen=True)
class TournamentScore(_Probability):
    """Mean probability of being preferred to each of the other images: depends on who they are."""


AnyReward = Reward | RewardVector
R = TypeVar("R", Reward, RewardVector)


def preference(chosen: R, rejected: R, tau: float | None = None) -> PreferenceProbability:
    """P(chosen preferred to rejected); both for the same prompt, which nobody can check here.

    - tau: temperature; by default that of their head. sigmoid((c - r)/tau) for BT and CLS, sigmoid(s(c, r)/tau)
      for GPM
    - raises: ``ConfigError`` if they come from two heads, or tau is not above 0
    """
    if chosen.head != rejected.head:
        raise ConfigError(
            f"rewards of {chosen.head.checkpoint} and {rejected.head.checkpoint} have no scale in common; "
            "score both images with one checkpoint and one perspective"
        )
    temperature = chosen.head.tau if tau is None else tau
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"tau={temperature} must be a number above 0")
    return PreferenceProbability(preference_probability(_values(chosen), _values(rejected), temperature))


def p_safe(reward: Reward) -> SafeProbability:
    """P(safe) = sigmoid(reward), without tau.

    - raises: ``ConfigError`` unless the reward is a safety reward of a head that is known to be CLS-trained
    """
    head = reward.head
    if head.perspective is not Perspective.SAFETY:
        raise ConfigError(f"P(safe) is not to be had from a reward of perspective {head.perspective}")
    if head.training is not HeadTraining.CLS:
        found = "is trained on pairs" if head.training is HeadTraining.BT else "does not say how it was trained"
        raise ConfigError(
            f"{head.checkpoint} {found}; rewards from pairs may be shifted by any constant, so that sigmoid(reward) "
            'means nothing. If it was trained on labels, say so in its scorer.json: "head_training": {"safety": "cls"}'
        )
    return SafeProbability(safe_probability(reward.value))


def pairwise(rewards: Sequence[R]) -> list[list[PreferenceProbability]]:
    """``[i][j]`` = P(i preferred to j), ``(n, n)``, 0.5 on the diagonal; ``[i][j]`` and ``[j][i]`` add up to 1."""
    return [[preference(one, other) for other in rewards] for one in rewards]


def tournament_scores(probabilities: Sequence[Sequence[PreferenceProbability]]) -> list[TournamentScore | None]:
    """Mean of each row without its diagonal. None for an image without others: it has won against nobody.

    The sum is exact (``fsum``), so that the order of the images cannot change a score.
    """
    others = len(probabilities) - 1
    if others < 1:
        return [None] * len(probabilities)
    return [
        TournamentScore(math.fsum(p.value for j, p in enumerate(row) if j != i) / others)
        for i, row in enumerate(probabilities)
    ]


def _values(reward: AnyReward) -> tuple[float, ...]:
    return (reward.value,) if isinstance(reward, Reward) else reward.values
