"""From rewards to a verdict: ``Policy``, ``decide``, and the same judgement as SQL.

A verdict is a pure function of (rewards, policy), so stored rewards can be judged again at any time without
the model. Missing never means safe. Standard library only; reading YAML is ``model/policy_file.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

from model.errors import ConfigError, ErrorCode, InputError, Stage
from model.perspectives import PERSPECTIVES, Perspective

_POLICY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it stands in every published row and in file names
_CHECKPOINT = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


class _OrderedEnum(StrEnum):
    """Strings ordered as they are listed. As plain strings "high" would come before "low"."""

    @property
    def rank(self) -> int:
        return list(type(self)).index(self)

    def __lt__(self, other: str) -> bool:
        return self.rank < type(self)(other).rank

    def __le__(self, other: str) -> bool:
        return self.rank <= type(self)(other).rank

    def __gt__(self, other: str) -> bool:
        return self.rank > type(self)(other).rank

    def __ge__(self, other: str) -> bool:
        return self.rank >= type(self)(other).rank


class Verdict(_OrderedEnum):
    """What happens to one generation, mildest first."""

    ALLOW = "allow"
    REVIEW = "review"
    BLOCK = "block"


class Severity(_OrderedEnum):
    """How bad a generation is, mildest first."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True)
class Level:
    """Crossed by a reward below ``below`` (reward units, finite); a reward that equals it is not below it."""

    below: float
    verdict: Verdict
    severity: Severity

    def __post_init__(self) -> None:
        if not math.isfinite(self.below):
            raise ConfigError(f"below={self.below} is not a finite number; give a threshold in reward units")
        if self.severity is Severity.NONE:
            raise ConfigError(f"the level below {self.below} has severity none; a crossed level is low, medium or high")
        # -0.0 is 0.0 in every comparison, and must be in the content hash too.
        object.__setattr__(self, "below", float(self.below) + 0.0)


@dataclass(frozen=True)
class Rule:
    """The levels of one perspective, highest ``below`` first, for the rewards of one checkpoint.

    ``checkpoint``: ``id@sha256:hash``. Thresholds mean nothing in the reward units of another checkpoint.
    """

    checkpoint: str
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not _CHECKPOINT.fullmatch(self.checkpoint):
            raise ConfigError(f"checkpoint {self.checkpoint!r} is not of the form id@sha256:<64 hex digits>")
        if not self.levels:
            raise ConfigError("a rule has no levels; give at least one, or leave the perspective out")
        levels = tuple(sorted(self.levels, key=lambda level: -level.below))
        for milder, harsher in pairwise(levels):
            if milder.below == harsher.below:
                raise ConfigError(f"two levels have the same threshold below={milder.below}")
            if harsher.verdict < milder.verdict or harsher.severity < milder.severity:
                raise ConfigError(
                    f"the level below {harsher.below} ({harsher.verdict}, {harsher.severity}) is milder than "
                    f"the level below {milder.below} ({milder.verdict}, {milder.severity}); a lower reward is worse"
                )
        object.__setattr__(self, "levels", levels)


@dataclass(frozen=True)
class Policy:
    """Thresholds and what crossing them means. Two policies are equal exactly when their hashes are."""

    id: str
    description: str
    rules: Mapping[Perspective, Rule]
    content_hash: str = field(init=False)

    def __post_init__(self) -> None:
        if not _POLICY_ID.fullmatch(self.id):
            raise ConfigError(f"id {self.id[:80]!r} is not 1 to 64 letters, digits, dots, dashes or underscores")
        if not self.rules:
            raise ConfigError(f"policy {self.id} has no rules; it would allow everything")
        ordered = {perspective: self.rules[perspective] for perspective in PERSPECTIVES if perspective in self.rules}
        object.__setattr__(self, "rules", ordered)
        object.__setattr__(self, "content_hash", _content_hash(self))


@dataclass(frozen=True)
class Decision:
    """The judgement of one generation; ``flags`` in the order of ``PERSPECTIVES``.

    ``verdict`` and ``severity`` are both None where the policy lacks a reward that it needs.
    """

    verdict: Verdict | None
    severity: Severity | None
    flags: tuple[Perspective, ...]


