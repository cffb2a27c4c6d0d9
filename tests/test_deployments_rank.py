"""``POST /v1/rank``: over ASGI with a fake scorer, and once over real HTTP on a Ray cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.config import IngressArgs
from deployments.ingress import create_app
from deployments.replica import Item, ScoreReply
from jobs.local_stack import LocalStack
from model.fake import FakeScorer
from model.meaning import Reward
from model.perspectives import PERSPECTIVES, Perspective
from model.policy_file import load_policy
from model.schema import ScoreRecord
from model.scorer import load
from tests.serve_parts import as_base64, fake_replica, jpeg, policy_file

PROMPT = "a red square"
IMAGES = [jpeg((40 * n, 20, 90)) for n in range(5)]


class Endpoint:
    """``rank`` runs one request against a fresh application."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        self.perspectives: tuple[Perspective, ...] = PERSPECTIVES
        self.replica: Any = None  # instead of the fake scorer's
        self.limits = IngressArgs()

    def rank(self, *images: str, **body: Any) -> httpx.Response:
        return self.post({"prompt": PROMPT, "images": list(images), **body})

    def post(self, body: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            replica = self.replica or fake_replica(self.monkeypatch, self.folder, perspectives=self.perspectives)
            app = create_app(replica, load_policy(self.folder / "policy.yaml"), self.limits)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://assay") as client:
                return await client.post("/v1/rank", json=body)

        return asyncio.run(main())


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Endpoint:
    policy_file(tmp_path, dict(FakeScorer().identity.checkpoints))
    return Endpoint(monkeypatch, tmp_path)


def test_ranking_is_that_of_the_scorer(endpoint: Endpoint) -> None:
    response = endpoint.rank(*map(as_base64, IMAGES), perspective="fidelity")
    assert response.status_code == 200, response.text
    answer = response.json()
    ranking = FakeScorer().rank(PROMPT, IMAGES, Perspective.FIDELITY)
    assert [(one["rank"], one["index"]) for one in answer["ranked"]] == [
        (one.rank, one.index) for one in ranking.ranked
    ]
    for got, expected in zip(answer["ranked"], ranking.ranked, strict=True):
        assert isinstance(expected.reward, Reward)
        assert expected.tournament_score is not None
        assert (got["reward"], got["reward_vector"]) == (expected.reward.value, None)
        assert got["tournament_score"] == expected.tournament_score.value
    assert answer["preference_probabilities"] == [[p.value for p in row] for row in ranking.probabilities]
    assert (answer["perspective"], answer["tau"], answer["unranked"]) == ("fidelity", 1.0, [])
    assert answer["model"]["checkpoints"]["fidelity"] == ranking.head.checkpoint
    assert answer["code_version"].startswith("0.1.0+")


def test_overall_is_the_default(endpoint: Endpoint) -> None:
    assert endpoint.rank(as_base64(IMAGES[0])).json()["perspective"] == "overall"


def test_bad_images_are_unranked_and_cost_no_other(endpoint: Endpoint) -> None:
    answer = endpoint.rank("@@", as_base64(IMAGES[0]), as_base64(b"<html>"), as_base64(IMAGES[1])).json()
    assert sorted(one["index"] for one in answer["ranked"]) == [1, 3]
    assert [(one["index"], one["error"]["code"]) for one in answer["unranked"]] == [
        (0, "bad_image_encoding"),
        (2, "image_not_an_image"),
    ]
    assert len(answer["preference_probabilities"]) == 2


def test_no_usable_image_among_several_is_an_answer(endpoint: Endpoint) -> None:
    answer = endpoint.rank("@@", "@@").json()
    assert (answer["ranked"], answer["preference_probabilities"]) == ([], [])
    assert [one["index"] for one in answer["unranked"]] == [0, 1]


def test_one_image_has_won_against_nobody(endpoint: Endpoint) -> None:
    [only] = endpoint.rank(as_base64(IMAGES[0])).json()["ranked"]
    assert (only["rank"], only["tournament_score"]) == (1, None)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"images": ["@@"]}, 422, "bad_image_encoding"),
        ({"images": [as_base64(b"<html>")]}, 422, "image_not_an_image"),
        ({"images": ["data:text/html;base64,QUJD"]}, 415, "unsupported_media_type"),
        ({"images": [as_base64(bytes(3001))]}, 413, "image_too_many_bytes"),
        ({"images": []}, 422, "invalid_request"),
        ({"images": ["@@"] * 5}, 422, "too_many_items"),
        ({"images": ["@@"], "perspective": "beauty"}, 422, "invalid_request"),
        ({"images": ["@@"], "prompts": [""]}, 422, "invalid_request"),
        ({}, 422, "invalid_request"),
    ],
)
def test_a_wrong_request_is_a_problem(endpoint: Endpoint, body: dict[str, Any], status: int, code: str) -> None:
    endpoint.limits = IngressArgs(max_items=4, max_image_bytes=3000)
    response = endpoint.post({"prompt": PROMPT, **body})
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json()["code"] == code


