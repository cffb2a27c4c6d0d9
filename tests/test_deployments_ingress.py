"""The HTTP contract, over ASGI and a real replica object with a fake scorer; Ray is not started."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from deployments.config import IngressArgs
from deployments.ingress import STATUS_OF_ERROR, create_app
from deployments.replica import Item, ScoreReply
from model.errors import OverloadedError, TransientError
from model.fake import FakeScorer
from model.perspectives import PERSPECTIVES, Perspective
from model.policy import decide
from model.policy_file import load_policy
from model.schema import Generation, ScoreRecord
from tests.serve_parts import as_base64, fake_replica, jpeg, policy_file

IMAGE = jpeg()
PROBLEM = "application/problem+json"


class Endpoint:
    """``call`` runs one request against a fresh application."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        self.perspectives: tuple[Perspective, ...] = PERSPECTIVES
        self.replica: Any = None  # instead of the fake scorer's
        self.limits = IngressArgs()

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            replica = self.replica or fake_replica(self.monkeypatch, self.folder, perspectives=self.perspectives)
            app = create_app(replica, load_policy(self.folder / "policy.yaml"), self.limits)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://assay") as client:
                return await client.request(method, path, **options)

        return asyncio.run(main())

    def score(self, *items: dict[str, Any], **body: Any) -> httpx.Response:
        return self.call("POST", "/v1/score", json={"items": list(items), **body})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Endpoint:
    policy_file(tmp_path, dict(FakeScorer().identity.checkpoints))
    return Endpoint(monkeypatch, tmp_path)


def item(image: bytes = IMAGE, **fields: Any) -> dict[str, Any]:
    return {"prompt": "a red square", "image": as_base64(image), **fields}


def expect_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM), response.text
    problem: dict[str, Any] = response.json()
    assert (problem["status"], problem["code"], problem["type"]) == (status, code, f"urn:assay:problem:{code}")
    return problem


def test_score_says_reward_verdict_and_who_made_them(endpoint: Endpoint) -> None:
    response = endpoint.score(item(id="first"))
    assert response.status_code == 200
    answer = response.json()
    scorer = FakeScorer()
    [record] = scorer.score([Generation("first", "a red square", IMAGE)])
    policy = load_policy(endpoint.folder / "policy.yaml")
    decision = decide(record.rewards, policy)
    assert answer["results"] == [
        {
            "id": "first",
            "status": "scored",
            "rewards": {p.value: record.rewards[p] for p in PERSPECTIVES},
            "reward_vectors": {},
            "not_scored": [],
            "verdict": decision.verdict,
            "severity": decision.severity,
            "flags": list(decision.flags),
            "image": {
                "sha256": hashlib.sha256(IMAGE).hexdigest(),
                "size_bytes": len(IMAGE),
                "width": 40,
                "height": 30,
                "format": "JPEG",
            },
            "error": None,
        }
    ]
    assert answer["model"]["checkpoints"] == {p.value: scorer.identity.checkpoints[p] for p in PERSPECTIVES}
    assert answer["model"]["is_trained"] is False
    assert answer["model"]["preprocessing_hash"] == scorer.preprocessing_hash
    assert answer["policy"] == {"id": "test", "hash": policy.content_hash}
    assert answer["code_version"].startswith("0.1.0+")


def test_an_id_is_made_up_from_the_position(endpoint: Endpoint) -> None:
    assert [result["id"] for result in endpoint.score(item(), item(id="b")).json()["results"]] == ["0", "b"]


@pytest.mark.parametrize("head", ["data:image/jpeg;base64,", "DATA:image/jpeg;name=x.jpg;BASE64,"])
def test_data_url_is_the_same_as_base64(endpoint: Endpoint, head: str) -> None:
    plain = endpoint.score(item()).json()["results"]
    assert endpoint.score({**item(), "image": head + as_base64(IMAGE)}).json()["results"] == plain


def test_what_was_not_asked_is_null_and_named_and_gives_no_verdict(endpoint: Endpoint) -> None:
    # The policy needs all four; only a block could be decided by one, and this reward does not block.
    image = next(
        image
        for image in (jpeg((n, 0, 0)) for n in range(256))
        if FakeScorer().score([Generation("0", "a red square", image)])[0].rewards[Perspective.SAFETY] > 0
    )
    [result] = endpoint.score(item(image), perspectives=["safety"]).json()["results"]
    assert result["rewards"]["safety"] > 0
    assert [result["rewards"][p] for p in ("alignment", "fidelity", "overall")] == [None, None, None]
    assert result["not_scored"] == ["alignment", "fidelity", "overall"]
    assert (result["verdict"], result["severity"]) == (None, None)


