"""The replica's methods around a fake scorer: same rewards on both paths, clear refusals, health."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.batching import Priority
from deployments.replica import Item, Replica
from model.code_version import code_version
from model.errors import ConfigError, ErrorCode, InfrastructureError, OverloadedError, TransientError
from model.fake import FakeScorer
from model.identity import reward_facts
from model.perspectives import PERSPECTIVES, Perspective
from model.prepared_bytes import pack_arrays
from model.schema import Generation
from tests.serve_parts import fake_replica, jpeg, policy_file, replica_args

GENERATIONS = [Generation(f"g{n}", f"prompt {n}", jpeg((n, 2 * n, 3 * n))) for n in range(20)]


def items(generations: list[Generation]) -> list[Item]:
    return [Item(generation_id=g.generation_id, prompt=g.prompt, image=g.image) for g in generations]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """``use(scenario, **options)`` runs ``await scenario(replica)`` in an event loop."""

    def run(scenario: Callable[[Replica], Any], **options: Any) -> Any:
        async def main() -> Any:
            replica = fake_replica(monkeypatch, tmp_path, **options)
            return await asyncio.wait_for(scenario(replica), 30)

        return asyncio.run(main())

    return run


def facts_of(scorer: FakeScorer) -> dict[str, str]:
    return reward_facts(scorer.identity, code_version())


def test_score_gives_what_the_scorer_gives_in_order(use: Callable[..., Any]) -> None:
    reply = use(lambda replica: replica.score(items(GENERATIONS)))
    assert reply.records == FakeScorer().score(GENERATIONS)
    assert reply.identity["name"] == "fake"


def test_score_prepared_gives_the_same_rewards(use: Callable[..., Any]) -> None:
    scorer = FakeScorer()
    prepared = scorer.preprocess(GENERATIONS)
    packed = [(one.generation_id, pack_arrays(one.arrays)) for one in prepared]
    records = use(lambda replica: replica.score_prepared(packed, facts_of(scorer)))
    assert [(r.generation_id, r.rewards) for r in records] == [
        (r.generation_id, r.rewards) for r in scorer.score(GENERATIONS)
    ]


def test_bad_items_keep_their_place_and_are_not_forwarded(use: Callable[..., Any]) -> None:
    class Watched(FakeScorer):
        forwarded: list[str] = []  # noqa: RUF012 - one per test

        def forward(self, batch: Any, perspectives: Any = None) -> Any:
            self.forwarded += [item.generation_id for item in batch]
            return super().forward(batch, perspectives)

    broken = Generation("broken", "p", b"<html>")
    reply = use(lambda replica: replica.score(items([GENERATIONS[0], broken, GENERATIONS[1]])), scorer=Watched())
    assert [record.generation_id for record in reply.records] == ["g0", "broken", "g1"]
    assert reply.records[1].error.code == ErrorCode.IMAGE_NOT_AN_IMAGE
    assert sorted(Watched.forwarded) == ["g0", "g1"]


def test_only_the_asked_perspectives_are_scored(use: Callable[..., Any]) -> None:
    reply = use(lambda replica: replica.score(items(GENERATIONS[:1]), ["safety", "alignment", "safety"]))
    assert set(reply.records[0].rewards) == {Perspective.SAFETY, Perspective.ALIGNMENT}


def test_unknown_perspective_is_refused(use: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="fake has no safety"):
        use(lambda replica: replica.score(items(GENERATIONS[:1]), ["safety"]), perspectives=[Perspective.FIDELITY])


def test_rows_prepared_for_another_checkpoint_are_refused(use: Callable[..., Any]) -> None:
    facts = facts_of(FakeScorer())
    for name in facts:
        # The same preprocessing and other weights, or other code: each alone would give other rewards.
        with pytest.raises(ConfigError, match=f"differs in {name}: here .*, there another"):
            use(lambda replica, name=name: replica.score_prepared([], {**facts, name: "another"}))


def test_identity_says_what_decides_a_reward(use: Callable[..., Any]) -> None:
    identity = use(lambda replica: replica.identity())
    expected = FakeScorer().identity
    assert identity == {
        "name": "fake",
        "checkpoints": {p.value: expected.checkpoints[p] for p in PERSPECTIVES},
        "preprocessing_hash": expected.preprocessing_hash,
        "dtype": "float32",
        "mode": "exact",
        "is_trained": False,
        "licence": "Apache-2.0",
        "placement": "no weights",
        "heads": {p.value: {"tau": 1.0, "is_general_preference": False, "training": None} for p in PERSPECTIVES},
        "vector_perspectives": [],
        "code_version": code_version(),
        "facts": facts_of(FakeScorer()),
        "has_golden": False,
    }


def test_it_loads_what_is_set_and_says_how_the_weights_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr("deployments.replica.load", lambda *args, **options: asked.update(options) or FakeScorer())
    monkeypatch.setattr("deployments.replica.resolve", lambda name: tmp_path)
    policy = policy_file(tmp_path, dict(FakeScorer().identity.checkpoints))

    async def start() -> None:
        Replica(replica_args(policy, adapters="low_rank", mode="few_crops"))

    with caplog.at_level("INFO", "ray.serve"):
        asyncio.run(start())
    assert asked == {"device": "cpu", "dtype": "float32", "mode": "few_crops", "adapters": "low_rank"}
    assert "fake on cpu in float32, LoRA no weights" in caplog.messages


def test_policy_for_another_checkpoint_stops_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deployments.replica.load", lambda *args, **options: FakeScorer())
    other = policy_file(tmp_path, {Perspective.SAFETY: f"other@sha256:{'0' * 64}"})
    with pytest.raises(ConfigError, match="other@sha256"):
        Replica(replica_args(other))


class Unsound(FakeScorer):
    """Its golden check can be made to fail."""

    is_sound = True

    def check_golden(self) -> None:
        if not self.is_sound:
            raise InfrastructureError("expected 1.0, got 2.0")


def test_wrong_golden_reward_stops_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scorer = Unsound()
    scorer.is_sound = False
    with pytest.raises(InfrastructureError, match=r"expected 1\.0"):
        fake_replica(monkeypatch, tmp_path, scorer=scorer)


def test_health_check_scores_the_golden_inputs_and_decides_readiness(use: Callable[..., Any]) -> None:
    scorer = Unsound()

    async def scenario(replica: Replica) -> None:
        await replica.check_health()
        assert (await replica.readiness())["name"] == "fake"
        scorer.is_sound = False
        with pytest.raises(InfrastructureError):
            await replica.check_health()
        with pytest.raises(TransientError, match=r"expected 1\.0, got 2\.0"):
            await replica.readiness()
        scorer.is_sound = True
        await replica.check_health()
        assert (await replica.readiness())["name"] == "fake"

    use(scenario, scorer=scorer)


def test_too_many_items_at_once_are_refused(use: Callable[..., Any]) -> None:
    async def scenario(replica: Replica) -> list[Any]:
        calls = [replica.score(items(GENERATIONS[:8])) for _ in range(5)]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = use(
        scenario,
        scorer=FakeScorer(batch_delay_s=0.3),
        batching={"max_batch_size": 8, "max_queued_items": 8, "batch_wait_timeout_s": 0.0},
        ingress={"max_items": 8},
    )
    kinds = [type(outcome).__name__ for outcome in outcomes]
    # One waits, and another has left the queue if its pass began before the third call came.
    assert kinds.count("ScoreReply") in (1, 2)
    assert kinds.count("ScoreReply") + sum(isinstance(outcome, OverloadedError) for outcome in outcomes) == 5


def test_a_job_batch_is_cut_and_online_goes_between(use: Callable[..., Any]) -> None:
    sizes: list[int] = []

    class Watched(FakeScorer):
        def forward(self, batch: Any, perspectives: Any = None) -> Any:
            sizes.append(len(batch))
            return super().forward(batch, perspectives)

    scorer = Watched(batch_delay_s=0.05)
    packed = [(one.generation_id, pack_arrays(one.arrays)) for one in scorer.preprocess(GENERATIONS)]

    async def scenario(replica: Replica) -> None:
        job = asyncio.create_task(replica.score_prepared(packed, facts_of(scorer)))
        while not sizes:
            await asyncio.sleep(0.001)
        await replica.score(items(GENERATIONS[:1]))
        assert not job.done()
        assert len(await job) == 20
        assert replica._batcher.queued(Priority.JOB) == 0

    use(scenario, scorer=scorer, batching={"max_batch_size": 8, "batch_wait_timeout_s": 0.0})
    assert sorted(sizes) == [1, 4, 8, 8]
    assert 1 in sizes[1:3]  # after at most one more pass of the job