def test_a_perspective_that_is_not_deployed_is_refused(endpoint: Endpoint) -> None:
    endpoint.perspectives = (Perspective.ALIGNMENT,)
    response = endpoint.rank(as_base64(IMAGES[0]))  # of the default, overall
    assert (response.status_code, response.json()["code"]) == (422, "perspective_not_deployed")


class GeneralPreference:
    """A replica whose overall head gives vectors: three images in a circle, and a fourth outside it."""

    VECTORS = ((1.0, 0.0), (0.0, 1.0), (-1.0, -1.0), (0.0, -3.0))

    async def identity(self) -> dict[str, Any]:
        head = {"tau": 1.0, "is_general_preference": True, "training": None}
        return {
            "name": "given",
            "checkpoints": {"overall": "given@sha256:" + "0" * 64},
            "preprocessing_hash": "0",
            "dtype": "float32",
            "mode": "exact",
            "licence": "Apache-2.0",
            "is_trained": True,
            "heads": {"overall": head},
            "vector_perspectives": ["overall"],
            "code_version": "1",
            "has_golden": True,
        }

    readiness = identity

    async def score(self, items: list[Item], perspectives: list[str] | None) -> ScoreReply:
        vectors = [{Perspective.OVERALL: vector} for vector in self.VECTORS]
        return ScoreReply([ScoreRecord("", {}, one) for one in vectors], await self.identity())


def test_vectors_are_ranked_by_tournament(endpoint: Endpoint) -> None:
    endpoint.replica = GeneralPreference()
    answer = endpoint.rank(*map(as_base64, IMAGES[:4])).json()
    # s(a, b) = a0*b1 - a1*b0. Of 0 against 1, 2, 3: 1, -1, -3; of 1: -1, 1, 0; of 2: 1, -1, 3; of 3: 3, 0, -3.
    # Means of sigmoid: 0: (.7311 + .2689 + .0474)/3 = .3491; 1: (.2689 + .7311 + .5)/3 = .5;
    # 2: (.7311 + .2689 + .9526)/3 = .6509; 3: (.9526 + .5 + .0474)/3 = .5.
    assert answer["ranked"][0]["index"] == 2
    assert answer["ranked"][-1]["index"] == 0
    means = {one["index"]: one["tournament_score"] for one in answer["ranked"]}
    assert means == pytest.approx({0: 0.3491, 1: 0.5, 2: 0.6509, 3: 0.5}, abs=1e-4)
    assert answer["ranked"][0]["reward_vector"] == [-1.0, -1.0]
    assert answer["ranked"][0]["reward"] is None


@pytest.mark.cluster
def test_over_http_it_is_the_ranking_of_the_bare_scorer(stack: LocalStack) -> None:
    body = {"prompt": PROMPT, "images": [*map(as_base64, IMAGES), "@@"], "perspective": "alignment"}
    response = httpx.post(f"{stack.serve_url}/v1/rank", json=body, timeout=30, trust_env=False)
    assert response.status_code == 200, response.text
    answer = response.json()
    ranking = load("demo").rank(PROMPT, IMAGES, Perspective.ALIGNMENT)
    expected = {one.index: one.reward.value for one in ranking.ranked if isinstance(one.reward, Reward)}
    assert {one["index"]: one["reward"] for one in answer["ranked"]} == pytest.approx(expected, abs=1e-5)
    rewards = [one["reward"] for one in answer["ranked"]]
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) == len(rewards), "rewards that are all alike would prove nothing"
    assert [one["index"] for one in answer["unranked"]] == [5]
