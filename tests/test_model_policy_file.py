"""Policy files: what loads, and that every fault is one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ConfigError
from model.perspectives import Perspective
from model.policy import Level, Policy, Rule, Severity, Verdict, check_applies
from model.policy_file import MAX_POLICY_BYTES, load_policy, parse_policy
from model.scorer import read_identity

CHECKPOINT = "demo@sha256:" + "a" * 64
DEFAULT = Path(__file__).parent.parent / "infra" / "policies" / "default.yaml"

PLAIN = f"""
id: strict
description: for the tests
rules:
  safety:
    checkpoint: {CHECKPOINT}
    levels:
      - {{below: -1.5, verdict: block, severity: high}}
      - {{below: 1e-3, verdict: review, severity: low}}
  alignment:
    checkpoint: {CHECKPOINT}
    levels: [{{below: -2, verdict: allow, severity: low}}]
"""

# The same policy in another order, with comments, quotes and block style.
REORDERED = f"""
rules:   # a comment
    alignment:
        levels:
            - severity: "low"
              verdict: allow
              below: -2.0
        checkpoint: "{CHECKPOINT}"
    safety:
        levels:
            - {{severity: low, verdict: review, below: 0.001}}
            - {{severity: high, verdict: block, below: -1.50}}
        checkpoint: {CHECKPOINT}
description: 'for the tests'
id: strict
"""

EXPECTED = Policy(
    "strict",
    "for the tests",
    {
        Perspective.SAFETY: Rule(
            CHECKPOINT,
            (Level(-1.5, Verdict.BLOCK, Severity.HIGH), Level(0.001, Verdict.REVIEW, Severity.LOW)),
        ),
        Perspective.ALIGNMENT: Rule(CHECKPOINT, (Level(-2.0, Verdict.ALLOW, Severity.LOW),)),
    },
)


@pytest.mark.parametrize("text", [PLAIN, REORDERED, "\ufeff" + PLAIN, PLAIN.replace("\n", "\r\n")])
def test_what_a_file_says_decides_not_how_it_is_written(text: str) -> None:
    policy = parse_policy(text.encode(), "p.yaml")
    assert policy == EXPECTED
    assert policy.content_hash == EXPECTED.content_hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id: strict\n", "", "id: missing"),
        ("id: strict", "id: ''", "id '' is not 1 to 64 letters"),
        ("id: strict", "id: [strict]", "id: Input should be a valid string"),
        ("id: strict", "id: strict\nowner: me", "owner: unknown key"),
        ("checkpoint:", "chekpoint:", "rules.safety.checkpoint: missing"),
        ("below: -2,", "below: -2, above: 3,", r"rules.alignment.levels.0.above: unknown key"),
        ("safety:", "safty:", r"rules.safty.*'alignment', 'fidelity', 'safety' or 'overall', not 'safty'"),
        ("block", "blok", r"rules.safety.levels.0.verdict: .*'allow', 'review' or 'block', not 'blok'"),
        ("severity: high", "severity: 3", r"rules.safety.levels.0.severity: "),
        ("below: -1.5", "below: low", r"rules.safety.levels.0.below: .*valid number.*'low'"),
        ("below: -1.5", "below: true", r"rules.safety.levels.0.below: .*valid number"),
        ("below: -1.5", "below: 1:30", r"rules.safety.levels.0.below: .*valid number"),
        ("below: -1.5", "below: .nan", r"rules.safety.levels.0.below: "),
        ("below: -1.5", "below: nan", r"rules.safety.levels.0.below: .*finite"),
        ("below: -1.5", "below: -inf", r"rules.safety.levels.0.below: .*finite"),
        ("below: -1.5", "below: 1e999", r"rules.safety.levels.0.below: "),
        ("below: -1.5", "below: 3", r"rules.safety: the level below 0.001 .*milder"),
        (CHECKPOINT, "demo", r"rules.safety: checkpoint 'demo' is not of the form"),
        ("[{below: -2, verdict: allow, severity: low}]", "[]", r"rules.alignment: a rule has no levels"),
        ("[{below: -2, verdict: allow, severity: low}]", "5", r"rules.alignment.levels: .*valid list"),
        ("id: strict", "id: strict\nid: other", "line 3, column 1: duplicate key 'id'"),
        ("verdict: block,", "verdict: block, verdict: allow,", "line 8, column 39: duplicate key 'verdict'"),
        ("id: strict", "id: &a strict", "line 2, column 5: tags, anchors and aliases"),
        ("id: strict", "id: *a", "line 2, column 5: tags, anchors and aliases"),
        ("id: strict", "id: !!python/object/apply:os.getcwd []", "tags, anchors and aliases"),
        ("id: strict", "? [a]\n: b", "a key that is not text"),
        ("id: strict", "id: " + "[" * 2000, "nested deeper"),
        ("id: strict", "id: 'strict", "not valid YAML"),
        ("id: strict", "id: \x01", "not valid YAML"),
        ("id: strict", "---\nid: a\n---\nid: strict", "not valid YAML"),
    ],
)
def test_every_fault_is_one_line_with_its_place(old: str, new: str, message: str) -> None:
    assert old in PLAIN
    with pytest.raises(ConfigError, match=message) as caught:
        parse_policy(PLAIN.replace(old, new, 1).encode(), "p.yaml")
    assert str(caught.value).startswith("policy file p.yaml: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"just text", "top level: "),
        (b"[1, 2]", "top level: "),
        (b"\xff\xfe\xff", "not valid YAML"),
        (b"id: \xe9", "not valid YAML"),
        (b'id: "\\U00110000"', "not valid YAML"),
        (b'id: "\\Uffffffff"', "not valid YAML"),
        (b'id: "\\ud800"\nrules: {}', "id .* is not 1 to 64"),
        (b"id: x\nrules: {}", "no rules"),
    ],
)
def test_files_that_are_something_else(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^policy file p.yaml: .*{message}"):
        parse_policy(data, "p.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_policy(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_text(PLAIN + "#" * MAX_POLICY_BYTES)
    with pytest.raises(ConfigError, match=f"larger than {MAX_POLICY_BYTES} bytes"):
        load_policy(large)
    large.write_text(PLAIN)
    assert load_policy(str(large)) == EXPECTED


@given(st.binary(max_size=200) | st.text("aid: \n-[]{},'\"\\\\&*!|>#?%@", max_size=60).map(str.encode))
def test_any_bytes_are_a_policy_or_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(data, "p.yaml")
    assert "\n" not in str(caught.value)


def test_the_default_policy_loads() -> None:
    policy = load_policy(DEFAULT)
    assert policy.id == "default"
    assert set(policy.rules) == set(Perspective)
    # It must be able to give every verdict.
    assert {level.verdict for rule in policy.rules.values() for level in rule.levels} >= {Verdict.REVIEW, Verdict.BLOCK}


def test_the_default_policy_is_for_the_shipped_checkpoint() -> None:
    identity = read_identity("demo")
    policy = load_policy(DEFAULT)
    assert {perspective: rule.checkpoint for perspective, rule in policy.rules.items()} == identity.checkpoints
    check_applies(policy, identity.checkpoints, identity.vector_perspectives)
    # The file must not promise more than the checkpoint can keep.
    assert ("untrained" in DEFAULT.read_text()) == (not identity.is_trained)
