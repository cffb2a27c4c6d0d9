"""Policy and decide: worked cases, properties, and Python against DuckDB."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ConfigError, ErrorCode, InputError, Stage
from model.perspectives import PERSPECTIVES, Perspective
from model.policy import Decision, Level, Policy, Rule, Severity, Verdict, check_applies, decide, to_sql

ALIGNMENT, FIDELITY, SAFETY, OVERALL = PERSPECTIVES
CHECKPOINT = "demo@sha256:" + "a" * 64
OTHER = "demo@sha256:" + "b" * 64


def _policy(**levels: list[tuple[float, str, str]]) -> Policy:
    rules = {
        Perspective(name): Rule(CHECKPOINT, tuple(Level(b, Verdict(v), Severity(s)) for b, v, s in given))
        for name, given in levels.items()
    }
    return Policy("test", "", rules)


POLICY = _policy(
    safety=[(-1.0, "block", "high"), (0.0, "review", "medium")],
    fidelity=[(-2.0, "review", "medium"), (-0.5, "allow", "low")],
)

ALLOW, REVIEW, BLOCK = Verdict
NONE, LOW, MEDIUM, HIGH = Severity


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ({SAFETY: 1.0, FIDELITY: 1.0}, Decision(ALLOW, NONE, ())),
        # a reward that equals the threshold is not below it
        ({SAFETY: 0.0, FIDELITY: 1.0}, Decision(ALLOW, NONE, ())),
        ({SAFETY: -0.0, FIDELITY: 1.0}, Decision(ALLOW, NONE, ())),
        ({SAFETY: -1e-6, FIDELITY: 1.0}, Decision(REVIEW, MEDIUM, (SAFETY,))),
        ({SAFETY: -1.0, FIDELITY: 1.0}, Decision(REVIEW, MEDIUM, (SAFETY,))),
        ({SAFETY: -1.5, FIDELITY: 1.0}, Decision(BLOCK, HIGH, (SAFETY,))),
        ({SAFETY: 1.0, FIDELITY: -1.0}, Decision(ALLOW, LOW, (FIDELITY,))),
        # the highest of both, flags in the order of PERSPECTIVES
        ({SAFETY: -1.5, FIDELITY: -3.0}, Decision(BLOCK, HIGH, (FIDELITY, SAFETY))),
        ({SAFETY: -0.5, FIDELITY: -1.0}, Decision(REVIEW, MEDIUM, (FIDELITY, SAFETY))),
        # missing never means safe
        ({SAFETY: 1.0}, Decision(None, None, ())),
        ({SAFETY: 1.0, FIDELITY: None}, Decision(None, None, ())),
        ({}, Decision(None, None, ())),
        ({SAFETY: -0.5, FIDELITY: None}, Decision(None, None, (SAFETY,))),
        ({FIDELITY: -3.0, SAFETY: None}, Decision(None, None, (FIDELITY,))),
        # ... and does not hide what already blocks
        ({SAFETY: -1.5}, Decision(BLOCK, HIGH, (SAFETY,))),
        # perspectives that the policy does not name do not matter
        ({SAFETY: 1.0, FIDELITY: 1.0, OVERALL: -99.0, ALIGNMENT: None}, Decision(ALLOW, NONE, ())),
    ],
)
def test_decide_worked_cases(rewards: Mapping[Perspective, float | None], expected: Decision) -> None:
    assert decide(rewards, POLICY) == expected


def test_decide_takes_rewards_as_the_float32_that_is_published() -> None:
    # float32(0.1) = 0.100000001490116..., which is not below 0.1, though 0.0999999999 as a double is.
    policy = _policy(safety=[(0.1, "block", "high")])
    assert decide({SAFETY: 0.0999999999}, policy).verdict is ALLOW
    assert decide({SAFETY: float(np.nextafter(np.float32(0.1), np.float32(0)))}, policy).verdict is BLOCK


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf"), 1e39, -1e39])
@pytest.mark.parametrize("perspective", [SAFETY, OVERALL])
def test_decide_refuses_a_non_finite_reward(reward: float, perspective: Perspective) -> None:
    with pytest.raises(InputError, match=f"{perspective} reward") as caught:
        decide({SAFETY: -5.0, FIDELITY: 1.0, perspective: reward}, POLICY)
    assert (caught.value.code, caught.value.stage) == (ErrorCode.NON_FINITE_REWARD, Stage.SCORE)


def test_verdict_and_severity_are_ordered_as_listed() -> None:
    for enum in (Verdict, Severity):
        assert max(enum) is list(enum)[-1]
        assert all(low < high and low <= high and high > low and high >= low for low, high in pairwise(enum))
    assert Severity("high") > "low"
    with pytest.raises(ValueError, match="worst"):
        _ = Severity.HIGH < "worst"


@pytest.mark.parametrize(
    ("levels", "match"),
    [
        ([(0.0, "block", "high"), (-1.0, "review", "high")], "milder"),
        ([(0.0, "review", "high"), (-1.0, "block", "medium")], "milder"),
        ([(0.0, "review", "low"), (0.0, "block", "high")], "same threshold"),
        ([(0.0, "review", "low"), (-0.0, "block", "high")], "same threshold"),
        ([(0.0, "block", "none")], "severity none"),
        ([(float("nan"), "block", "high")], "finite"),
        ([(float("-inf"), "block", "high")], "finite"),
        ([], "no levels"),
    ],
)
def test_inconsistent_levels_are_refused(levels: list[tuple[float, str, str]], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _policy(safety=levels)


@pytest.mark.parametrize("checkpoint", ["demo", "demo@sha256:abc", "@sha256:" + "a" * 64, "d@sha256:" + "A" * 64])
def test_a_rule_names_its_checkpoint_by_hash(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="id@sha256"):
        Rule(checkpoint, (Level(0.0, BLOCK, HIGH),))


def test_a_policy_has_an_id_and_rules() -> None:
    with pytest.raises(ConfigError, match="no rules"):
        Policy("empty", "", {})
    for bad in ("", " ", "a b", "a\n", "\u00e9", "x" * 65):
        with pytest.raises(ConfigError, match="is not 1 to 64 letters"):
            Policy(bad, "", POLICY.rules)


def test_content_hash_is_equality() -> None:
    shuffled = _policy(
        fidelity=[(-0.5, "allow", "low"), (-2.0, "review", "medium")],
        safety=[(0.0, "review", "medium"), (-1.0, "block", "high")],
    )
    assert shuffled == POLICY
    assert shuffled.content_hash == POLICY.content_hash
    # Stored nights carry the hash: it must not change with the code.
    assert POLICY.content_hash == "3e37e9e9d6f760ea6d1842ab1d3e7ce0fe8957cc0e68a6010c67a71258fd8c6b"
    for changed in (
        Policy("other", "", POLICY.rules),
        Policy("test", "words", POLICY.rules),
        Policy("test", "", {SAFETY: POLICY.rules[SAFETY]}),
        Policy("test", "", POLICY.rules | {SAFETY: Rule(OTHER, POLICY.rules[SAFETY].levels)}),
        _policy(safety=[(-1.0, "block", "high"), (1e-9, "review", "medium")], fidelity=[(-2.0, "review", "medium")]),
    ):
        assert changed != POLICY
        assert changed.content_hash != POLICY.content_hash


def test_policy_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(POLICY)) == POLICY


def test_check_applies() -> None:
    scoring = dict.fromkeys(PERSPECTIVES, CHECKPOINT)
    check_applies(POLICY, scoring)
    check_applies(POLICY, {SAFETY: CHECKPOINT})  # fidelity is not scored; decide says so row by row
    check_applies(POLICY, scoring | {OVERALL: OTHER}, [OVERALL])  # not in the policy
    with pytest.raises(ConfigError, match=rf"safety.*{CHECKPOINT}.*{OTHER}.*set the thresholds anew"):
        check_applies(POLICY, scoring | {SAFETY: OTHER})
    with pytest.raises(ConfigError, match=r"fidelity.*vector.*remove fidelity"):
        check_applies(POLICY, scoring, (FIDELITY,))


# Properties. Rewards and thresholds come from one small grid of float32 values, their float32 neighbours and
# decimals next to them, so that a reward often sits exactly at a threshold or one step beside it.

_GRID = [float(np.float32(x)) for x in (-3.3, -1.0, -0.1, 0.0, 1e-42, 0.1, 0.3, 2.7, 16777217.0)]
_NEXT = [float(np.nextafter(np.float32(x), np.float32(side))) for x in _GRID for side in (-np.inf, np.inf)]
_rewards = st.sampled_from(_GRID + _NEXT) | st.floats(width=32, allow_nan=False, allow_infinity=False)
_thresholds = st.sampled_from([*_GRID, *_NEXT, -3.3, -0.1, 0.1, 0.3, 2.7, 1e-300, 5e-324]) | st.floats(
    allow_nan=False, allow_infinity=False
)
_reward_maps = st.dictionaries(st.sampled_from(PERSPECTIVES), st.none() | _rewards)


@st.composite
def _rules(draw: st.DrawFn) -> Rule:
    # + 0.0 makes -0.0 and 0.0 one threshold, which a rule may name only once
    below = sorted({x + 0.0 for x in draw(st.lists(_thresholds, min_size=1, max_size=4))}, reverse=True)
    size = len(below)
    verdicts = sorted(draw(st.lists(st.sampled_from(Verdict), min_size=size, max_size=size)))
    severities = sorted(draw(st.lists(st.sampled_from([LOW, MEDIUM, HIGH]), min_size=size, max_size=size)))
    return Rule(CHECKPOINT, tuple(Level(*level) for level in zip(below, verdicts, severities, strict=True)))


_policies = st.builds(
    Policy, st.just("test"), st.just(""), st.dictionaries(st.sampled_from(PERSPECTIVES), _rules(), min_size=1)
)


@given(_policies, st.lists(_reward_maps, min_size=1, max_size=8))
@settings(deadline=None, max_examples=150)
def test_python_and_duckdb_agree(policy: Policy, rows: list[dict[Perspective, float | None]]) -> None:
    table = pa.table({f"reward_{p}": pa.array([row.get(p) for row in rows], pa.float32()) for p in PERSPECTIVES})
    sql = to_sql(policy)
    with duckdb.connect() as connection:
        connection.register("scores", table)
        query = f"SELECT {sql['verdict']}, {sql['severity']}, {sql['flags']} FROM scores"
        judged = connection.execute(query).fetchall()
    decisions = [decide(row, policy) for row in rows]
    assert judged == [(d.verdict, d.severity, list(d.flags)) for d in decisions]


@given(_policies, _reward_maps, st.sampled_from(PERSPECTIVES), _rewards)
def test_lowering_a_reward_never_lowers_severity_or_verdict(
    policy: Policy, rewards: dict[Perspective, float | None], perspective: Perspective, other: float
) -> None:
    current = rewards.get(perspective)
    low, high = sorted((other, other if current is None else current))
    worse, better = decide(rewards | {perspective: low}, policy), decide(rewards | {perspective: high}, policy)
    # A row without a verdict may become blocked, never the other way round; where both are judged, order holds.
    if better.verdict is not None and better.severity is not None:
        assert worse.verdict is not None
        assert worse.severity is not None
        assert worse.verdict >= better.verdict
        assert worse.severity >= better.severity
    assert set(worse.flags) >= set(better.flags)


@given(_policies, _reward_maps, st.sampled_from(PERSPECTIVES))
def test_a_missing_reward_never_means_safe(
    policy: Policy, rewards: dict[Perspective, float | None], missing: Perspective
) -> None:
    decision = decide(rewards | {missing: None}, policy)
    if missing in policy.rules:
        assert decision.verdict in (None, BLOCK)
    assert (decision.verdict is None) == (decision.severity is None)


@given(_policies, _reward_maps, st.randoms())
def test_decide_does_not_depend_on_order(
    policy: Policy, rewards: dict[Perspective, float | None], random: object
) -> None:
    shuffled, rules = list(rewards.items()), list(policy.rules.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    random.shuffle(rules)  # type: ignore[attr-defined]
    again = Policy(policy.id, policy.description, dict(rules))
    assert decide(dict(shuffled), again) == decide(rewards, policy)
    assert again.content_hash == policy.content_hash
    assert to_sql(again) == to_sql(policy)
