"""Replays a sample of a published night through the endpoint and compares the rewards.

The job and the endpoint promise the same reward for the same bytes and prompt, in any batch. This checks it: rows are
drawn at random, their images read again, and posted to ``POST /v1/score`` in batches of random sizes. Rows whose image
stood in the log itself are skipped and counted, since the output holds no image.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import zip_longest
from typing import Any

import pyarrow.dataset as ds

from jobs import manifest as manifests
from jobs.endpoint import Endpoint, Refusal
from jobs.fetch import FetchRules, allowed_buckets, check_image_root, fetch_all
from jobs.manifest import Manifest
from jobs.query import scores
from model import storage
from model.errors import ConfigError, InputError
from model.identity import same_within
from model.images import MAX_IMAGE_BYTES
from model.modes import EXACT
from model.schema import STATUS_SCORED

MAX_BATCH_ITEMS = 32  # the endpoint's own default limit
# A third more as base64; the endpoint takes bodies of 64 MiB by default.
_MAX_BATCH_BYTES = 32 * 2**20
_HASHED = re.compile(r"[0-9a-f]{64}")

Row = dict[str, Any]


class ParityError(Exception):
    """A reward of the endpoint is not that of the night; the message names the first such row."""


@dataclass(frozen=True)
class Replay:
    """What to replay, and where. ``rows``: how many to draw; ``url``: of the endpoint, without a path."""

    output: str
    night: date
    url: str
    rows: int = 100
    seed: int = 0
    image_root: str | None = None
    allow_bucket: tuple[str, ...] = ()


@dataclass
class Parity:
    """What came out. Differences are absolute, in reward units; ``skipped``: reason -> rows.

    ``dtype``, ``mode``: of the endpoint; the night must have been scored in the same. ``spreads``: standard deviation
    of each stored value over the rows drawn, by its name. ``bound``: that of the value with the largest difference.
    """

    spreads: dict[str, float] = field(default_factory=dict)
    dtype: str = ""
    mode: str = EXACT
    rows: int = 0
    values: int = 0
    batch_sizes: list[int] = field(default_factory=list)
    largest: float = 0.0
    bound: float = 0.0
    beyond: str | None = None
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, name: str, stored: float | None, replayed: float | None) -> None:
        """Compare one value. A reward on one side only is beyond every bound."""
        if stored is None and replayed is None:
            return
        difference = math.inf if stored is None or replayed is None else abs(stored - replayed)
        bound = same_within(self.dtype, self.spreads.get(name, 0.0), self.mode)
        self.values += 1
        if difference >= self.largest:
            self.largest, self.bound = difference, bound
        where = f"row {row['row_key']} (generation {row['generation_id']}), {name}"
        if difference > bound and self.beyond is None:
            self.beyond = f"{where}: {stored} stored, {replayed} replayed: beyond {bound:.3g}"


def replay(job: Replay, say: Callable[[str], None]) -> Parity:
    """Draw, post, compare; says the largest difference.

    - raises: ``ParityError`` when a difference exceeds ``same_within``; ``ConfigError`` when nothing is published,
      nothing can be compared, or the endpoint has another checkpoint or preprocessing; ``InfrastructureError`` when
      it does not answer
    """
    manifest = manifests.latest(job.output, job.night)
    if manifest is None:
        raise ConfigError(f"the night {job.night} is not published under {job.output}")
    check_image_root(job.image_root)
    rng = random.Random(job.seed)  # noqa: S311 - a sample, no secret
    result = Parity()
    rows = draw(job, manifest, rng, result.skipped)
    result.spreads = spreads_of(rows, list(manifest.checkpoints))
    buckets = allowed_buckets(manifest.inputs[0].uri, job.image_root, job.allow_bucket)
    rules = FetchRules(job.image_root, buckets, MAX_IMAGE_BYTES, concurrency=16)
    endpoint = Endpoint(job.url)
    for batch in batches(rows, rules, rng, result.skipped):
        _compare_batch(endpoint, batch, manifest, result)
    _conclude(result, say)
    return result


def draw(job: Replay, manifest: Manifest, rng: random.Random, skipped: Counter[str]) -> list[Row]:
    """``job.rows`` scored rows with an image URI, or all if there are fewer; two passes, in bounded memory."""
    files = [storage.join(job.output, file.path) for file in manifest.files]
    dataset = scores(files)
    is_scored = ds.field("status") == STATUS_SCORED
    has_uri = ds.field("image_uri").is_valid()
    skipped["image not in the output (it stood in the log)"] = dataset.count_rows(filter=is_scored & ~has_uri)
    count = dataset.count_rows(filter=is_scored & has_uri)
    wanted = set(rng.sample(range(count), min(job.rows, count)))
    names = [n for n in dataset.schema.names if n.startswith(("reward_", "checkpoint_"))]
    columns = ["row_key", "generation_id", "prompt", "image_uri", "image_sha256", "preprocessing_hash", *names]
    rows, position = [], 0
    for part in dataset.to_batches(columns=columns, filter=is_scored & has_uri):
        rows += [part.slice(i, 1).to_pylist()[0] for i in range(part.num_rows) if position + i in wanted]
        position += part.num_rows
    prompts = [row["prompt"] for row in rows]
    if any(prompt is None for prompt in prompts) or (prompts and all(_HASHED.fullmatch(prompt) for prompt in prompts)):
        raise ConfigError(f"the night {job.night} was published without its prompts (dropped or hashed): no replay")
    rng.shuffle(rows)  # neighbours in the log must not stay neighbours in a batch
    return rows


def spreads_of(rows: Sequence[Row], perspectives: Sequence[str]) -> dict[str, float]:
    """Standard deviation of every stored value over the rows, by the names that ``Parity.add`` is given."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for perspective in perspectives:
            vector = row[f"reward_{perspective}_vector"] or []
            named = [(perspective, row[f"reward_{perspective}"])]
            named += [(_component(perspective, index), value) for index, value in enumerate(vector)]
            for name, value in named:
                if value is not None:
                    values.setdefault(name, []).append(value)
    return {name: statistics.pstdev(found) for name, found in values.items()}