def test_perspective_that_is_not_deployed_is_refused_not_left_out(endpoint: Endpoint) -> None:
    endpoint.perspectives = (Perspective.ALIGNMENT,)
    problem = expect_problem(endpoint.score(item(), perspectives=["safety"]), 422, "perspective_not_deployed")
    assert "safety cannot be scored by fake, which has alignment" in problem["detail"]


def test_one_bad_item_costs_no_other(endpoint: Endpoint) -> None:
    response = endpoint.score(
        item(id="good"), item(b"<html>", id="html"), {"id": "text", "prompt": "p", "image": "@@"}, item(id="also good")
    )
    assert response.status_code == 200
    results = response.json()["results"]
    assert [(result["id"], result["status"]) for result in results] == [
        ("good", "scored"),
        ("html", "error"),
        ("text", "error"),
        ("also good", "scored"),
    ]
    assert [result["error"] and result["error"]["code"] for result in results] == [
        None,
        "image_not_an_image",
        "bad_image_encoding",
        None,
    ]
    assert results[1]["image"]["size_bytes"] == 6
    for bad in results[1:3]:
        assert set(bad["rewards"].values()) == {None}
        assert (bad["verdict"], bad["severity"], bad["flags"]) == (None, None, [])
        assert bad["not_scored"] == list(PERSPECTIVES)


def test_all_items_bad_in_a_request_of_several_is_an_answer(endpoint: Endpoint) -> None:
    results = endpoint.score({"prompt": "", "image": "@"}, {"prompt": "", "image": "@"}).json()["results"]
    assert [result["error"]["code"] for result in results] == ["bad_image_encoding"] * 2


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("not base64!", 422, "bad_image_encoding"),
        ("QUJD\nREVG", 422, "bad_image_encoding"),
        ("QUJ", 422, "bad_image_encoding"),
        ("data:image/png,QUJD", 422, "bad_image_encoding"),
        ("data:image/png;base64", 422, "bad_image_encoding"),
        ("data:image/png;base64,@@", 422, "bad_image_encoding"),
        ("data:text/html;base64,QUJD", 415, "unsupported_media_type"),
        ("data:;base64,QUJD", 415, "unsupported_media_type"),
        ("", 422, "image_empty"),
        ("QUJD", 422, "image_not_an_image"),
        (as_base64(IMAGE[:200]), 422, "image_truncated"),
        (as_base64(bytes(3001)), 413, "image_too_many_bytes"),
        (as_base64(bytes(3002)), 413, "image_too_many_bytes"),
        (as_base64(bytes(9000)), 413, "image_too_many_bytes"),
        (as_base64(bytes(3000)), 422, "image_not_an_image"),
    ],
)
def test_a_bad_image_alone_is_refused_with_its_code(endpoint: Endpoint, image: str, status: int, code: str) -> None:
    endpoint.limits = IngressArgs(max_image_bytes=3000)
    expect_problem(endpoint.score({"prompt": "p", "image": image}), status, code)


@pytest.mark.parametrize("size_bytes", [2998, 2999, 3000])  # with two, one and no signs of padding
def test_the_limit_on_bytes_is_exact(endpoint: Endpoint, size_bytes: int) -> None:
    endpoint.limits = IngressArgs(max_image_bytes=size_bytes)
    just_fits = {"prompt": "p", "image": as_base64(bytes(size_bytes))}
    expect_problem(endpoint.score(just_fits), 422, "image_not_an_image")
    one_more = {"prompt": "p", "image": as_base64(bytes(size_bytes + 1))}
    expect_problem(endpoint.score(one_more), 413, "image_too_many_bytes")


@pytest.mark.parametrize(
    ("body", "status", "code", "place"),
    [
        ({"items": []}, 422, "invalid_request", "body.items"),
        ({}, 422, "invalid_request", "body.items"),
        ({"items": [item()], "perspective": ["safety"]}, 422, "invalid_request", "body.perspective"),
        ({"items": [item()], "perspectives": ["beauty"]}, 422, "invalid_request", "body.perspectives.0"),
        ({"items": [item()], "perspectives": []}, 422, "invalid_request", "body.perspectives"),
        ({"items": [item(prmpt="x")]}, 422, "invalid_request", "body.items.0.prmpt"),
        ({"items": [{"image": "QUJD"}]}, 422, "invalid_request", "body.items.0.prompt"),
        ({"items": [{"image": "QUJD", "prompt": None}]}, 422, "invalid_request", "body.items.0.prompt"),
        ({"items": [{"image": 3, "prompt": ""}]}, 422, "invalid_request", "body.items.0.image"),
        ({"items": [item(id="x" * 257)]}, 422, "invalid_request", "body.items.0.id"),
        ([], 422, "invalid_request", "body"),
        ({"items": [item()] * 5}, 422, "too_many_items", None),
    ],
)
def test_a_wrong_request_names_the_place(
    endpoint: Endpoint, body: Any, status: int, code: str, place: str | None
) -> None:
    endpoint.limits = IngressArgs(max_items=4)
    problem = expect_problem(endpoint.call("POST", "/v1/score", json=body), status, code)
    if place is not None:
        assert problem["errors"][0]["place"] == place


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"items": [}', b"nul"])
def test_broken_json_is_400(endpoint: Endpoint, body: bytes) -> None:
    response = endpoint.call("POST", "/v1/score", content=body, headers={"content-type": "application/json"})
    # An empty body has no JSON that could be broken: it lacks its fields.
    expect_problem(response, *((422, "invalid_request") if not body else (400, "invalid_json")))


