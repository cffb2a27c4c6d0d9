"""What ``POST /v1/score`` takes and gives, and the way between the wire and the scorer; ``rank_wire.py`` has the rest.

Pydantic models with unknown keys refused, so that a misspelt option is an error and not a silent default.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from deployments.problems import RequestCode
from model.errors import ErrorCode, Stage
from model.perspectives import PERSPECTIVES, Perspective
from model.policy import Policy, Severity, Verdict, decide
from model.schema import STATUS_ERROR, STATUS_SCORED, ScoreRecord

_DATA_URL = re.compile(r"data:(?P<media>[^;,]*)(?P<parameters>(;[^;,]*)*),", re.IGNORECASE)


class Strict(BaseModel):
    """Unknown keys are an error."""

    model_config = ConfigDict(extra="forbid")


class ScoreItem(Strict):
    """One generation to score."""

    id: Annotated[str, Field(max_length=256)] | None = Field(None, description="Comes back with the result.")
    prompt: str = Field(description="The text that was given to the image generator; may be empty.")
    image: str = Field(description="The image file (JPEG, PNG, WEBP, ...), as base64 or as a data URL.")


class ScoreRequest(Strict):
    items: list[ScoreItem] = Field(min_length=1)
    perspectives: list[Perspective] | None = Field(
        None, min_length=1, description="What to score; by default all that the checkpoint can."
    )


class ItemError(Strict):
    """Why one item has no reward."""

    code: str
    stage: str
    message: str


class ImageFacts(Strict):
    """Width and height are upright (EXIF orientation applied), in pixels."""

    sha256: str
    size_bytes: int
    width: int | None
    height: int | None
    format: str | None


class ScoreResult(Strict):
    """One item's outcome. A reward that was not computed is null and named in ``not_scored``, never 0."""

    id: str
    status: str = Field(description="scored or error")
    rewards: dict[Perspective, float | None] = Field(description="Unbounded, higher is better.")
    reward_vectors: dict[Perspective, list[float]] = Field(description="Of checkpoints without a scalar reward.")
    not_scored: list[Perspective]
    verdict: Verdict | None = Field(description="null where the policy lacks a reward that it needs")
    severity: Severity | None
    flags: list[Perspective]
    image: ImageFacts | None
    error: ItemError | None


class ModelFacts(Strict):
    """What scored. Equal facts give equal rewards."""

    name: str
    checkpoints: dict[Perspective, str] = Field(description="id@sha256:hash over the weights, per perspective")
    preprocessing_hash: str
    dtype: str
    mode: str = Field(description="exact, or the name of a faster way with other rewards")
    licence: str
    is_trained: bool = Field(description="false: the rewards mean nothing yet")


class PolicyFacts(Strict):
    id: str
    hash: str


class ScoreResponse(Strict):
    results: list[ScoreResult] = Field(description="One per item, in order.")
    model: ModelFacts
    policy: PolicyFacts
    code_version: str


def decode_image(text: str, max_image_bytes: int) -> bytes | ItemError:
    """The bytes behind base64 text or a base64 data URL, or what is wrong with it."""
    if text[:5].lower() == "data:":
        match = _DATA_URL.match(text)
        if match is None or not match["parameters"].lower().endswith(";base64"):
            return _encoding_error("a data URL must look like data:image/png;base64,...")
        if not match["media"].lower().startswith("image/"):
            message = f"the data URL holds {match['media'][:80] or 'text/plain'!r}, which is not an image"
            return ItemError(code=RequestCode.UNSUPPORTED_MEDIA_TYPE, stage=Stage.DECODE, message=message)
        text = text[match.end() :]
    # Four characters carry three bytes; padding makes up to two less of it.
    if len(text) // 4 * 3 - 2 > max_image_bytes:
        return _too_many_bytes(max_image_bytes)
    try:
        image = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return _encoding_error("the image is not valid base64")
    return image if len(image) <= max_image_bytes else _too_many_bytes(max_image_bytes)


def to_result(item_id: str, record: ScoreRecord, policy: Policy) -> ScoreResult:
    """A record and its verdict, as one result. Raises InputError for a reward that is not finite."""
    if record.error is not None:
        error = ItemError(code=record.error.code, stage=record.error.stage, message=record.error.message)
        return error_result(item_id, error, record)
    decision = decide(record.rewards, policy)
    return ScoreResult(
        id=item_id,
        status=STATUS_SCORED,
        rewards={perspective: record.rewards.get(perspective) for perspective in PERSPECTIVES},
        reward_vectors={perspective: list(vector) for perspective, vector in record.reward_vectors.items()},
        not_scored=[p for p in PERSPECTIVES if p not in record.rewards and p not in record.reward_vectors],
        verdict=decision.verdict,
        severity=decision.severity,
        flags=list(decision.flags),
        image=_image_facts(record),
        error=None,
    )


def error_result(item_id: str, error: ItemError, record: ScoreRecord | None = None) -> ScoreResult:
    """The result of an item that was not scored: nothing is known of it, and nothing is said."""
    return ScoreResult(
        id=item_id,
        status=STATUS_ERROR,
        rewards=dict.fromkeys(PERSPECTIVES),
        reward_vectors={},
        not_scored=list(PERSPECTIVES),
        verdict=None,
        severity=None,
        flags=[],
        image=_image_facts(record) if record else None,
        error=error,
    )


def to_response(results: Sequence[ScoreResult], identity: Mapping[str, Any], policy: Policy) -> ScoreResponse:
    """``identity``: as ``Replica.identity`` gives it."""
    return ScoreResponse(
        results=list(results),
        model=model_facts(identity),
        policy=PolicyFacts(id=policy.id, hash=policy.content_hash),
        code_version=identity["code_version"],
    )


def model_facts(identity: Mapping[str, Any]) -> ModelFacts:
    return ModelFacts(**{name: identity[name] for name in ModelFacts.model_fields})


def _image_facts(record: ScoreRecord) -> ImageFacts | None:
    image = record.image
    if image is None:
        return None
    return ImageFacts(
        sha256=image.sha256, size_bytes=image.size_bytes, width=image.width, height=image.height, format=image.format
    )


def _encoding_error(message: str) -> ItemError:
    return ItemError(code=RequestCode.BAD_IMAGE_ENCODING, stage=Stage.DECODE, message=message)


def _too_many_bytes(max_image_bytes: int) -> ItemError:
    message = f"the image is larger than max_image_bytes={max_image_bytes}; send a smaller one"
    return ItemError(code=ErrorCode.IMAGE_TOO_MANY_BYTES, stage=Stage.FETCH, message=message)
