"""FakeScorer: the scorer's surface without a model, for tests of queues and batching.

Rewards are a hash of image bytes, prompt and perspective: equal inputs get equal rewards, in any batch and any
process. They mean nothing, so it never stands in for the model in a demonstration or an end-to-end test.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from model.errors import ConfigError, InputError
from model.images import decode_image, image_facts
from model.meaning import Head
from model.perspectives import PERSPECTIVES, Perspective
from model.prompts import encode_prompt
from model.ranking import Ranking, rank_images
from model.schema import Generation, RowError, ScoreRecord
from model.scorer import Prepared, RawOutput, ScorerIdentity, to_records

_NAME = "fake"
_TAU = 1.0  # so that probabilities of its rewards, at most 4 apart, differ from 0 and 1
_REWARD_RANGE = 4.0  # rewards lie in [-2, 2); a power of two keeps them exact in float32


class FakeScorer:
    """Deterministic, without torch. ``batch_delay_s``: how long each forward takes, in seconds."""

    def __init__(self, perspectives: Sequence[Perspective] = PERSPECTIVES, *, batch_delay_s: float = 0.0) -> None:
        self.perspectives: tuple[Perspective, ...] = tuple(perspectives)
        self.placement = "no weights"
        self.preprocessing_hash = hashlib.sha256(_NAME.encode()).hexdigest()
        self._batch_delay_s = batch_delay_s
        self.identity = ScorerIdentity(
            name=_NAME,
            checkpoints={p: f"{_NAME}@sha256:{hashlib.sha256(p.encode()).hexdigest()}" for p in self.perspectives},
            preprocessing_hash=self.preprocessing_hash,
            dtype="float32",
            is_trained=False,
            licence="Apache-2.0",
        )
        self.heads: Mapping[Perspective, Head] = {
            p: Head(p, self.identity.checkpoints[p], _TAU) for p in self.perspectives
        }

    def preprocess(self, generations: Iterable[Generation]) -> list[Prepared]:
        """Decode each image, so that bad rows fail as they do elsewhere; ``digest`` is ``(32,)`` uint8."""
        return [self._prepare(generation) for generation in generations]

    def _prepare(self, generation: Generation) -> Prepared:
        try:
            prompt = encode_prompt(generation.prompt)
            _, facts = decode_image(generation.image)
        except InputError as error:
            row_error = RowError(error.code, error.stage, error.message)
            return Prepared(generation.generation_id, image=image_facts(generation.image), error=row_error)
        digest = hashlib.sha256(facts.sha256.encode() + prompt).digest()
        return Prepared(generation.generation_id, {"digest": np.frombuffer(digest, dtype=np.uint8)}, facts)

    def forward(self, batch: Sequence[Prepared], perspectives: Sequence[Perspective] | None = None) -> list[RawOutput]:
        """Rewards in [-2, 2) from each digest."""
        wanted = self.perspectives if perspectives is None else tuple(perspectives)
        if not set(wanted) <= set(self.perspectives):
            raise ConfigError(
                f"perspectives {list(map(str, wanted))} are not all in {list(map(str, self.perspectives))}"
            )
        if self._batch_delay_s:
            time.sleep(self._batch_delay_s)
        return [
            RawOutput(item.generation_id, {} if item.error else _rewards(item, wanted), item.image, item.error)
            for item in batch
        ]

    def postprocess(self, outputs: Sequence[RawOutput]) -> list[ScoreRecord]:
        """One record per output, in order."""
        return to_records(outputs, self.identity.vector_perspectives)

    def score(
        self, generations: Iterable[Generation], perspectives: Sequence[Perspective] | None = None
    ) -> list[ScoreRecord]:
        """``postprocess(forward(preprocess(generations)))``."""
        return self.postprocess(self.forward(self.preprocess(generations), perspectives))

    def rank(self, prompt: str, images: Sequence[bytes], perspective: Perspective) -> Ranking:
        """See ``model.ranking.rank_images``."""
        return rank_images(self, prompt, images, perspective)

    def check_golden(self) -> None:
        """There are no weights that could be wrong."""


def _rewards(item: Prepared, wanted: Sequence[Perspective]) -> dict[Perspective, tuple[float, ...]]:
    rewards: dict[Perspective, tuple[float, ...]] = {}
    for perspective in wanted:
        digest = hashlib.sha256(item.arrays["digest"].tobytes() + perspective.encode()).digest()
        fraction = int.from_bytes(digest[:3], "big") / 2**24
        rewards[perspective] = (_REWARD_RANGE * (fraction - 0.5),)
    return rewards