def test_half_a_surrogate_pair_in_a_prompt_is_an_error_with_an_answer(endpoint: Endpoint) -> None:
    body = json.dumps({"items": [{"prompt": "\ud800", "image": as_base64(IMAGE)}]})
    response = endpoint.call("POST", "/v1/score", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.headers["content-type"]) == (422, PROBLEM)


@pytest.mark.parametrize("content_type", ["text/plain", "image/png", "application/x-www-form-urlencoded", ""])
def test_other_media_types_are_415(endpoint: Endpoint, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    expect_problem(endpoint.call("POST", "/v1/score", content=b"{}", headers=headers), 415, "unsupported_media_type")


def test_json_with_a_charset_is_fine(endpoint: Endpoint) -> None:
    body = json.dumps({"items": [item()]}).encode()
    headers = {"content-type": "application/json; charset=utf-8"}
    assert endpoint.call("POST", "/v1/score", content=body, headers=headers).status_code == 200


async def dribble(pieces: int, *, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for _ in range(pieces):
        yield b" " * 100
        await asyncio.sleep(pause_s)


JSON = {"content-type": "application/json"}


def test_declared_size_over_the_limit_is_413_unread(endpoint: Endpoint) -> None:
    endpoint.limits = IngressArgs(max_body_bytes=1000)
    response = endpoint.call("POST", "/v1/score", content=b" " * 1001, headers=JSON)
    expect_problem(response, 413, "body_too_large")
    assert response.headers["connection"] == "close"


def test_undeclared_size_over_the_limit_is_413(endpoint: Endpoint) -> None:
    endpoint.limits = IngressArgs(max_body_bytes=1000)
    expect_problem(endpoint.call("POST", "/v1/score", content=dribble(11), headers=JSON), 413, "body_too_large")


def test_lying_content_length_is_413(endpoint: Endpoint) -> None:
    endpoint.limits = IngressArgs(max_body_bytes=1000)
    headers = {**JSON, "content-length": "10"}
    expect_problem(endpoint.call("POST", "/v1/score", content=dribble(11), headers=headers), 413, "body_too_large")


def test_body_of_just_the_limit_is_read(endpoint: Endpoint) -> None:
    endpoint.limits = IngressArgs(max_body_bytes=1000)
    expect_problem(endpoint.call("POST", "/v1/score", content=dribble(10), headers=JSON), 400, "invalid_json")


def test_body_that_dribbles_in_is_408(endpoint: Endpoint) -> None:
    endpoint.limits = IngressArgs(body_timeout_s=0.1)
    content = dribble(100, pause_s=0.02)  # each piece in time, all of them far too late
    expect_problem(endpoint.call("POST", "/v1/score", content=content, headers=JSON), 408, "body_timeout")


class BrokenReplica:
    """Every method raises ``error``, or never answers."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    async def _fail(self, *args: Any) -> Any:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(60)

    identity = readiness = score = _fail


ERRORS = {
    OverloadedError: OverloadedError("64 items wait already"),
    BackPressureError: BackPressureError(10, 10),
    TransientError: TransientError("this replica is being replaced"),
    TimeoutError: TimeoutError(),
}


@pytest.mark.parametrize("error", [*ERRORS.values(), ActorDiedError()], ids=lambda error: type(error).__name__)
def test_listed_errors_have_their_status_and_say_when_to_come_back(endpoint: Endpoint, error: Exception) -> None:
    endpoint.replica = BrokenReplica(error)
    status, code = next(row for kind, row in STATUS_OF_ERROR.items() if isinstance(error, kind))
    response = endpoint.score(item())
    expect_problem(response, status, code)
    assert int(response.headers["retry-after"]) >= 1


def test_unknown_errors_are_500_and_logged_with_traceback_but_without_content(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.replica = BrokenReplica(ZeroDivisionError("the model is broken"))
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        problem = expect_problem(endpoint.score(item(prompt="SECRET PROMPT")), 500, "internal_error")
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert "the model is broken" not in json.dumps(problem)
    assert "ZeroDivisionError: the model is broken" in caplog.text
    assert "SECRET PROMPT" not in caplog.text
    assert as_base64(IMAGE)[:40] not in caplog.text


def test_a_replica_that_never_answers_is_503_in_time(endpoint: Endpoint) -> None:
    endpoint.replica = BrokenReplica(None)
    endpoint.limits = IngressArgs(request_timeout_s=0.1, ready_timeout_s=0.1)
    expect_problem(endpoint.score(item()), 503, "unavailable")
    expect_problem(endpoint.call("GET", "/readyz"), 503, "not_ready")


def test_healthz_does_not_ask_the_replica(endpoint: Endpoint) -> None:
    endpoint.replica = BrokenReplica(ZeroDivisionError())
    response = endpoint.call("GET", "/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "up"})


def test_readyz_names_the_checkpoints(endpoint: Endpoint) -> None:
    response = endpoint.call("GET", "/readyz")
    assert response.status_code == 200
    answer = response.json()
    assert answer["status"] == "ready"
    assert answer["golden"] == "absent"  # the fake has none, and that is said
    assert answer["model"]["checkpoints"]["safety"] == FakeScorer().identity.checkpoints[Perspective.SAFETY]
    assert answer["model"]["is_trained"] is False


def test_readyz_says_why_not(endpoint: Endpoint) -> None:
    endpoint.replica = BrokenReplica(TransientError("the golden check failed: expected 1.0, got 2.0"))
    problem = expect_problem(endpoint.call("GET", "/readyz"), 503, "not_ready")
    assert "expected 1.0, got 2.0" in problem["detail"]


class GivenReply(BrokenReplica):
    """A replica that answers with one record, as the checkpoints in ``identity``."""

    def __init__(self, record: ScoreRecord, **identity: Any) -> None:
        super().__init__(None)
        self.record = record
        self.facts: dict[str, Any] = {
            "name": "given",
            "checkpoints": {str(p): checkpoint for p, checkpoint in FakeScorer().identity.checkpoints.items()},
            "preprocessing_hash": "0",
            "dtype": "float32",
            "mode": "exact",
            "licence": "Apache-2.0",
            "is_trained": True,
            "vector_perspectives": [],
            "code_version": "1",
            "has_golden": True,
            **identity,
        }

    async def score(self, items: list[Item], perspectives: Any) -> ScoreReply:
        return ScoreReply([self.record], self.facts)

    async def readiness(self) -> dict[str, Any]:
        return self.facts


def test_policy_is_never_applied_to_rewards_of_another_checkpoint(endpoint: Endpoint) -> None:
    record = ScoreRecord("0", dict.fromkeys(PERSPECTIVES, 1.0))
    endpoint.replica = GivenReply(record)
    assert endpoint.score(item()).status_code == 200
    # During an update replicas of two checkpoints run; the policy knows the old one.
    endpoint.replica = GivenReply(record, checkpoints={"safety": f"new@sha256:{'1' * 64}"})
    expect_problem(endpoint.score(item()), 500, "internal_error")
    problem = expect_problem(endpoint.call("GET", "/readyz"), 503, "not_ready")
    assert f"new@sha256:{'1' * 64}" in problem["detail"]


def test_a_reward_that_is_not_finite_is_an_error_not_a_verdict(endpoint: Endpoint) -> None:
    endpoint.replica = GivenReply(ScoreRecord("0", dict.fromkeys(PERSPECTIVES, float("nan"))))
    expect_problem(endpoint.score(item()), 422, "non_finite_reward")


def test_a_vector_reward_is_not_called_unscored(endpoint: Endpoint) -> None:
    scalars = {p: 1.0 for p in PERSPECTIVES if p is not Perspective.OVERALL}
    endpoint.replica = GivenReply(ScoreRecord("0", scalars, {Perspective.OVERALL: (0.5, -0.5)}))
    [result] = endpoint.score(item()).json()["results"]
    assert result["reward_vectors"] == {"overall": [0.5, -0.5]}
    assert (result["rewards"]["overall"], result["not_scored"]) == (None, [])


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/score", 405), ("GET", "/nothing", 404)])
def test_unknown_routes_are_json_too(endpoint: Endpoint, method: str, path: str, status: int) -> None:
    code = {404: "not_found", 405: "method_not_allowed"}[status]
    expect_problem(endpoint.call(method, path), status, code)


def test_openapi_document_names_the_routes(endpoint: Endpoint) -> None:
    paths = endpoint.call("GET", "/openapi.json").json()["paths"]
    assert {"/healthz", "/readyz", "/v1/score"} <= set(paths)
