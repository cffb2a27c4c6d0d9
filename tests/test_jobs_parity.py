"""``assay parity``: a published night against an endpoint over real HTTP, with a fake scorer behind both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deployments.replica import Replica
from jobs import endpoint as endpoint_client
from jobs import manifest as manifests
from jobs.cli import main
from jobs.endpoint import Endpoint
from jobs.manifest import InputObject, Manifest
from jobs.parity import Parity, ParityError, Replay, replay, spreads_of
from jobs.precision_file import Precision
from jobs.publish import Target, write_content
from jobs.rejudge import content_fields
from model.errors import ConfigError, InfrastructureError
from model.fake import FakeScorer
from model.perspectives import PERSPECTIVES
from model.schema import SCHEMA_VERSION, Generation
from model.storage import head
from tests.job_helpers import NIGHT, policy, staged_row, write_staged
from tests.serve_parts import endpoint_of, fake_replica, jpeg, policy_file

COUNT = 40
PROMPTS = [f"a red ball number {n}" for n in range(COUNT)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real application around a real replica object, served by uvicorn on loopback."""
    folder = tmp_path_factory.mktemp("endpoint")
    policy_path = policy_file(folder, dict(FakeScorer().identity.checkpoints))

    def replica() -> Replica:
        with pytest.MonkeyPatch.context() as patch:
            return fake_replica(patch, folder)

    with endpoint_of(replica, policy_path) as address:
        yield address


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(COUNT):
        (folder / f"{n}.jpg").write_bytes(jpeg((6 * n, 20, 90), (20 + n, 30)))
    return folder


Change = Callable[[list[dict[str, Any]]], None]


@pytest.fixture
def publish(tmp_path: Path, images: Path) -> Callable[..., Path]:
    """``publish(change=…)``: a night of ``COUNT`` rows with the fake scorer's rewards, changed before publication."""

    def make(change: Change = lambda rows: None, **fields: Any) -> Path:
        scorer = FakeScorer()
        log = tmp_path / "a.parquet"
        log.write_bytes(b"only its version counts")
        facts = head(str(log))
        rows = []
        for n, prompt in enumerate(PROMPTS):
            image = (images / f"{n}.jpg").read_bytes()
            [record] = scorer.score([Generation(str(n), prompt, image)])
            changes: dict[str, Any] = {f"reward_{p}": record.rewards[p] for p in PERSPECTIVES}
            changes |= {"prompt": prompt, "image_uri": f"{n}.jpg", "image_sha256": hashlib.sha256(image).hexdigest()}
            rows.append(staged_row(facts.uri, facts.version, n, 0.0, **changes))
        change(rows)
        output = tmp_path / "out"
        target = Target(str(output), NIGHT, "k" * 16, 1, "20261120T000000Z-00000001", 16, {})
        content = write_content([[write_staged(tmp_path / "staged.parquet", rows)]], target, policy())
        values: dict[str, Any] = {
            "checkpoints": scorer.identity.checkpoints,
            "preprocessing_hash": scorer.preprocessing_hash,
            **fields,
        }
        manifest = Manifest(
            date=NIGHT, version=1, previous_version=None, reason="scored", run_key="k" * 16, run_id=target.run_id,
            published_at=datetime.now(UTC), via="pool", schema_version=SCHEMA_VERSION, policy_id="p",
            inputs=(InputObject(uri=facts.uri, version=facts.version, rows=COUNT),), code_version="0",
            policy_hash=policy().content_hash, is_trained=False, **content_fields(content), **values,
        )  # fmt: skip
        manifests.write(str(output), manifest)
        return output

    return make


def job(output: Path, url: str, images: Path, **changes: Any) -> Replay:
    return Replay(**{"output": str(output), "night": NIGHT, "url": url, "image_root": str(images), **changes})


def test_the_same_rewards_in_batches_of_any_size(publish: Any, url: str, images: Path) -> None:
    said: list[str] = []
    output = publish()
    result = replay(job(output, url, images), said.append)
    assert (result.rows, result.values, result.largest, result.dtype) == (COUNT, 4 * COUNT, 0.0, "float32")
    assert sum(result.batch_sizes) == COUNT
    assert len(set(result.batch_sizes)) > 1
    assert "largest difference 0, bound 1e-05 in float32" in said
    assert replay(job(output, url, images, seed=1, rows=7), said.append).rows == 7


def nudge(rows: list[dict[str, Any]], amount: float) -> None:
    rows[17]["reward_safety"] += amount


def test_a_row_beyond_the_bound_is_named(publish: Any, url: str, images: Path) -> None:
    output = publish(lambda rows: nudge(rows, 3e-5))
    said: list[str] = []
    with pytest.raises(
        ParityError, match=r"row \w{64} \(generation g17\), safety: .* stored, .* replayed: beyond 1e-05"
    ):
        replay(job(output, url, images), said.append)
    assert any(line.startswith("largest difference 3") for line in said)


def test_a_difference_within_the_bound_is_reported(publish: Any, url: str, images: Path) -> None:
    result = replay(job(publish(lambda rows: nudge(rows, 5e-6)), url, images), lambda line: None)
    assert 3e-6 < result.largest < 7e-6  # float32 near 2 has steps of 2.4e-7


