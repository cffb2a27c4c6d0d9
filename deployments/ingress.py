"""The HTTP side: routes, and the one table from errors to statuses.

``create_app`` needs no Ray: it talks to whatever has the replica's three methods.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.config import IngressArgs, ServeArgs
from deployments.guard import Guard
from deployments.paths import in_project
from deployments.problems import Problem, RequestCode
from deployments.rank_wire import RankRequest, RankResponse, head_of, to_rank_response
from deployments.replica import Item, ScoreReply
from deployments.wire import (
    ItemError,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    decode_image,
    error_result,
    model_facts,
    to_response,
    to_result,
)
from model.errors import ConfigError, ErrorCode, InputError, OverloadedError, TransientError
from model.perspectives import Perspective
from model.policy import Policy, check_applies
from model.policy_file import load_policy
from model.ranking import rank_records

logger = logging.getLogger("ray.serve")
T = TypeVar("T")

# The one table. Whatever is not in it is 500, with its traceback in the log (deployments/guard.py).
STATUS_OF_ERROR: dict[type[Exception], tuple[int, RequestCode]] = {
    OverloadedError: (429, RequestCode.OVERLOADED),
    BackPressureError: (429, RequestCode.OVERLOADED),
    TransientError: (503, RequestCode.UNAVAILABLE),
    TimeoutError: (503, RequestCode.UNAVAILABLE),
    RayActorError: (503, RequestCode.UNAVAILABLE),  # the replica died with the request; Serve starts another
    DeploymentUnavailableError: (503, RequestCode.UNAVAILABLE),
    ReplicaUnavailableError: (503, RequestCode.UNAVAILABLE),
}
# What keeps /readyz at 503. ConfigError: during an update, a policy that does not fit the checkpoint.
NOT_READY: tuple[type[Exception], ...] = (ConfigError, *STATUS_OF_ERROR)
# The status of a request whose only item has this code; every other code of an item is 422 (InputError).
STATUS_OF_ITEM: dict[str, int] = {
    ErrorCode.IMAGE_TOO_MANY_BYTES: 413,
    RequestCode.UNSUPPORTED_MEDIA_TYPE: 415,
}
RETRY_AFTER_S = {429: 1, 503: 5}  # a queue drains in about a second; a replica is replaced in some


class ReplicaHandle(Protocol):
    """What the routes need of the replicas; ``RemoteReplica`` is it over a Serve handle."""

    async def identity(self) -> dict[str, Any]: ...
    async def readiness(self) -> dict[str, Any]: ...
    async def score(self, items: list[Item], perspectives: list[str] | None) -> ScoreReply: ...


class RemoteReplica:
    """The replicas behind a Serve handle, any of them for each call."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = await self._handle.identity.remote()
        return identity

    async def readiness(self) -> dict[str, Any]:
        identity: dict[str, Any] = await self._handle.readiness.remote()
        return identity

    async def score(self, items: list[Item], perspectives: list[str] | None) -> ScoreReply:
        reply: ScoreReply = await self._handle.score.remote(items, perspectives)
        return reply


class Ingress:
    """The deployment that Serve's proxy talks to. Raises ConfigError at its start for a wrong policy file."""

    def __init__(self, args: dict[str, object], replica: DeploymentHandle) -> None:
        self._settings = ServeArgs.model_validate(args)
        self._policy = load_policy(in_project(self._settings.policy))
        self._replica = RemoteReplica(replica)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by ``serve.ingress`` in the replica, once the constructor is through."""
        return create_app(self._replica, self._policy, self._settings.ingress)


def create_app(replica: ReplicaHandle, policy: Policy, limits: IngressArgs) -> FastAPI:
    """The endpoint. A plain FastAPI, so that Serve's logs and metrics know its routes."""
    # No interactive pages: they load scripts from elsewhere. The OpenAPI document is at /openapi.json.
    app = FastAPI(title="Assay", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, max_body_bytes=limits.max_body_bytes, body_timeout_s=limits.body_timeout_s)
    for kind in (InputError, HTTPException, RequestValidationError, *STATUS_OF_ERROR):
        app.add_exception_handler(kind, _answer)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """This process is up. It says nothing about the model."""
        return {"status": "up"}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """200 only when a replica holds its checkpoint and its last golden check was right."""
        return await check_ready(replica, policy, limits)

    @app.post("/v1/score")
    async def score(request: ScoreRequest) -> ScoreResponse:
        """Rewards and verdict for each image with its prompt."""
        _check_count(len(request.items), limits)
        return await _within(limits.request_timeout_s, score_items(request, replica, policy, limits))

    @app.post("/v1/rank")
    async def rank(request: RankRequest) -> RankResponse:
        """Images of one prompt, best first, with preference probabilities. A ranking is no verdict."""
        _check_count(len(request.images), limits)
        return await _within(limits.request_timeout_s, rank_images(request, replica, limits))

    return app


async def check_ready(replica: ReplicaHandle, policy: Policy, limits: IngressArgs) -> dict[str, Any]:
    """What is ready. Raises Problem with the reason where nothing is."""
    try:
        identity = await _within(limits.ready_timeout_s, replica.readiness())
        check_policy(policy, identity)
    except NOT_READY as error:
        detail = f"no replica is ready: {type(error).__name__}: {error}"
        raise Problem(503, RequestCode.NOT_READY, detail) from error
    return {
        "status": "ready",
        "golden": "passed" if identity["has_golden"] else "absent",
        "model": model_facts(identity).model_dump(),
        "policy": {"id": policy.id, "hash": policy.content_hash},
        "code_version": identity["code_version"],
    }