def _component(perspective: str, index: int) -> str:
    return f"{perspective}[{index}]"


def batches(
    rows: Sequence[Row], rules: FetchRules, rng: random.Random, skipped: Counter[str]
) -> Iterator[list[tuple[Row, bytes]]]:
    """Rows with their images, 1 to ``MAX_BATCH_ITEMS`` at a time; an image that is gone or changed is skipped."""
    start = 0
    while start < len(rows):
        chosen = rows[start : start + rng.randint(1, MAX_BATCH_ITEMS)]
        start += len(chosen)
        batch: list[tuple[Row, bytes]] = []
        size_bytes = 0
        images = asyncio.run(fetch_all([row["image_uri"] for row in chosen], rules))
        for row, image in zip(chosen, images, strict=True):
            if isinstance(image, InputError):
                skipped[f"image not read: {image.code}"] += 1
                continue
            if hashlib.sha256(image).hexdigest() != row["image_sha256"]:
                skipped["image changed since the night"] += 1
                continue
            if batch and size_bytes + len(image) > _MAX_BATCH_BYTES:
                yield batch
                batch, size_bytes = [], 0
            batch.append((row, image))
            size_bytes += len(image)
        if batch:
            yield batch


def _compare_batch(endpoint: Endpoint, batch: Sequence[tuple[Row, bytes]], manifest: Manifest, result: Parity) -> None:
    items = [
        {"id": row["row_key"], "prompt": row["prompt"], "image": base64.b64encode(image).decode()}
        for row, image in batch
    ]
    try:
        answer = endpoint.post("/v1/score", {"items": items, "perspectives": list(manifest.checkpoints)})
    except Refusal as error:
        if len(batch) == 1 and error.is_about_the_item:
            raise ParityError(f"row {batch[0][0]['row_key']} was scored, and the endpoint says {error}") from error
        raise ConfigError(f"{endpoint.url} refused the request: {error}") from error
    check_same_model(answer, manifest, result)
    result.batch_sizes.append(len(batch))
    for (row, _), scored in zip(batch, answer["results"], strict=True):
        if scored["error"] is not None:
            raise ParityError(f"row {row['row_key']} was scored, and the endpoint says {scored['error']['message']}")
        result.rows += 1
        for perspective in manifest.checkpoints:
            _compare_perspective(row, scored, perspective, result)


def _compare_perspective(row: Row, scored: dict[str, Any], perspective: str, result: Parity) -> None:
    result.add(row, perspective, row[f"reward_{perspective}"], scored["rewards"][perspective])
    stored, replayed = row[f"reward_{perspective}_vector"] or [], scored["reward_vectors"].get(perspective, [])
    for index, (mine, theirs) in enumerate(zip_longest(stored, replayed)):
        result.add(row, _component(perspective, index), mine, theirs)


def check_same_model(answer: dict[str, Any], manifest: Manifest, result: Parity) -> None:
    """Raises ``ConfigError`` naming what differs: rewards of another model would say nothing about this one."""
    model = answer["model"]
    facts = {f"checkpoint of {p}": (c, model["checkpoints"].get(p)) for p, c in manifest.checkpoints.items()}
    facts["preprocessing"] = (manifest.preprocessing_hash, model["preprocessing_hash"])
    if manifest.precision is not None:
        facts["dtype"] = (manifest.precision.dtype, model["dtype"])
        facts["mode"] = (manifest.precision.mode, model["mode"])
    for name, (mine, theirs) in facts.items():
        if mine != theirs:
            raise ConfigError(f"the endpoint has another {name}: {theirs}, the night was scored with {mine}")
    result.dtype, result.mode = model["dtype"], model["mode"]


def _conclude(result: Parity, say: Callable[[str], None]) -> None:
    for reason, count in sorted(result.skipped.items()):
        if count:
            say(f"skipped {count} rows: {reason}")
    if not result.rows:
        raise ConfigError("nothing to compare: no scored row of this night has an image that can be read again")
    sizes = f"{len(result.batch_sizes)} requests of {min(result.batch_sizes)} to {max(result.batch_sizes)} images"
    say(f"compared {result.values} rewards of {result.rows} rows in {sizes}")
    mode = "" if result.mode == EXACT else f", mode {result.mode}"
    say(f"largest difference {result.largest:.3g}, bound {result.bound:.3g} in {result.dtype}{mode}")
    if result.beyond is not None:
        raise ParityError(result.beyond)
