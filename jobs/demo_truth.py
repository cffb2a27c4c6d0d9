"""The truth of a demo night beside its rewards: what is wrong with each scene, and what the policy made of it.

The truth is known again from each row's seed. It stands in no log, so that no scorer can have seen it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from jobs.demo_data import DemoNight
from jobs.query import run_query
from model.evaluation.labels import concordance
from model.perspectives import PERSPECTIVES, Perspective
from model.policy import Policy, explain
from model.scenes import SceneTruth, truth_of

ORDERED = "ordered rightly"
COLUMNS = ("perspective", "flawed", "flawless", ORDERED, "flawed flagged", "flawless flagged")
_READ = (
    *("source_file", "source_row", "generation_id", "prompt", "extras", "image_width", "image_height"),
    *("verdict", "flags"),
)
_NOT_DEFINED = "not defined"
_NO_THRESHOLD = "no threshold"


class Outcome(StrEnum):
    """What became of a scene from one perspective."""

    CAUGHT = "caught"
    MISSED = "missed"
    PASSED = "passed"
    FALSE_ALARM = "false alarm"

    @property
    def is_right(self) -> bool:
        """Whether the flag agrees with the truth."""
        return self in (Outcome.CAUGHT, Outcome.PASSED)


@dataclass(frozen=True)
class PlainRow:
    """A scored row whose scene is as its seed drew it, ``size`` (width, height) pixels large."""

    seed: int
    size: tuple[int, int]
    generation_id: str
    prompt: str
    rewards: Mapping[Perspective, float]
    flags: frozenset[Perspective]
    verdict: str | None

    @property
    def truth(self) -> SceneTruth:
        """What is wrong with the scene; nothing is drawn for it."""
        return truth_of(self.seed)


@dataclass(frozen=True)
class Case:
    """One row as one perspective sees it. ``is_flagged``: below a threshold, or below ``Agreement.line``."""

    row: PlainRow
    reward: float
    grade: int
    is_flawed: bool
    is_flagged: bool
    reason: str

    @property
    def outcome(self) -> Outcome:
        """How truth and flag go together."""
        if self.is_flawed:
            return Outcome.CAUGHT if self.is_flagged else Outcome.MISSED
        return Outcome.FALSE_ALARM if self.is_flagged else Outcome.PASSED


@dataclass(frozen=True)
class Agreement:
    """How the rewards of one perspective agree with the truth; cases in the order of reward, then seed.

    - concordance: chance that of two scenes the better one has the higher reward; None where all are equally good
    - line: the reward that stands in for a threshold where the policy has none; else None
    """

    perspective: Perspective
    cases: tuple[Case, ...]
    concordance: float | None
    line: float | None

    def of(self, outcome: Outcome) -> list[Case]:
        """The cases that ended so, the lowest rewards first."""
        return [case for case in self.cases if case.outcome is outcome]

    def rewards(self, *, is_flawed: bool) -> list[float]:
        """The rewards of the flawed or of the flawless scenes, ascending."""
        return [case.reward for case in self.cases if case.is_flawed is is_flawed]


def plain_rows(output: str, night: DemoNight) -> list[PlainRow]:
    """The scored rows of the published night that are not among its hard ones: of those the seed says nothing."""
    hard = {(row.source_file, row.source_row) for row in night.hard_rows}
    names = [*_READ, *(f"reward_{perspective}" for perspective in PERSPECTIVES)]
    sql = f"SELECT {', '.join(names)} FROM scores WHERE status = 'scored'"  # noqa: S608 - our own names
    return [
        PlainRow(
            seed=json.loads(row["extras"])["seed"],
            size=(row["image_width"], row["image_height"]),
            generation_id=row["generation_id"],
            prompt=row["prompt"],
            rewards={p: reward for p in PERSPECTIVES if (reward := row[f"reward_{p}"]) is not None},
            flags=frozenset(map(Perspective, row["flags"])),
            verdict=row["verdict"],
        )
        for row in run_query(output, sql).to_pylist()
        if (row["source_file"], row["source_row"]) not in hard
    ]


def agreements(rows: Sequence[PlainRow], policy: Policy) -> list[Agreement]:
    """One for each perspective, also where no row has its reward."""
    return [_agreement(perspective, rows, policy) for perspective in PERSPECTIVES]


def _agreement(perspective: Perspective, rows: Sequence[PlainRow], policy: Policy) -> Agreement:
    scored = [row for row in rows if perspective in row.rewards]
    scored.sort(key=lambda row: (row.rewards[perspective], row.seed))
    rewards = [row.rewards[perspective] for row in scored]
    grades = [row.truth.grade(perspective) for row in scored]
    best = SceneTruth().grade(perspective)
    line = None if perspective in policy.rules else _line(rewards, sum(one < best for one in grades))
    cases = []
    for row, reward, of_row in zip(scored, rewards, grades, strict=True):
        is_flagged = perspective in row.flags if line is None else reward < line
        reason = _policy_reason(perspective, reward, policy) if line is None else _line_reason(reward, line)
        cases.append(Case(row, reward, of_row, of_row < best, is_flagged, reason))
    ordered = concordance(np.asarray(grades, dtype=np.int64), np.asarray(rewards, dtype=np.float64))
    return Agreement(perspective, tuple(cases), ordered, line)


def _policy_reason(perspective: Perspective, reward: float, policy: Policy) -> str:
    return explain({perspective: reward}, policy).get(perspective, f"{reward:.3f} is below no threshold")


def _line_reason(reward: float, line: float) -> str:
    return f"{reward:.3f} is {'below' if reward < line else 'not below'} the line at {line:.3f}"


def _line(rewards: Sequence[float], flawed: int) -> float:
    """Below it lie as many of the ascending rewards as scenes are flawed, or fewer where rewards are equal."""
    return rewards[flawed] if flawed < len(rewards) else math.inf


def cells(one: Agreement) -> dict[str, str]:
    """The line of one perspective in the table of all, by ``COLUMNS``."""
    flawed, flawless = len(one.rewards(is_flawed=True)), len(one.rewards(is_flawed=False))
    values = (
        one.perspective.value,
        str(flawed),
        str(flawless),
        _NOT_DEFINED if one.concordance is None else f"{one.concordance:.3f}",
        _NO_THRESHOLD if one.line is not None else _share(len(one.of(Outcome.CAUGHT)), flawed),
        _NO_THRESHOLD if one.line is not None else _share(len(one.of(Outcome.FALSE_ALARM)), flawless),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else _NOT_DEFINED
