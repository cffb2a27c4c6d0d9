"""What a row becomes when it is finished. The stages as they run: test_jobs_night."""

from __future__ import annotations

import hashlib
import hmac

import pyarrow as pa
import pytest

from jobs.parquet import FACTS_SCHEMA
from jobs.stages import HASH_KEY_VARIABLE, RunFacts, check_hash_key, finish, hash_key, hide, key_print
from model.errors import ConfigError, ErrorCode, Stage
from model.perspectives import PERSPECTIVES, Perspective
from model.schema import RowError, ScoreRecord
from tests.job_helpers import staged_row

FACTS = RunFacts("run", {"safety": "c@sha256:0", "overall": "c@sha256:1"}, "p", "0")


def row(**changes):
    names = ("error_code", "error_stage", "error_message")
    return staged_row("log", "v", 1) | dict.fromkeys(names) | changes


def test_scalar_and_vector_rewards_go_to_their_own_columns():
    record = ScoreRecord("g", {Perspective.SAFETY: 0.5}, {Perspective.OVERALL: (0.1, -0.2)})
    done = finish(row(), record, FACTS)
    assert (done["reward_safety"], done["reward_safety_vector"]) == (0.5, None)
    assert (done["reward_overall"], done["reward_overall_vector"]) == (None, (0.1, -0.2))
    assert (done["reward_alignment"], done["checkpoint_alignment"]) == (None, None)
    assert (done["status"], done["not_scored"]) == ("scored", ["alignment", "fidelity"])
    assert pa.Table.from_pylist([done], FACTS_SCHEMA).num_rows == 1


def test_an_error_of_the_scorer_leaves_no_reward_behind():
    error = RowError(ErrorCode.NON_FINITE_REWARD, Stage.SCORE, "nan")
    done = finish(row(), ScoreRecord("g", {Perspective.SAFETY: 0.5}, error=error), FACTS)
    assert (done["status"], done["error_code"], done["error_stage"]) == ("error", "non_finite_reward", "score")
    assert {done[f"reward_{perspective}"] for perspective in PERSPECTIVES} == {None}
    assert done["not_scored"] == list(PERSPECTIVES)


def test_an_earlier_error_stays():
    done = finish(row(error_code="image_empty", error_stage="decode", error_message="0 bytes"), None, FACTS)
    assert (done["status"], done["error_code"]) == ("error", "image_empty")


@pytest.mark.parametrize("facts", [{"drop_columns": ("image_uri",)}, {"hash_columns": ("image_uri",)}])
def test_a_message_gives_no_hidden_uri_away(facts):
    uri = "s3://b/x?X-Amz-Signature=SECRET"
    failed = {"error_code": "image_not_found", "error_stage": "fetch", "error_message": f"image_uri {uri!r}: gone"}
    done = row(image_uri=uri, **failed)
    hide(done, RunFacts("run", {}, "p", "0", **facts), b"key")
    assert "SECRET" not in str(done)
    assert done["error_message"].startswith("image_not_found")


def test_a_worker_without_the_key_refuses_to_hash(monkeypatch):
    monkeypatch.setenv(HASH_KEY_VARIABLE, "driver")
    facts = RunFacts("run", {}, "p", "0", hash_columns=("prompt",), hash_key_print=key_print(hash_key()))
    check_hash_key(facts)
    for other in ("", "another"):
        monkeypatch.setenv(HASH_KEY_VARIABLE, other)
        with pytest.raises(ConfigError, match=HASH_KEY_VARIABLE):
            check_hash_key(facts)


@pytest.mark.parametrize("prompt", ["a secret", "", None])
def test_dropped_and_hashed_columns(prompt):
    facts = RunFacts("run", {}, "p", "0", drop_columns=("extras",), hash_columns=("prompt",))
    done = row(prompt=prompt, extras="{}")
    hide(done, facts, b"key")
    expected = None if prompt is None else hmac.new(b"key", prompt.encode(), hashlib.sha256).hexdigest()
    assert (done["prompt"], done["extras"]) == (expected, None)
