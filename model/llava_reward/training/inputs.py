"""Records to what the network takes: images read and prepared ahead in threads, then the frozen tower.

Letters: see ``batches.py``. A *side* is one (prompt, image) of a record; a pair has two, chosen first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import storage
from model.errors import ConfigError, ErrorCode, InputError, Stage
from model.llava_reward.backbones.interface import Backbone
from model.llava_reward.processor import LlavaRewardPreprocessor
from model.preferences import LabelledImage, PreferencePair, Record
from model.schema import Generation

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Side:
    """``record_id``: whose it is, for messages."""

    record_id: str
    prompt: str
    image: str

    @property
    def key(self) -> tuple[str, str]:
        return self.prompt, self.image


def sides_of(records: Sequence[Record]) -> list[Side]:
    """All chosen sides, then all rejected ones; one side for labelled images."""
    pairs = [r for r in records if isinstance(r, PreferencePair)]
    singles = [r for r in records if isinstance(r, LabelledImage)]
    return [
        *(Side(r.pair_id, r.prompt, r.chosen) for r in pairs),
        *(Side(r.pair_id, r.rejected_prompt, r.rejected) for r in pairs),
        *(Side(r.image_id, r.prompt, r.image) for r in singles),
    ]


def prepare(side: Side, preprocessor: LlavaRewardPreprocessor) -> Arrays:
    """Arrays of one side. Raises ``InputError`` naming the record and the image; ``TransientError`` of the storage."""
    try:
        data = storage.get(side.image, preprocessor.max_image_bytes)
    except FileNotFoundError as error:
        raise _named(side, ErrorCode.IMAGE_NOT_FOUND, Stage.FETCH, "there is no such object") from error
    except PermissionError as error:
        raise _named(side, ErrorCode.IMAGE_FORBIDDEN, Stage.FETCH, str(error)) from error
    except ConfigError as error:  # larger than the limit, which its message names
        raise _named(side, ErrorCode.IMAGE_TOO_MANY_BYTES, Stage.FETCH, str(error)) from error
    except OSError as error:
        raise _named(side, ErrorCode.BAD_IMAGE_URI, Stage.FETCH, str(error)) from error
    [prepared] = preprocessor.preprocess([Generation(side.record_id, side.prompt, data)])
    if prepared.error is not None:
        raise _named(side, prepared.error.code, prepared.error.stage, prepared.error.message)
    return prepared.arrays


def _named(side: Side, code: ErrorCode, stage: Stage, why: str) -> InputError:
    return InputError(code, stage, f"record {side.record_id!r}, image {side.image!r}: {why}")


def find_unusable(
    records: Sequence[Record], preprocessor: LlavaRewardPreprocessor, threads: int
) -> dict[int, InputError]:
    """Reads and prepares every side once: the first fault of each record that has one, by its place."""

    def fault_of(side: Side) -> InputError | None:
        try:
            prepare(side, preprocessor)
        except InputError as error:
            return error
        return None

    distinct = {side.key: side for side in sides_of(records)}
    with ThreadPoolExecutor(threads) as pool:
        by_key = dict(zip(distinct, pool.map(fault_of, distinct.values()), strict=True))
    found = ([by_key[side.key] for side in sides_of([record])] for record in records)
    first = (next((error for error in errors if error is not None), None) for errors in found)
    return {place: error for place, error in enumerate(first) if error is not None}


class Tower:
    """The frozen image tower, with its outputs kept per (prompt, image) as long as they fit ``cache_bytes``.

    Nothing is dropped to make room: epochs go through all images in turn, so that the oldest would always be the next
    to be needed. Outputs stay on ``device``. With a cache images go through the tower one by one.
    """

    def __init__(self, backbone: Backbone[Any, Any], vision: nn.Module, device: torch.device, cache_bytes: int) -> None:
        self.backbone, self.device = backbone, device
        self.vision = vision.eval().requires_grad_(False)
        self._free_bytes = cache_bytes
        self._has_cache = cache_bytes > 0
        self._kept: dict[tuple[str, str], Any] = {}

    def is_kept(self, side: Side) -> bool:
        """Whether the arrays of this side are not needed any more."""
        return side.key in self._kept

    @torch.no_grad()
    def share(self, sides: Sequence[Side], samples: Sequence[Any]) -> Any:
        """One batch after the tower, without gradients. ``samples``: of the backbone; None where the side is kept."""
        if not self._has_cache:
            return self.backbone.share(self.vision, samples)
        return self.backbone.join([self._one(side, sample) for side, sample in zip(sides, samples, strict=True)])

    def _one(self, side: Side, sample: Any) -> Any:
        if side.key in self._kept:
            return self._kept[side.key]
        assert sample is not None, f"record {side.record_id!r} was neither kept nor prepared"
        shared = self.backbone.share(self.vision, [sample])
        size = _size_bytes(shared)
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._kept[side.key] = shared
        return shared


def _size_bytes(value: Any) -> int:
    """Bytes of all tensors in a dataclass, or in sequences inside it."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_size_bytes, value))
    return (
        sum(_size_bytes(getattr(value, f.name)) for f in fields(value)) if hasattr(value, "__dataclass_fields__") else 0
    )


class Feeder:
    """Micro-batches with their images prepared ``ahead`` of use in ``threads``; close it, or use it in ``with``."""

    def __init__(self, tower: Tower, preprocessor: LlavaRewardPreprocessor, *, threads: int, ahead: int = 2) -> None:
        self._tower, self._preprocessor, self._ahead = tower, preprocessor, ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def feed(self, batches: Iterable[Sequence[Record]]) -> Iterator[tuple[Sequence[Record], Any]]:
        """(records, batch after the tower) in order. Raises what ``prepare`` raises, at its micro-batch."""
        waiting: deque[tuple[Sequence[Record], list[Side], list[Future[Any] | None]]] = deque()
        source = iter(batches)
        while True:
            while len(waiting) <= self._ahead and (records := next(source, None)) is not None:
                sides = sides_of(records)
                waiting.append((records, sides, [self._submit(side) for side in sides]))
            if not waiting:
                return
            records, sides, futures = waiting.popleft()
            samples = [None if future is None else future.result() for future in futures]
            yield records, self._tower.share(sides, samples)

    def _submit(self, side: Side) -> Future[Any] | None:
        return None if self._tower.is_kept(side) else self._pool.submit(self._sample, side)

    def _sample(self, side: Side) -> Any:
        return self._tower.backbone.sample(prepare(side, self._preprocessor), self._tower.device)
