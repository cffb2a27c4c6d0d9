"""ASGI middleware that stands before the routes: bounds on the body, and an answer to every failure.

The body is bounded while it streams in, whatever Content-Length says and before anything is parsed.
"""

from __future__ import annotations

import asyncio
import logging
from email.message import Message as EmailMessage

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.problems import Problem, RequestCode

logger = logging.getLogger("ray.serve")


class Guard:
    """Refuses bodies over ``max_body_bytes`` (413), slower than ``body_timeout_s`` (408), or not JSON (415)."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            self._check_head(scope)
            await self._app(scope, self._bounded(receive), send_and_note)
        except Exception as error:
            if is_started:
                raise  # half an answer is out: only breaking the connection tells the client
            await _to_problem(error, scope).response()(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._too_large()
        content_type = EmailMessage()
        content_type["content-type"] = headers.get("content-type", "")
        if content_type.get_content_type() != "application/json":
            raise self._refusal(415, RequestCode.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json")

    def _bounded(self, receive: Receive) -> Receive:
        received = 0
        is_complete = False
        deadline: float | None = None

        async def bounded() -> Message:
            nonlocal received, is_complete, deadline
            if is_complete:
                # Waiting for the client to hang up takes as long as it takes.
                return await receive()
            now = asyncio.get_running_loop().time()
            deadline = deadline or now + self._body_timeout_s
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"the body did not arrive within {self._body_timeout_s:g} s"
                raise self._refusal(408, RequestCode.BODY_TIMEOUT, detail) from None
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            is_complete = not message.get("more_body", False)
            return message

        return bounded

    def _too_large(self) -> Problem:
        detail = f"the body is larger than {self._max_body_bytes} bytes"
        return self._refusal(413, RequestCode.BODY_TOO_LARGE, detail)

    @staticmethod
    def _refusal(status: int, code: RequestCode, detail: str) -> Problem:
        """What is left of the body is not read, so the connection cannot carry another request."""
        return Problem(status, code, detail, headers={"Connection": "close"})


def _to_problem(error: Exception, scope: Scope) -> Problem:
    if isinstance(error, Problem):
        return error
    # Unknown, so a fault of ours. What it was stands in the log, with its traceback; prompts and images are in no
    # message and so not in it.
    logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
    return Problem(500, RequestCode.INTERNAL_ERROR, "this server failed; its log says why")