async def score_items(
    request: ScoreRequest, replica: ReplicaHandle, policy: Policy, limits: IngressArgs
) -> ScoreResponse:
    """One result per item, in order. Raises Problem when the request's only item cannot be scored."""
    images = await _decode([item.image for item in request.items], limits)
    perspectives = None
    if request.perspectives is not None:
        perspectives = _deployed(request.perspectives, await replica.identity())
    ids = [item.id if item.id is not None else str(index) for index, item in enumerate(request.items)]
    good = [
        Item(generation_id=ids[index], prompt=request.items[index].prompt, image=image)
        for index, image in enumerate(images)
        if isinstance(image, bytes)
    ]
    reply = await replica.score(good, perspectives) if good else ScoreReply([], await replica.identity())
    check_policy(policy, reply.identity)
    records = iter(reply.records)
    results: list[ScoreResult] = []
    for item_id, image in zip(ids, images, strict=True):
        if isinstance(image, ItemError):
            results.append(error_result(item_id, image))
        else:
            results.append(to_result(item_id, next(records), policy))
    if len(results) == 1 and results[0].error is not None:
        raise _item_problem(results[0].error)
    return to_response(results, reply.identity, policy)


async def rank_images(request: RankRequest, replica: ReplicaHandle, limits: IngressArgs) -> RankResponse:
    """Every image of the request once, ranked or not. Raises Problem when its only image cannot be scored."""
    images = await _decode(request.images, limits)
    identity = await replica.identity()
    perspectives = _deployed([request.perspective], identity)
    indices = [index for index, image in enumerate(images) if isinstance(image, bytes)]
    items = [
        Item(generation_id=str(index), prompt=request.prompt, image=image)
        for index, image in enumerate(images)
        if isinstance(image, bytes)
    ]
    reply = await replica.score(items, perspectives) if items else ScoreReply([], identity)
    ranking = rank_records(reply.records, head_of(reply.identity, request.perspective))
    unreadable = {index: image for index, image in enumerate(images) if isinstance(image, ItemError)}
    response = to_rank_response(ranking, indices, unreadable, reply.identity)
    if len(images) == 1 and response.unranked:
        raise _item_problem(response.unranked[0].error)
    return response


async def _decode(texts: list[str], limits: IngressArgs) -> list[bytes | ItemError]:
    """The image files, or what is wrong with each. Raises Problem when there is one alone, and it is wrong."""
    # Decoding tens of megabytes would hold up every other request on the event loop.
    images = await asyncio.to_thread(lambda: [decode_image(text, limits.max_image_bytes) for text in texts])
    if len(images) == 1 and isinstance(images[0], ItemError):
        raise _item_problem(images[0])
    return images


def _check_count(count: int, limits: IngressArgs) -> None:
    if count > limits.max_items:
        detail = f"{count} items, at most {limits.max_items} per request"
        raise Problem(422, RequestCode.TOO_MANY_ITEMS, detail)


def check_policy(policy: Policy, identity: dict[str, Any]) -> None:
    """Raises ConfigError when the thresholds were made for another checkpoint than the one that scores."""
    checkpoints = {Perspective(name): checkpoint for name, checkpoint in identity["checkpoints"].items()}
    check_applies(policy, checkpoints, [Perspective(name) for name in identity["vector_perspectives"]])


def _deployed(perspectives: list[Perspective], identity: dict[str, Any]) -> list[str]:
    """Raises Problem for a perspective that the checkpoint does not have: leaving it out would look like a pass."""
    missing = sorted(set(perspectives) - set(identity["checkpoints"]))
    if missing:
        have = ", ".join(identity["checkpoints"])
        detail = f"{', '.join(missing)} cannot be scored by {identity['name']}, which has {have}"
        raise Problem(422, RequestCode.PERSPECTIVE_NOT_DEPLOYED, detail)
    return [str(perspective) for perspective in perspectives]


async def _within(timeout_s: float, work: Awaitable[T]) -> T:
    """The result of ``work``. Raises TimeoutError; ``work`` is cancelled then, down to the replica's queue."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from error


def _item_problem(error: ItemError) -> Problem:
    return Problem(STATUS_OF_ITEM.get(error.code, 422), error.code, error.message)


async def _answer(request: Request, error: Exception) -> Response:
    """The exception handler of everything that is listed; the rest goes on to deployments/guard.py."""
    return _to_problem(error).response()


def _to_problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return Problem(STATUS_OF_ITEM.get(error.code, 422), error.code, error.message)
    if isinstance(error, RequestValidationError):
        return _validation_problem(error)
    if isinstance(error, HTTPException):
        code = {404: RequestCode.NOT_FOUND, 405: RequestCode.METHOD_NOT_ALLOWED}.get(
            error.status_code, RequestCode.INVALID_REQUEST
        )
        return Problem(error.status_code, code, str(error.detail), headers=dict(error.headers or {}))
    status, code = next(row for kind, row in STATUS_OF_ERROR.items() if isinstance(error, kind))
    detail = "too many requests are waiting" if status == 429 else f"not available now: {type(error).__name__}"
    retry_after_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_S[status]
    return Problem(status, code, detail, headers={"Retry-After": str(math.ceil(retry_after_s))})


def _validation_problem(error: RequestValidationError) -> Problem:
    """Places and messages, never the input itself: it may be a prompt, an image, or not even encodable."""
    found = error.errors()
    if any(one["type"] == "json_invalid" for one in found):
        return Problem(400, RequestCode.INVALID_JSON, "the body is not valid JSON")
    errors = [{"place": ".".join(map(str, one["loc"])), "message": one["msg"]} for one in found[:20]]
    return Problem(422, RequestCode.INVALID_REQUEST, f"{errors[0]['place']}: {errors[0]['message']}", errors=errors)