def test_in_bfloat16_the_bound_follows_the_spread_of_the_night() -> None:
    row = {"row_key": "k", "generation_id": "g"}
    stored = [
        {
            "reward_safety": 1.0,
            "reward_safety_vector": None,
            "reward_overall": None,
            "reward_overall_vector": [0.0, 4.0],
        },
        {
            "reward_safety": 5.0,
            "reward_safety_vector": None,
            "reward_overall": None,
            "reward_overall_vector": [2.0, 4.0],
        },
    ]
    spreads = spreads_of(stored, ["safety", "overall"])
    assert spreads == {"safety": 2.0, "overall[0]": 1.0, "overall[1]": 0.0}
    result = Parity(spreads, dtype="bfloat16")
    result.add(row, "safety", 1.0, 1.19)  # a tenth of 2.0 is 0.2
    result.add(row, "overall[1]", 4.0, 4.04)  # 5e-2 at least
    assert result.beyond is None
    result.add(row, "overall[1]", 4.0, 4.06)
    assert result.beyond == "row k (generation g), overall[1]: 4.0 stored, 4.06 replayed: beyond 0.05"
    assert (result.largest, result.bound) == (pytest.approx(0.19), pytest.approx(0.2))


def test_a_reward_on_one_side_only_is_beyond_every_bound(publish: Any, url: str, images: Path) -> None:
    def lose(rows: list[dict[str, Any]]) -> None:
        rows[3]["reward_overall"] = None

    with pytest.raises(ParityError, match=r"generation g3\), overall: None stored"):
        replay(job(publish(lose), url, images), lambda line: None)


def test_what_cannot_be_read_again_is_counted(publish: Any, url: str, images: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for n in range(3):
            rows[n]["image_uri"] = None  # its image stood in the log
        dead = {"status": "error", "error_code": "image_not_found", "error_stage": "fetch", "error_message": "gone"}
        rows[10] |= dead | {f"reward_{p}": None for p in PERSPECTIVES}

    output = publish(change)
    (images / "5.jpg").unlink()
    (images / "6.jpg").write_bytes(jpeg())
    result = replay(job(output, url, images), lambda line: None)
    assert result.rows == COUNT - 3 - 1 - 2
    assert dict(result.skipped) == {
        "image not in the output (it stood in the log)": 3,
        "image not read: image_not_found": 1,
        "image changed since the night": 1,
    }


def test_an_endpoint_that_cannot_score_a_scored_row(publish: Any, url: str, images: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[8]["image_sha256"] = hashlib.sha256(b"<html>").hexdigest()

    output = publish(change)
    (images / "8.jpg").write_bytes(b"<html>")
    with pytest.raises(ParityError, match="was scored, and the endpoint says"):
        replay(job(output, url, images), lambda line: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preprocessing_hash": "1" * 64}, "the endpoint has another preprocessing: "),
        ({"precision": Precision(dtype="bfloat16", mode="exact")}, "the endpoint has another dtype: float32"),
        ({"precision": Precision(dtype="float32", mode="int8")}, "the endpoint has another mode: exact, the night"),
        ({"checkpoints": {"safety": "new@sha256:" + "1" * 64}}, "the endpoint has another checkpoint of safety: fake@"),
    ],
)
def test_another_model_is_no_parity_failure(
    publish: Any, url: str, images: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replay(job(publish(**fields), url, images), lambda line: None)


@pytest.mark.parametrize("prompt", [None, "0" * 64])
def test_a_night_without_prompts_cannot_be_replayed(publish: Any, url: str, images: Path, prompt: str | None) -> None:
    def hide(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["prompt"] = prompt

    with pytest.raises(ConfigError, match="published without its prompts"):
        replay(job(publish(hide), url, images), lambda line: None)


def test_nothing_to_compare_is_no_success(publish: Any, url: str, images: Path) -> None:
    output = publish()
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="nothing to compare"):
        replay(job(output, url, images), lambda line: None)


def test_exit_codes(publish: Any, url: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = publish(lambda rows: nudge(rows, 1.0))
    arguments = ["parity", "--output", str(output), "--image-root", str(images), "--date"]
    assert main([*arguments, str(NIGHT), "--url", url]) == 1
    assert "no parity: row" in capsys.readouterr().err
    assert main([*arguments, "2026-01-01", "--url", url]) == 2
    assert main([*arguments, str(NIGHT), "--url", "ftp://x"]) == 2
    assert main([*arguments, str(NIGHT), "--url", "http://127.0.0.1:9"]) == 4
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_client_waits_while_the_endpoint_is_busy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(endpoint_client.time, "sleep", waits.append)
    client = Endpoint(url)
    real, answers = client._ask, iter([429, 503])

    def busy(path: str, data: bytes) -> Any:
        status, headers, answer = real(path, data)
        return next(answers, status), headers, answer

    monkeypatch.setattr(client, "_ask", busy)
    with pytest.raises(endpoint_client.Refusal, match="422 invalid_request"):
        client.post("/v1/score", {"items": []})
    assert waits == [1.0, 2.0]
    monkeypatch.setattr(client, "_ask", lambda path, data: (503, {}, b""))
    with pytest.raises(InfrastructureError, match="still answers 503 after 8 attempts"):
        client.post("/v1/score", {})
