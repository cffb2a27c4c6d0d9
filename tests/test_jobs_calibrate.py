"""assay calibrate, from labels to a policy that the rest of Assay reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jobs import cli
from model.errors import ConfigError
from model.evaluation.calibration import from_json
from model.evaluation.libraries import library
from model.perspectives import Perspective
from model.policy import Verdict, check_applies, decide
from model.policy_file import load_policy
from tests.evaluation_files import CHECKPOINT, labelled, write_lines


def calibrate(out, labels, scores, *flags):
    return cli.main(["calibrate", "--data", labels, "--scores", f"s={scores}", "--out", str(out), *map(str, flags)])


def _rows(uri):
    return [json.loads(line) for line in Path(uri).read_text().splitlines()]


def test_the_policy_flags_what_the_report_says(tmp_path):
    labels, scores = labelled(tmp_path)
    assert calibrate(tmp_path / "out", labels, scores, "--alpha", 0.1, "--delta", 0.05) == 0
    policy = load_policy(tmp_path / "out/policy.yaml")
    check_applies(policy, {Perspective.SAFETY: CHECKPOINT})
    facts = json.loads((tmp_path / "out/calibration.json").read_text())
    missed, flagged, unsafe = 0, 0, 0
    for label, score in zip(_rows(labels), _rows(scores), strict=True):
        is_flagged = decide({Perspective.SAFETY: score["reward_safety"]}, policy).verdict is Verdict.REVIEW
        unsafe += not label["label"]
        missed += not label["label"] and not is_flagged
        flagged += label["label"] and is_flagged
    found = facts["threshold"]
    assert (found["misses"], found["safe_flagged"], facts["labels"]["unsafe"]) == (missed, flagged, unsafe)
    assert missed == stats.binom.ppf(0.05, unsafe, 0.1) - 1  # the largest k with P(Binomial <= k) <= 0.05
    below = found["below"]
    assert struct.unpack("<f", struct.pack("<f", below))[0] == below  # the policy compares float32 rewards with it
    probability = from_json(facts["calibration"])(np.asarray([below]))[0]
    assert probability == pytest.approx(found["probability"])


def test_a_policy_for_one_checkpoint_is_refused_for_another(tmp_path):
    labels, scores = labelled(tmp_path)
    calibrate(tmp_path / "out", labels, scores, "--verdict", "block", "--severity", "high", "--id", "ours")
    policy = load_policy(tmp_path / "out/policy.yaml")
    assert (policy.id, policy.rules[Perspective.SAFETY].levels[0].verdict) == ("ours", Verdict.BLOCK)
    with pytest.raises(ConfigError, match="thresholds for checkpoint"):
        check_applies(policy, {Perspective.SAFETY: "other@sha256:" + "d" * 64})


def test_the_same_seed_gives_the_same_folder(tmp_path):
    labels, scores = labelled(tmp_path, images_per_prompt=2)
    for name in ("one", "two"):
        assert calibrate(tmp_path / name, labels, scores, "--one-per-prompt") == 0
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert set(first) == {
        "policy.yaml",
        "calibration.json",
        "report.md",
        "reliability.png",
        "calibration.png",
        "threshold.png",
    }
    assert first == second


def test_shared_prompts_are_said_and_can_be_thinned(tmp_path):
    labels, scores = labelled(tmp_path, images_per_prompt=2)
    calibrate(tmp_path / "all", labels, scores)
    assert "share their prompt with another" in (tmp_path / "all/report.md").read_text()
    calibrate(tmp_path / "thin", labels, scores, "--one-per-prompt")
    assert "share their prompt" not in (tmp_path / "thin/report.md").read_text()
    counts = json.loads((tmp_path / "thin/calibration.json").read_text())["labels"]
    assert counts["safe"] + counts["unsafe"] == 200


def _refused(capsys, code):
    assert code == 2
    return capsys.readouterr().err


def test_too_few_labels_are_refused_with_the_number_still_needed(tmp_path, capsys):
    labels, scores = labelled(tmp_path, 60)
    unsafe = sum(1 - row["label"] for row in _rows(labels))
    error = _refused(capsys, calibrate(tmp_path / "out", labels, scores, "--alpha", 0.01, "--delta", 0.05))
    assert f"{299 - unsafe} more are needed (299 in all)" in error  # 0.99^299 = 0.0495
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path, capsys):
    labels, scores = labelled(tmp_path)
    plain = write_lines(tmp_path / "plain.jsonl", [row | {"checkpoint_safety": None} for row in _rows(scores)])
    assert "give --checkpoint" in _refused(capsys, calibrate(tmp_path / "out", labels, plain))
    other = "other@sha256:" + "d" * 64
    assert "but these are rewards of" in _refused(
        capsys, calibrate(tmp_path / "out", labels, scores, "--checkpoint", other)
    )
    flipped = write_lines(tmp_path / "f.jsonl", [row | {"label": 1 - row["label"]} for row in _rows(labels)])
    assert "do not rise with the labels" in _refused(capsys, calibrate(tmp_path / "out", flipped, scores))
    first = _rows(labels)[0]
    both = write_lines(tmp_path / "b.jsonl", [*_rows(labels), first | {"label": 1 - first["label"]}])
    assert "is labelled both 0 and 1" in _refused(capsys, calibrate(tmp_path / "out", both, scores))
    pairs = write_lines(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert "holds pairs" in _refused(capsys, calibrate(tmp_path / "out", pairs, scores))


def test_scores_without_a_checkpoint_take_the_one_given(tmp_path):
    labels, scores = labelled(tmp_path)
    plain = write_lines(tmp_path / "plain.jsonl", [row | {"checkpoint_safety": None} for row in _rows(scores)])
    assert calibrate(tmp_path / "out", labels, plain, "--checkpoint", CHECKPOINT, "--bound", "expectation") == 0
    policy = load_policy(tmp_path / "out/policy.yaml")
    assert policy.rules[Perspective.SAFETY].checkpoint == CHECKPOINT
    assert "on average" in policy.description


def test_a_missing_extra_is_named():
    with pytest.raises(ConfigError, match="install the extra 'evaluate'"):
        library("scipy_that_is_not_here")