def _content_hash(policy: Policy) -> str:
    """sha256 over canonical JSON, hex: how a file was formatted, ordered or commented does not change it."""
    content: dict[str, Any] = {
        "id": policy.id,
        "description": policy.description,
        "rules": {
            perspective.value: {
                "checkpoint": rule.checkpoint,
                "levels": [[level.below, level.verdict.value, level.severity.value] for level in rule.levels],
            }
            for perspective, rule in policy.rules.items()
        },
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def decide(rewards: Mapping[Perspective, float | None], policy: Policy) -> Decision:
    """Judge one generation. Pure; rewards are taken at float32 precision, as they are published.

    Per perspective the most severe crossed level counts; overall the highest verdict and the highest severity.
    Where a perspective of the policy has no reward, verdict and severity are None, unless the known rewards
    already block: then they are those of the known rewards. Other perspectives do not matter.

    Raises: ``InputError`` (``non_finite_reward``) when any reward is NaN or infinite in float32.
    """
    known = {
        perspective: _float32(perspective, reward) for perspective, reward in rewards.items() if reward is not None
    }
    crossed = {
        perspective: level
        for perspective, rule in policy.rules.items()
        if perspective in known and (level := _crossed_level(known[perspective], rule)) is not None
    }
    flags = tuple(crossed)
    verdict = max((level.verdict for level in crossed.values()), default=Verdict.ALLOW)
    if verdict is not Verdict.BLOCK and any(perspective not in known for perspective in policy.rules):
        return Decision(None, None, flags)
    return Decision(verdict, max((level.severity for level in crossed.values()), default=Severity.NONE), flags)


def explain(rewards: Mapping[Perspective, float | None], policy: Policy) -> dict[Perspective, str]:
    """Why: per flagged perspective its reward, the threshold that it crossed, and what that means."""
    reasons = {}
    for perspective, rule in policy.rules.items():
        reward = rewards.get(perspective)
        if reward is not None and (level := _crossed_level(_float32(perspective, reward), rule)) is not None:
            reasons[perspective] = f"{reward:.3f} is below {level.below:g}: {level.verdict}, severity {level.severity}"
    return reasons


def _float32(perspective: Perspective, reward: float) -> float:
    try:
        rounded = float(struct.unpack("<f", struct.pack("<f", reward))[0])
    except OverflowError:  # finite as a double, infinite as the float32 that is stored
        rounded = math.inf
    if not math.isfinite(rounded):
        message = f"the {perspective} reward {reward} is not a finite float32; the checkpoint or its inputs are broken"
        raise InputError(ErrorCode.NON_FINITE_REWARD, Stage.SCORE, message)
    return rounded


def _crossed_level(reward: float, rule: Rule) -> Level | None:
    """The most severe level that ``reward`` crosses: levels are consistent, so the last one of them."""
    crossed = [level for level in rule.levels if reward < level.below]
    return crossed[-1] if crossed else None


def to_sql(policy: Policy) -> dict[str, str]:
    """The policy as SQL expressions ``verdict``, ``severity`` and ``flags``, equal to ``decide``.

    They read the columns ``reward_<perspective>`` (float32, null where not scored, finite) and use only what
    DuckDB, Trino and Athena share. Both sides of a comparison are DOUBLE: a bare decimal literal, or a literal
    rounded to the column's float32, would judge a reward next to a threshold differently.
    """
    blocks = _any_crossed(policy, verdict=Verdict.BLOCK)
    reviews = _any_crossed(policy, verdict=Verdict.REVIEW)
    missing = " OR ".join(f"{_column(perspective)} IS NULL" for perspective in policy.rules)
    undecided = f"WHEN ({missing}) AND NOT ({blocks}) THEN NULL"
    severities = " ".join(
        f"WHEN {_any_crossed(policy, severity=severity)} THEN '{severity}'"
        for severity in (Severity.HIGH, Severity.MEDIUM, Severity.LOW)
    )
    return {
        "verdict": f"CASE {undecided} WHEN {blocks} THEN 'block' WHEN {reviews} THEN 'review' ELSE 'allow' END",
        "severity": f"CASE {undecided} {severities} ELSE 'none' END",
        "flags": " || ".join(
            f"CASE WHEN {_crosses(perspective, rule.levels[0].below)} THEN ARRAY['{perspective}'] ELSE ARRAY[] END"
            for perspective, rule in policy.rules.items()
        ),
    }


def _column(perspective: Perspective) -> str:
    return f"reward_{perspective}"


def _crosses(perspective: Perspective, below: float) -> str:
    """SQL that is true or false, never null. ``E0`` makes the literal a DOUBLE; without it it is a DECIMAL."""
    literal = repr(below).upper()
    literal = literal if "E" in literal else f"{literal}E0"
    column = _column(perspective)
    return f"({column} IS NOT NULL AND CAST({column} AS DOUBLE) < {literal})"


def _any_crossed(policy: Policy, verdict: Verdict = Verdict.ALLOW, severity: Severity = Severity.NONE) -> str:
    """SQL: a level of at least this verdict and severity is crossed. Of these the highest ``below`` is enough."""
    terms = []
    for perspective, rule in policy.rules.items():
        thresholds = [x.below for x in rule.levels if x.verdict >= verdict and x.severity >= severity]
        if thresholds:
            terms.append(_crosses(perspective, max(thresholds)))
    return " OR ".join(terms) if terms else "FALSE"


def check_applies(
    policy: Policy, checkpoints: Mapping[Perspective, str], vector_perspectives: Collection[Perspective] = ()
) -> None:
    """Check that the policy's thresholds are in the reward units of the checkpoints that score.

    ``checkpoints``: as in ``ScorerIdentity``. A perspective that they lack passes: nothing scores it, so it
    will be missing in every row, and ``decide`` says so there.

    Raises: ``ConfigError`` for a threshold made for another checkpoint, or set on a perspective whose
    checkpoint gives a vector (general-preference head) and no scalar.
    """
    for perspective, rule in policy.rules.items():
        if perspective in vector_perspectives:
            raise ConfigError(
                f"policy {policy.id} sets thresholds on {perspective}, but checkpoint {checkpoints.get(perspective)} "
                f"gives it a vector, not a scalar reward; remove {perspective} from the policy"
            )
        scoring = checkpoints.get(perspective, rule.checkpoint)
        if scoring != rule.checkpoint:
            raise ConfigError(
                f"policy {policy.id} has {perspective} thresholds for checkpoint {rule.checkpoint}, but {scoring} "
                f"scores; set the thresholds anew for that one and name it in the policy, or score with the first"
            )
