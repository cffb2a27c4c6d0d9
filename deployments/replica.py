"""One scorer per replica, behind the methods that the ingress and the nightly job call over a handle.

``score`` takes images and does all three steps; ``score_prepared`` takes what the job's data workers have
already preprocessed. Both share one batcher. Knows nothing about HTTP or policies, except that it refuses to
start with a policy made for another checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from deployments.batching import Batcher, Priority
from deployments.config import ServeArgs
from deployments.paths import find_checkpoint, in_project
from deployments.rank_wire import head_facts
from model.code_version import code_version
from model.errors import ConfigError, TransientError
from model.golden import GOLDEN_FILE
from model.identity import first_difference, reward_facts
from model.perspectives import Perspective
from model.policy import check_applies
from model.policy_file import load_policy
from model.prepared_bytes import unpack_arrays
from model.schema import Generation, ScoreRecord
from model.scorer import Prepared, RawOutput, Scorer, load, resolve

logger = logging.getLogger("ray.serve")


class Item(TypedDict):
    """One generation as it travels to ``Replica.score``; ``image`` holds the encoded file."""

    generation_id: str
    prompt: str
    image: bytes


@dataclass(frozen=True)
class ScoreReply:
    """Records in the order of the items, and who made them: during an update replicas of two checkpoints run."""

    records: list[ScoreRecord]
    identity: dict[str, Any]


class Replica:
    """Holds the scorer. Fails at its start, and so the deployment, when the golden rewards do not come out.

    Raises, at start: ConfigError for a wrong checkpoint, device or policy; InfrastructureError for a wrong reward.
    """

    def __init__(self, args: dict[str, object]) -> None:
        settings = ServeArgs.model_validate(args)
        _limit_torch_threads(settings.replica.torch_threads)
        checkpoint = find_checkpoint(settings.checkpoint)
        self._scorer: Scorer = load(
            checkpoint, device=settings.device, dtype=settings.dtype, mode=settings.mode, adapters=settings.adapters
        )
        identity = self._scorer.identity
        logger.info("%s on %s in %s, LoRA %s", identity.name, settings.device, identity.dtype, self._scorer.placement)
        check_applies(load_policy(in_project(settings.policy)), identity.checkpoints, identity.vector_perspectives)
        self._scorer.check_golden()
        self._golden_failure: Exception | None = None
        self._identity: dict[str, Any] = {
            "name": identity.name,
            "checkpoints": {str(perspective): checkpoint for perspective, checkpoint in identity.checkpoints.items()},
            "preprocessing_hash": identity.preprocessing_hash,
            "dtype": identity.dtype,
            "mode": identity.mode,
            "is_trained": identity.is_trained,
            "licence": identity.licence,
            "placement": self._scorer.placement,
            "heads": head_facts(self._scorer.heads),
            "vector_perspectives": [str(perspective) for perspective in identity.vector_perspectives],
            "code_version": code_version(),
            "facts": reward_facts(identity, code_version()),
            # A checkpoint without golden inputs is ready once it has loaded; say so.
            "has_golden": (resolve(checkpoint) / GOLDEN_FILE).exists(),
        }
        self._items_scored = dict.fromkeys(Priority, 0)
        self._preprocess_pool = ThreadPoolExecutor(settings.replica.preprocess_threads, "preprocess")
        self._batcher: Batcher[Prepared, RawOutput] = Batcher(
            self._forward,
            max_batch_size=settings.batching.max_batch_size,
            batch_wait_timeout_s=settings.batching.batch_wait_timeout_s,
            max_queued_items=settings.batching.max_queued_items,
            verify=self._scorer.check_golden,
        )

    async def identity(self) -> dict[str, Any]:
        """What decides this replica's rewards: name, checkpoints, hashes, dtype, mode, licence, code version."""
        return self._identity

    async def counts(self) -> dict[str, int]:
        """Items that went through the device since this replica started, by class; repeated ones count again."""
        return {priority.name.lower(): count for priority, count in self._items_scored.items()}

    async def readiness(self) -> dict[str, Any]:
        """The identity, if the last golden check was right. Raises TransientError if not."""
        self._batcher.check()
        if self._golden_failure is not None:
            raise TransientError(f"the golden check failed: {self._golden_failure}")
        return self._identity

    async def score(self, items: Sequence[Item], perspectives: Sequence[str] | None = None) -> ScoreReply:
        """Score online items, before any work of the job.

        Raises: ConfigError for a perspective that this checkpoint does not have; OverloadedError when too many
        items wait. A bad item is a record with its error.
        """
        wanted = self._checked(perspectives)
        generations = [Generation(item["generation_id"], item["prompt"], item["image"]) for item in items]
        # One at a time per thread, so that the images of one request share the pool with those of others.
        prepared = [one for [one] in await asyncio.gather(*map(self._preprocess, generations))]
        records = await self._score_prepared(prepared, wanted, Priority.ONLINE)
        return ScoreReply(records, self._identity)

    async def score_prepared(
        self,
        batch: Sequence[tuple[str, bytes]],
        expected: Mapping[str, str],
        perspectives: Sequence[str] | None = None,
    ) -> list[ScoreRecord]:
        """Score one batch of the nightly job: ``(generation_id, pack_arrays(arrays))`` per row, records in order.

        The records carry no image facts: the caller, who saw the image, has them. ``expected`` are the
        ``reward_facts`` under which the caller will store the rewards; sent with each batch, because another
        checkpoint may be deployed in the middle of a night.

        Raises: ConfigError when this replica would give other rewards, or for a perspective that it does not have.
        """
        difference = first_difference(self._identity["facts"], expected)
        if difference is not None:
            raise ConfigError(f"this replica differs in {difference}; run the job with the weights and code deployed")
        wanted = self._checked(perspectives)
        unpack = partial(_unpack, batch)
        prepared = await asyncio.get_running_loop().run_in_executor(self._preprocess_pool, unpack)
        return await self._score_prepared(prepared, wanted, Priority.JOB)

    async def check_health(self) -> None:
        """Called by Serve: scores the golden inputs between two passes, away from the event loop."""
        self._batcher.check()
        try:
            await self._batcher.run_alone(self._scorer.check_golden)
        except Exception as error:
            self._golden_failure = error
            raise
        self._golden_failure = None

    async def _preprocess(self, generation: Generation) -> list[Prepared]:
        run = partial(self._scorer.preprocess, [generation])
        return await asyncio.get_running_loop().run_in_executor(self._preprocess_pool, run)

    async def _score_prepared(
        self, prepared: Sequence[Prepared], wanted: tuple[Perspective, ...], priority: Priority
    ) -> list[ScoreRecord]:
        # Only what can be scored takes a place in a pass.
        good = [item for item in prepared if item.error is None]
        scored = iter(await self._batcher.submit(good, key=wanted, priority=priority))
        self._items_scored[priority] += len(good)
        outputs = [
            next(scored) if item.error is None else RawOutput(item.generation_id, image=item.image, error=item.error)
            for item in prepared
        ]
        return self._scorer.postprocess(outputs)

    def _forward(self, items: Sequence[Prepared], key: Hashable) -> list[RawOutput]:
        assert isinstance(key, tuple)
        return self._scorer.forward(items, key)

    def _checked(self, perspectives: Sequence[str] | None) -> tuple[Perspective, ...]:
        """The perspectives to score, in one order, so that equal sets share a pass."""
        if perspectives is None:
            return self._scorer.perspectives
        unknown = set(perspectives) - {str(perspective) for perspective in self._scorer.perspectives}
        if unknown:
            raise ConfigError(f"{self._identity['name']} has no {', '.join(sorted(unknown))}")
        return tuple(perspective for perspective in self._scorer.perspectives if perspective in perspectives)


def _unpack(batch: Sequence[tuple[str, bytes]]) -> list[Prepared]:
    return [Prepared(generation_id, unpack_arrays(packed)) for generation_id, packed in batch]


def _limit_torch_threads(threads: int) -> None:
    # Imported here: building the application must not pay for torch.
    import torch

    torch.set_num_threads(threads)
