"""The scorer interface, and ``load`` which finds the system behind a checkpoint.

Three steps, so that batching and overlap stay outside the model: ``preprocess`` (CPU: bytes and prompt to
uint8 pixels and token ids), ``forward`` (device), ``postprocess`` (CPU: raw values to records). Knows
nothing about Ray, storage or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from model.perspectives import Perspective
from model.schema import Generation, ImageInfo, RowError, ScoreRecord

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ScorerIdentity:
    """What decides a reward. Two scorers with equal identities give equal rewards (1e-5 in float32).

    ``checkpoints``: perspective -> ``id@sha256:hash`` over all weights which that reward depends on.
    ``preprocessing_hash``: over everything that decides pixels and tokens.
    """

    name: str
    checkpoints: Mapping[Perspective, str]
    preprocessing_hash: str
    dtype: str
    is_trained: bool
    licence: str
    vector_perspectives: tuple[Perspective, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """One generation after the CPU step: compact arrays (uint8 pixels, int32 ids), or the error of its row."""

    generation_id: str
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    image: ImageInfo | None = None
    error: RowError | None = None


@dataclass(frozen=True)
class RawOutput:
    """One generation after the device step: values per perspective (one for BT, more for GPM), or its error."""

    generation_id: str
    values: Mapping[Perspective, tuple[float, ...]] = field(default_factory=dict)
    image: ImageInfo | None = None
    error: RowError | None = None


class Preprocessor(Protocol):
    """The CPU step alone: needs no weights and no torch, so data workers can run it."""

    preprocessing_hash: str

    def preprocess(self, generations: Iterable[Generation]) -> list[Prepared]:
        """One ``Prepared`` per generation, in order; a row that cannot be prepared carries its error."""
        ...


class Scorer(Preprocessor, Protocol):
    """A reward model behind three steps."""

    identity: ScorerIdentity
    perspectives: tuple[Perspective, ...]

    def forward(self, batch: Sequence[Prepared], perspectives: Sequence[Perspective] | None = None) -> list[RawOutput]:
        """One ``RawOutput`` per item, in order; items with an error pass through."""
        ...

    def postprocess(self, outputs: Sequence[RawOutput]) -> list[ScoreRecord]:
        """One record per output, in order."""
        ...

    def score(self, generations: Iterable[Generation], perspectives: Sequence[Perspective] | None = None) -> list[ScoreRecord]:
        """``postprocess(forward(preprocess(generations)))``."""
        ...
