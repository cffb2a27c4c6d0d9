"""Rewards of the images that people judged: from a scorer run here, a file of scores, or a published night.

Each source gives columns, one a perspective. What has no reward keeps the code of its error, and is counted.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from jobs import t2i_ratings
from jobs.fetch import FetchRules, fetch_all
from jobs.people import Item
from jobs.query import published_files, scores
from model import storage
from model.errors import ConfigError, ErrorCode, InputError
from model.evaluation.measures import Column
from model.meaning import Head, Reward, RewardVector
from model.perspectives import PERSPECTIVES, Perspective
from model.record_files import all_records, read_raw
from model.schema import Generation
from model.scorer import Scorer

NOT_IN_SCORES = "not_in_scores"
NO_REWARD = "no_reward"  # the file has the row, and no number in it
_IDS = ("generation_id", "image_id", "id")
_IMAGES = ("image_uri", "image", "path", "image_path")
_PLAIN = ("reward", "score")  # columns of files that name no perspective

Record = dict[str, Any]
Say = Callable[[str], None]
Value = float | tuple[float, ...]


@dataclass
class Scored:
    """One column. ``values``: one per item, None where it has no reward; ``errors``: there the code that says why.

    ``head`` is known where a scorer ran; ``checkpoint`` also where a file names it.
    """

    column: Column
    values: list[Value | None]
    errors: list[str | None] = field(default_factory=list)
    checkpoint: str | None = None
    head: Head | None = None
    is_trained: bool | None = None

    def failures(self) -> Counter[str]:
        """How many items have no reward, by code."""
        return Counter(error for error in self.errors if error is not None)

    def scalars(self) -> list[float | None]:
        """The values as scalar rewards. Raises ``ConfigError`` for a general-preference head."""
        if self.head is not None:
            check_scalar(self.column, self.head)
        return [value if isinstance(value, float) else None for value in self.values]


def check_scalar(column: Column, head: Head) -> None:
    """Raises ``ConfigError`` for a general-preference head, whose vectors mean something in pairs only."""
    if head.is_general_preference:
        raise ConfigError(
            f"{column.title} has a general-preference head: its vectors say which of two images is preferred, and "
            "give no image a reward; use preference pairs, or name other perspectives"
        )


@dataclass(frozen=True)
class Reading:
    """How images are read and scored. ``batch_size``: images at a time; ``needs_scalars``: vectors are of no use."""

    rules: FetchRules
    batch_size: int
    needs_scalars: bool


def from_scorer(
    name: str, scorer: Scorer, items: Sequence[Item], perspectives: Sequence[Perspective], how: Reading, say: Say
) -> list[Scored]:
    """Score every item; an (image, prompt) that occurs more than once is scored once. Raises ``ConfigError``."""
    wanted = tuple(perspectives) or scorer.perspectives
    if missing := [one for one in wanted if one not in scorer.heads]:
        raise ConfigError(f"{name} does not score {missing[0]}; it scores {', '.join(scorer.heads)}")
    for perspective in wanted:
        if how.needs_scalars:
            check_scalar(Column(name, perspective), scorer.heads[perspective])
    distinct = list(dict.fromkeys((item.prompt, item.image) for item in items))
    found: dict[tuple[str, str], dict[Perspective, Value] | str] = {}
    for done, batch in _batches(distinct, how):
        found |= _score(scorer, batch, wanted)
        say(f"{name}: {done} of {len(distinct)} images scored")
    columns = []
    for perspective in wanted:
        one = Scored(
            Column(name, perspective),
            [],
            [],
            scorer.identity.checkpoints[perspective],
            scorer.heads[perspective],
            scorer.identity.is_trained,
        )
        for item in items:
            values = found[item.prompt, item.image]
            one.values.append(None if isinstance(values, str) else values[perspective])
            one.errors.append(values if isinstance(values, str) else None)
        columns.append(one)
    return columns


Fetched = list[tuple[tuple[str, str], bytes | InputError]]


def _batches(distinct: Sequence[tuple[str, str]], how: Reading) -> Iterator[tuple[int, Fetched]]:
    for start in range(0, len(distinct), how.batch_size):
        chosen = distinct[start : start + how.batch_size]
        images = asyncio.run(fetch_all([image for _, image in chosen], how.rules))
        yield start + len(chosen), list(zip(chosen, images, strict=True))


def _score(
    scorer: Scorer, batch: Fetched, wanted: Sequence[Perspective]
) -> dict[tuple[str, str], dict[Perspective, Value] | str]:
    """Per (prompt, image) its values, or the code of its error."""
    found: dict[tuple[str, str], dict[Perspective, Value] | str] = {
        key: str(image.code) for key, image in batch if isinstance(image, InputError)
    }
    readable = [(key, image) for key, image in batch if not isinstance(image, InputError)]
    generations = [Generation(str(number), key[0], image) for number, (key, image) in enumerate(readable)]
    for (key, _), record in zip(readable, scorer.score(generations, wanted), strict=True):
        if record.error is not None:
            found[key] = str(record.error.code)
            continue
        values: dict[Perspective, Value] = {**record.rewards, **record.reward_vectors}
        numbers = [number for one in values.values() for number in (one if isinstance(one, tuple) else (one,))]
        found[key] = values if all(map(math.isfinite, numbers)) else str(ErrorCode.NON_FINITE_REWARD)
    return found


def from_file(
    name: str, uri: str, items: Sequence[Item], perspectives: Sequence[Perspective], image_root: str | None
) -> list[Scored]:
    """Scores of a JSON, JSONL or Parquet file, joined by (prompt, image), or by id where it has no images.

    Columns ``reward_<perspective>``, or ``reward`` or ``score``; ``checkpoint_<perspective>`` and ``error_code`` are
    read where they are. Raises ``ConfigError``: no such columns, or two rewards for one key.
    """
    records = all_records(uri, read_raw(uri))
    if t2i_ratings.is_results(records):
        records = t2i_ratings.flat_results(records)
    return _joined(name, uri, records, items, perspectives, image_root)


def from_night(
    name: str, output: str, night: date, items: Sequence[Item], perspectives: Sequence[Perspective], root: str | None
) -> list[Scored]:
    """Scores of a published night, read through its manifest."""
    columns = ["generation_id", "prompt", "image_uri", "error_code"]
    columns += [f"{kind}_{one}" for one in PERSPECTIVES for kind in ("reward", "checkpoint")]
    records = scores(published_files(output, night)).to_table(columns=columns).to_pylist()
    return _joined(name, f"{output}, night {night}", records, items, perspectives, root)


def _joined(
    name: str,
    source: str,
    records: Sequence[Record],
    items: Sequence[Item],
    perspectives: Sequence[Perspective],
    image_root: str | None,
) -> list[Scored]:
    known = {key for record in records for key, value in record.items() if value is not None}
    columns = {one: f"reward_{one}" for one in (perspectives or PERSPECTIVES) if f"reward_{one}" in known}
    plain = next((column for column in _PLAIN if column in known), None)
    if not columns and plain is None:
        raise ConfigError(f"{source} has no rewards: expected reward_<perspective>, or one of {', '.join(_PLAIN)}")
    rows = _Rows(source, records, image_root, known, has_images=all(item.image for item in items))
    if not columns and plain is not None:
        return [_column(Column(name), plain, None, rows, items)]
    return [_column(Column(name, p), column, f"checkpoint_{p}", rows, items) for p, column in columns.items()]


class _Rows:
    """Records by key: (prompt, image) where both sides have images, else id."""

    def __init__(
        self, source: str, records: Sequence[Record], image_root: str | None, known: set[str], *, has_images: bool
    ) -> None:
        self.source = source
        self._root = image_root
        image = next((one for one in _IMAGES if one in known), None)
        self._image = image if has_images and "prompt" in known else None
        self._id = next((one for one in _IDS if one in known), None)
        if self._image is None and self._id is None:
            raise ConfigError(
                f"{source} can be joined with nothing: it needs prompt and one of {', '.join(_IMAGES)}, or one of "
                f"{', '.join(_IDS)}"
            )
        self._found: dict[object, list[Record]] = {}
        for record in records:
            self._found.setdefault(self._key(record), []).append(record)

    def _key(self, record: Record) -> object:
        if self._image is not None:
            return record.get("prompt"), record.get(self._image)
        return str(record.get(self._id or ""))

    def of(self, item: Item) -> list[Record]:
        """The rows of an item; its image may stand there as written in the data, or with the image root in front."""
        if self._image is None:
            return self._found.get(item.id, [])
        written = self._found.get((item.prompt, item.image), [])
        if written or self._root is None:
            return written
        return self._found.get((item.prompt, storage.join(self._root, item.image)), [])


def _column(column: Column, name: str, checkpoint: str | None, rows: _Rows, items: Sequence[Item]) -> Scored:
    one = Scored(column, [])
    checkpoints: set[str] = set()
    for item in items:
        found = rows.of(item)
        values = {value for row in found if (value := row.get(name)) is not None and _is_reward(value)}
        if len(values) > 1:
            raise ConfigError(
                f"{rows.source} has {len(values)} different values of {name} for image {item.image or item.id!r}: "
                "scores of several checkpoints or runs must be separate files"
            )
        one.values.append(float(values.pop()) if values else None)
        codes = {str(row["error_code"]) for row in found if row.get("error_code")}
        error = min(codes, default=NO_REWARD) if found else NOT_IN_SCORES
        one.errors.append(error if one.values[-1] is None else None)
        checkpoints |= {str(row[checkpoint]) for row in found if checkpoint and row.get(checkpoint) is not None}
    if len(checkpoints) > 1:
        raise ConfigError(f"{rows.source}: {name} is of {len(checkpoints)} checkpoints, whose rewards do not compare")
    one.checkpoint = min(checkpoints, default=None)
    return one


def _is_reward(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_meaning(value: Value, head: Head) -> Reward | RewardVector:
    """A value with its head, as ``model/meaning.py`` wants it."""
    return Reward(value, head) if isinstance(value, float) else RewardVector(value, head)
