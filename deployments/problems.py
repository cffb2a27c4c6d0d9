"""Error answers: ``application/problem+json`` (RFC 9457) with a stable ``code``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class RequestCode(StrEnum):
    """Why a request was refused, beside the codes of single items in model/errors.py. Clients may rely on them."""

    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TIMEOUT = "body_timeout"
    TOO_MANY_ITEMS = "too_many_items"
    BAD_IMAGE_ENCODING = "bad_image_encoding"
    PERSPECTIVE_NOT_DEPLOYED = "perspective_not_deployed"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    NOT_READY = "not_ready"
    INTERNAL_ERROR = "internal_error"


class Problem(HTTPException):
    """An answer that is an error. ``errors``: places in the request and what is wrong there.

    An HTTPException, because FastAPI turns anything else that is raised while it reads a body into a 400.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.code = code
        self.errors = list(errors)

    def response(self) -> JSONResponse:
        content: dict[str, object] = {
            "type": f"urn:assay:problem:{self.code}",
            "title": self.code.replace("_", " "),
            "status": self.status_code,
            "code": self.code,
            "detail": self.detail,
        }
        if self.errors:
            content["errors"] = self.errors
        return JSONResponse(content, self.status_code, self.headers, media_type="application/problem+json")
